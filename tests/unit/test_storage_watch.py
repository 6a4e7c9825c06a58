"""Storage that doesn't answer under guests that run: told in words, once, and its end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrator.errors import StorageError
from migrator.model import DiskFormat, DiskSpec, DomainName, PoolName, VolumeName
from node_agent.storage_watch import AT_ONCE, StorageWatch
from storage.simulated import SimulatedPool
from tests.unit.agent_world import World, open_world, spec_of

WEB = DomainName("web")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as opened:
        await opened.a.domains.define(spec_of())
        await opened.a.domains.start(WEB)
        yield opened


def watch_of(world: World, clock: Clock) -> StorageWatch:
    node = world.a
    pools = {PoolName("default"): node.pool}
    return StorageWatch(
        node.name, hypervisor=node.hypervisor, pools=pools, events=node.events, clock=clock
    )


async def told(world: World) -> list[str]:
    found = await world.a.events.read()
    return [f"{each.kind}: {each.message}" for each in found if each.kind.startswith("pool-")]


async def test_a_pool_that_stays_away_is_told_and_shown_and_so_is_its_return(world: World) -> None:
    clock = Clock()
    watch = watch_of(world, clock)
    world.a.domains._storage = watch
    await watch.look()
    world.a.pool.faults.lost = True
    await watch.look()
    assert watch.remark(spec_of()) == "", "one look may be a hiccup"
    clock.now_s += 2
    await watch.look()
    await watch.look()
    clock.now_s += 38
    status = (await world.a.domains.statuses())[0]
    reason = "pool default hasn't answered for 40 s (pool default is lost)"
    assert (status.state, status.reason) == ("running", reason)
    assert (await world.a.domains.status(WEB)).reason == reason
    world.a.pool.faults.lost = False
    await watch.look()
    assert (await world.a.domains.status(WEB)).reason is None
    await world.a.events.close()
    assert await told(world) == [
        "pool-unreachable: pool default doesn't answer on a, and disks on it wait, of web: "
        "pool default is lost",
        "pool-reachable: pool default answers on a again, after 40 s",
    ]


async def test_a_hiccup_a_volume_that_is_gone_and_a_pool_that_nobody_uses_arent_told(
    world: World,
) -> None:
    watch = watch_of(world, Clock())
    world.a.pool.faults.lost = True
    await watch.look()
    world.a.pool.faults.lost = False
    await watch.look()
    world.volumes.volumes.clear()
    await watch.look()
    await watch.look()
    world.a.host.kill(WEB)
    world.a.pool.faults.lost = True
    await watch.look()
    await watch.look()
    await world.a.events.close()
    assert await told(world) == []


async def test_what_was_told_speaks_against_a_migration_while_it_is_so(world: World) -> None:
    """Such a guest can't be paused: each move of a drain would wait 20 s for that, twice."""
    watch = watch_of(world, Clock())
    world.a.domains._storage = watch
    world.a.pool.faults.lost = True
    await watch.look()
    assert await world.a.domains.storage_troubles(spec_of()) == [], "it may be a hiccup"
    await watch.look()
    assert await world.a.domains.storage_troubles(spec_of()) == [
        "pool default hasn't answered for 0 s (pool default is lost)"
    ]
    assert await world.a.domains.storage_troubles(spec_of("db", disks=[])) == []
    world.a.pool.faults.lost = False
    assert await world.a.domains.storage_troubles(spec_of()) == [], "it isn't so any more"


async def test_a_volume_that_is_away_by_itself_is_told_and_the_others_are_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export that is down, say. One volume of a pool was looked at: the others' guests waited,
    and looked well."""
    down: set[str] = set()

    async def reach(pool: SimulatedPool, volume: VolumeName) -> None:
        if volume in down:
            raise StorageError(f"the export of volume {volume} is down")
        await pool.verify(volume)

    monkeypatch.setattr(SimulatedPool, "reach", reach)
    node, clock = world.a, Clock()
    watch = watch_of(world, clock)
    names = [f"vm{number:02}" for number in range(AT_ONCE + 4)]
    specs = [spec_of(each, disks=(DiskSpec(volume=each),), nics=()) for each in names]
    for spec in specs:
        volume = VolumeName(spec.name)
        await node.pool.create(volume, capacity_bytes=2**20, format=DiskFormat.RAW)
        await node.domains.define(spec)
        await node.domains.start(DomainName(spec.name))
    down.add(names[-1])
    for _ in range(3):
        await watch.look()
    clock.now_s += 30
    reason = "the export of volume vm19 is down"
    said = f"volume default/vm19 hasn't answered for 30 s ({reason})"
    assert [watch.remark(spec) for spec in specs] == [*[""] * (AT_ONCE + 3), said]
    assert await watch.troubles(specs[-1]) == [said]
    down.update(names, [spec_of().disks[0].volume])
    await watch.look()
    await watch.look()
    assert watch.remark(specs[-1]).startswith("pool default hasn't answered for 0 s")
    down.clear()
    for _ in range(2):
        await watch.look()
    assert [watch.remark(spec) for spec in specs] == [""] * len(specs)
    await world.a.events.close()
    found = [line.split(",")[0] for line in await told(world)]
    assert found == [
        "pool-unreachable: volume default/vm19 doesn't answer on a",
        "pool-unreachable: pool default doesn't answer on a",
        "pool-reachable: pool default answers on a again",
        "pool-reachable: volume default/vm19 answers on a again",
    ]
