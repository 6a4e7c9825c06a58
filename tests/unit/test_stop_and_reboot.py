"""A domain that is being stopped, also while its agent or its host ends."""

from __future__ import annotations

import asyncio

import pytest

from migrator.errors import HypervisorError
from tests.unit.agent_world import SimulatedNode, World
from tests.unit.node_life import (
    STOPPED,
    WEB,
    agent_dies,
    agent_starts,
    eventually,
    history,
    host_dies,
    runs_under,
    started,
    stays,
)


async def being_stopped(node: SimulatedNode) -> asyncio.Task[bool]:
    """Its guest has been asked to power off, and hasn't yet."""
    node.host.faults.hanging.add("stop")
    stopping = asyncio.create_task(node.domains.stop(WEB))

    async def asked() -> bool:
        return node.restarts.notes.ending == {WEB: 1}

    await eventually(asked)
    return stopping


@pytest.mark.parametrize("heeds", [True, False])
async def test_who_stops_a_domain_hears_whether_it_was_by_force(world: World, heeds: bool) -> None:
    await started(world.a)
    world.a.host.faults.ignores_power_button = not heeds
    assert (await world.b.cluster.power_off(WEB, 0.01)).forced is not heeds


async def test_what_is_being_stopped_as_the_host_dies_stays_stopped(world: World) -> None:
    before = await started(world.a)
    stopping = await being_stopped(world.a)
    stopping.cancel()
    await asyncio.gather(stopping, return_exceptions=True)
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2")
    await stays(world.a, STOPPED, before.token)
    assert "started again" not in await history(world.a)


async def test_a_stop_that_was_cut_short_counts_for_the_run_that_it_met(world: World) -> None:
    before = await started(world.a)
    stopping = await being_stopped(world.a)
    stopping.cancel()
    await asyncio.gather(stopping, return_exceptions=True)
    await agent_dies(world.a)
    world.a.host.faults.hanging.clear()
    await agent_starts(world.a)  # The guest did nothing of what it was asked for.
    assert world.a.restarts.notes.ending == {}
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2")
    await runs_under(world.a, before.token + 1)


async def test_a_stop_that_failed_counts_for_nothing(world: World) -> None:
    before = await started(world.a)
    world.a.host.faults.failing["stop"] = 1
    with pytest.raises(HypervisorError, match="stop failed"):
        await world.a.domains.stop(WEB)
    assert world.a.restarts.notes.ending == {}
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2")
    await runs_under(world.a, before.token + 1)


async def test_a_stop_leaves_no_note(world: World) -> None:
    await started(world.a)
    await world.a.domains.stop(WEB)
    assert world.a.restarts.notes.ending == {}
