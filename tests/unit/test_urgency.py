"""When a QEMU is urgent. What the kernel makes of it: tests/integration/test_qemu_urgency.py."""

from __future__ import annotations

import asyncio

import pytest

from hypervisor.qemu import urgency
from hypervisor.qemu.urgency import Urgency
from migrator import cores, shortage


@pytest.fixture
def set_to(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each niceness that was set, in order."""
    found: list[int] = []

    def set_niceness(_pid: int, niceness: int) -> bool:
        found.append(niceness)
        return True

    monkeypatch.setattr(cores, "set_niceness", set_niceness)
    monkeypatch.setattr(shortage, "set_adjustment", lambda _pid, _adjustment: None)
    monkeypatch.setattr(urgency, "CATCH_UP_S", 0.01)
    return found


async def test_a_guest_that_has_caught_up_is_one_of_many(set_to: list[int]) -> None:
    one = Urgency(1)
    await one.hurry()
    await one.calm_soon()
    assert set_to == [cores.URGENT, cores.usual()]


async def test_one_that_stands_still_again_by_then_stays_urgent(set_to: list[int]) -> None:
    """It was moved, or started, less than CATCH_UP_S before."""
    one = Urgency(1)
    calming = asyncio.create_task(one.calm_soon())
    await asyncio.sleep(0)
    await one.hurry()
    await calming
    assert set_to == [cores.URGENT]
    await one.calm_soon()
    assert set_to == [cores.URGENT, cores.usual()]


async def test_one_that_runs_is_no_more_to_be_killed_first_whatever_its_agent_had_time_for(
    set_to: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    adjusted: list[int] = []
    monkeypatch.setattr(shortage, "set_adjustment", lambda _pid, to: adjusted.append(to))
    found = Urgency(1)  # By the next agent, running.
    await found.calm_soon()
    assert adjusted == [await asyncio.to_thread(shortage.ours)]
    assert set_to == [cores.usual()]
