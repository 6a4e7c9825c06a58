"""When a routed node says no more that a guest is there which has left it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

import pytest

from netfabric.bridge.links import index_of
from netfabric.routed import RoutedFabric
from netfabric.routed.driver import HOLD_S
from netfabric.routes.nobody import NobodyRoutes
from netfabric.taps import tunnel_name
from tests.contract.fabric_worlds import eventually
from tests.contract.routed_world import NETWORK, RoutedWorld, run_routed
from tests.contract.test_routed_moves import NIC, TUNNEL, WEB

pytestmark = pytest.mark.lab


class SeenRoutes(NobodyRoutes):
    """Whether the network leads elsewhere is the test's to say."""

    def __init__(self) -> None:
        self.elsewhere = False
        self.looked = 0
        self.withdrawn: list[str] = []

    async def leads_away(self, addresses: Sequence[str]) -> bool:
        self.looked += 1
        return self.elsewhere

    async def withdraw(self, addresses: Sequence[str]) -> None:
        self.withdrawn += addresses


@pytest.mark.parametrize("returns", [False, True], ids=["", "returns"])
def test_an_old_node_says_nothing_more_as_soon_as_the_new_route_is_seen(returns: bool) -> None:
    """Or its word would count again when the guest ends at its new node, just after its move."""

    async def body(world: RoutedWorld) -> None:
        routes = SeenRoutes()
        fabric = RoutedFabric(NETWORK, routes, gaps_s=(0.01,) * 200)
        fd = await fabric.plug(WEB, 0, NIC)
        try:
            await fabric.prepare_departure(WEB, [NIC], TUNNEL)
            await fabric.unplug(WEB, 0)
            looked = routes.looked

            async def looked_again() -> bool:
                return routes.looked > looked + 1

            await eventually(looked_again)
            assert routes.withdrawn == []
            if returns:
                os.close(fd)
                fd = await fabric.plug(WEB, 0, NIC)
                await fabric.prepare_arrival(WEB, [NIC], TUNNEL)
                routes.elsewhere = True
                await asyncio.sleep(0.1)  # Ten times its gap.
                assert routes.withdrawn == [], "the guest will be here"
                return
            routes.elsewhere = True

            async def withdrawn() -> bool:
                return routes.withdrawn == list(NIC.addresses)

            await eventually(withdrawn)
            assert await asyncio.to_thread(index_of, tunnel_name(WEB, 0)) is not None
            routes.elsewhere = False
            async with asyncio.timeout(HOLD_S / 2):
                await fabric.end_departure(WEB)
            assert routes.withdrawn == list(NIC.addresses), "once is enough"
            assert await asyncio.to_thread(index_of, tunnel_name(WEB, 0)) is None
        finally:
            await fabric.close()
            os.close(fd)

    run_routed(body)
