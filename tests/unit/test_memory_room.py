"""A node takes in no more domains than it offers memory for: starts and takeovers are refused."""

from __future__ import annotations

import asyncio
import re

import pytest

from migrator.errors import RefusedError
from migrator.model import DomainDefinition, DomainName, OwnershipRecord
from node_agent.memory_room import _COUNTED
from tests.unit.agent_world import World, spec_of
from tests.unit.api_client import Client, ask
from tests.unit.node_life import agent_starts, eventually, host_dies, runs_under, started
from tests.unit.test_takeover import silence

GIB = 1024**3
OFFERED = f"MiB free of the 4096 MiB that the node offers ({_COUNTED})"
ONE, TWO = DomainName("one"), DomainName("two")


def large(name: str) -> DomainDefinition:
    """Two of these don't fit on a node of 4 GiB."""
    return spec_of(name, memory_bytes=3 * GIB, disks=[], nics=[])


async def both_defined(world: World) -> None:
    for name in (ONE, TWO):
        await world.a.domains.define(large(name))


@pytest.mark.parametrize("node", ["a", "b"])
async def test_a_start_that_does_not_fit_names_field_and_figures(
    client: Client, world: World, node: str
) -> None:
    """Also where another agent is asked than the one that would start it."""
    await both_defined(world)
    await ask(client, "POST", "/v1/domains/one/start", {"node": node}, status=200)
    problem = await ask(client, "POST", "/v1/domains/two/start", {"node": node}, status=409)
    trouble = f"not enough memory: 3072 MiB needed, 1024 {OFFERED}"
    assert problem["fields"] == {"memory_bytes": trouble}
    assert problem["detail"] == f"domain two was not started on {node}: memory_bytes: {trouble}"
    assert await world.a.ownership.read(TWO) is None, "nothing was changed"
    other = "b" if node == "a" else "a"
    await ask(client, "POST", "/v1/domains/two/start", {"node": other}, status=200)


async def test_of_two_starts_at_once_one_counts_the_other(world: World) -> None:
    await both_defined(world)
    starts = (world.a.domains.start(name) for name in (ONE, TWO))
    found = await asyncio.gather(*starts, return_exceptions=True)
    assert [type(each) for each in found].count(OwnershipRecord) == 1
    assert [type(each) for each in found].count(RefusedError) == 1
    assert len(world.a.host.guests) == 1


async def test_a_domain_that_was_stopped_leaves_its_room(world: World) -> None:
    await both_defined(world)
    await world.a.domains.start(ONE)
    await world.a.domains.stop(ONE)
    await world.a.domains.start(TWO)
    with pytest.raises(RefusedError, match="domain one was not started on a: memory_bytes: "):
        await world.a.domains.start(ONE)


async def test_who_defines_a_domain_that_does_not_fit_is_warned(world: World) -> None:
    await both_defined(world)
    assert (await world.a.cluster.define(large("three"))).warnings == ()
    await world.a.domains.start(ONE)
    (warning,) = (await world.a.cluster.define(large("four"))).warnings
    assert warning == f"on a: memory_bytes: not enough memory: 3072 MiB needed, 1024 {OFFERED}"


async def test_a_takeover_that_does_not_fit_is_refused(world: World) -> None:
    await world.a.domains.define(spec_of("one", memory_bytes=3 * GIB))
    await world.a.domains.define(large("two"))
    await world.a.domains.start(ONE)
    await world.b.domains.start(TWO)
    before = await world.a.ownership.read(ONE)
    await silence(world)
    with pytest.raises(RefusedError) as refused:
        await world.b.takeover.take_over(ONE)
    assert refused.value.reasons == (
        f"b can't take it: memory_bytes: not enough memory: 3072 MiB needed, 1024 {OFFERED}",
    )
    assert await world.b.ownership.read(ONE) == before
    await world.b.domains.stop(TWO)
    await world.b.takeover.take_over(ONE)


async def test_what_ran_here_is_started_again_though_less_is_offered(world: World) -> None:
    """It was let in once; an operator who lowers the figure doesn't mean to stop guests."""
    before = await started(world.a)
    await host_dies(world.a)
    world.a.memory_bytes = 16 * 1024**2
    await agent_starts(world.a, "boot-2")
    await runs_under(world.a, before.token + 1)


async def test_what_waits_to_be_started_again_has_its_room(world: World) -> None:
    """Who came meanwhile took it, and both together were more than the node offers."""
    await both_defined(world)
    await world.a.domains.start(ONE)
    await host_dies(world.a)
    world.a.host.faults.failing["start"] = 100
    await agent_starts(world.a, "boot-2")

    async def has_failed_once() -> bool:
        return world.a.host.faults.failing["start"] < 100

    await eventually(has_failed_once)
    with pytest.raises(RefusedError, match=f"3072 MiB needed, 1024 {re.escape(OFFERED)}"):
        await world.a.domains.start(TWO)
    itself = spec_of("one", memory_bytes=3 * GIB)
    assert await world.a.domains.room.troubles(itself) == {}, "it doesn't count for itself"
    await world.a.domains.stop(ONE)
    world.a.host.faults.failing.clear()
    await world.a.domains.start(TWO)
