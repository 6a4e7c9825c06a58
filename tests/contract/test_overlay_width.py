"""What carries an overlay must have room for its headers: known before anything is plugged."""

from __future__ import annotations

import asyncio

import pytest

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec
from node_agent.doctor.findings import Finding, Level
from node_agent.doctor.links import check_overlay
from tests.contract.fabric_worlds import World, narrow_underlay, run_vxlan

pytestmark = pytest.mark.lab

NIC = NicSpec(mac="52:54:00:aa:bb:cc", bridge="br0")
NEEDED_BYTES = 1550


def examined() -> Finding:
    return check_overlay("br0", "192.0.2.1", NEEDED_BYTES)


def test_an_overlay_needs_room_for_its_headers() -> None:
    async def body(world: World) -> None:
        await asyncio.to_thread(lambda: narrow_underlay(NEEDED_BYTES - 1))
        (reason,) = await world.fabric.check(NIC)
        assert "under0 has an MTU of 1549 bytes" in reason
        assert "needs 1550" in reason
        with pytest.raises(FabricError, match="needs 1550"):
            await world.fabric.plug(DomainName("web"), 0, NIC)
        assert (await asyncio.to_thread(examined)).level is Level.FAILURE
        await asyncio.to_thread(lambda: narrow_underlay(NEEDED_BYTES))
        assert not await world.fabric.check(NIC)
        assert (await asyncio.to_thread(examined)).level is Level.OK

    run_vxlan(body)
