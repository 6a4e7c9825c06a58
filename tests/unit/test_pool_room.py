"""A pool that has no room left, or nearly none, as `ferry pool` tells it."""

from __future__ import annotations

import json

import pytest

from migrator.model import PoolHealth
from storage.simulated import SimulatedPool
from tests.unit.ferry_command import Ferry

pytestmark = pytest.mark.allow_blocking("the CLI is synchronous; it runs in a thread")


@pytest.mark.parametrize(
    ("free", "capacity", "health"),
    [
        (0, 2**40, "full"),
        (2**19, 2**40, "full"),
        (2**20, 2**40, "nearly full"),
        (19 * 2**30, 2**40, "nearly full"),
        (21 * 2**30, 2**40, "ok"),  # Less than 5 %, which are 51 GiB.
        (19 * 2**30, 2**36, "ok"),  # More than 5 %, though less than 20 GiB.
        (3 * 2**30, 2**36, "nearly full"),
        (2**30, None, "ok"),
        (None, None, "ok"),
    ],
)
async def test_a_pool_without_room_is_not_called_ok(
    ferry: Ferry,
    monkeypatch: pytest.MonkeyPatch,
    free: int | None,
    capacity: int | None,
    health: str,
) -> None:
    async def told(pool: SimulatedPool) -> PoolHealth:
        return PoolHealth(reachable=True, capacity_bytes=capacity, free_bytes=free)

    monkeypatch.setattr(SimulatedPool, "health", told)
    listed = (await ferry("pool", "ls")).out.splitlines()[1]
    assert listed.split("  ", 2)[2].strip().startswith(f"{health}  ")
    shown = (await ferry("pool", "show", "default")).out
    assert ("stand still" in shown) is (health != "ok")
    room = json.loads((await ferry("pool", "show", "default", "--json")).out)["room"]
    expected = {"full": "none", "nearly full": "little"}.get(health, "enough")
    assert room == (expected if free is not None else "unknown")
