"""What is being done to volumes is seen by all agents, and what was cut short by the next one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrator.errors import ConflictError, FerryError, StoreError
from migrator.model import DiskFormat, DomainName, FencingToken, PoolName, VolumeInfo, VolumeName
from node_agent.resources import VolumeClone, VolumeCreate, VolumeResize
from node_agent.volume_works import TOOL_ENDS_S, VolumeWorks, Work
from storage.simulated import SimulatedPool
from tests.unit.agent_world import SimulatedNode, World, open_world, spec_of

WEB, DEFAULT = DomainName("web"), PoolName("default")
ROOT, NEW = VolumeName("root"), VolumeName("new")
MIB = 2**20
GROWN = VolumeResize(capacity_bytes=4 * MIB)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as opened:
        await opened.a.domains.define(spec_of())
        yield opened


async def cut_short(node: SimulatedNode, volume: VolumeName, work: Work) -> VolumeWorks:
    """An agent of the node is killed in the middle of it; the next one's."""
    agent = VolumeWorks(node.typed, node.name, node.pools)

    async def strike(_key: str, _revision: int) -> None: ...

    agent._strike = strike  # type: ignore[assignment, method-assign]  # SIGKILL: nothing is undone after it.
    async with agent.noted(DEFAULT, volume, work):
        pass
    return VolumeWorks(node.typed, node.name, node.pools)


async def remove_b(world: World) -> None:
    """As `ferry node rm` does, of a node whose agent has ended."""
    await world.b.registry.close()
    for key in ("nodes/b", "beats/b"):
        found = await world.a.store.get(key)
        assert found is not None
        assert await world.a.store.delete_if(key, found.revision)


async def test_a_start_on_another_node_sees_a_resize(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the storage has no locks, both wrote to the same image."""
    began, go = asyncio.Event(), asyncio.Event()
    resize = SimulatedPool.resize

    async def slow(pool: SimulatedPool, volume: VolumeName, capacity_bytes: int) -> VolumeInfo:
        began.set()
        await go.wait()
        return await resize(pool, volume, capacity_bytes)

    monkeypatch.setattr(SimulatedPool, "resize", slow)
    resizing = asyncio.create_task(world.a.cluster.volumes.resize(DEFAULT, ROOT, GROWN))
    await began.wait()
    with pytest.raises(ConflictError, match="volume default/root is being resized by node a"):
        await world.b.domains.start(WEB)
    with pytest.raises(ConflictError, match="is being resized by node a"):
        await world.b.cluster.volumes.resize(DEFAULT, ROOT, GROWN)
    go.set()
    assert (await resizing).capacity_bytes == 4 * MIB
    await world.b.domains.start(WEB)


async def test_a_resize_sees_a_start_on_another_node(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes right after its first look."""
    claim = world.a.pools.claim

    async def late(pool: PoolName) -> None:
        await world.b.domains.start(WEB)
        await claim(pool)

    with monkeypatch.context() as patch:
        patch.setattr(world.a.pools, "claim", late)
        with pytest.raises(ConflictError, match="which runs on b; it was not resized"):
            await world.a.cluster.volumes.resize(DEFAULT, ROOT, GROWN)
    await world.b.domains.stop(WEB, timeout_s=0)
    await world.a.cluster.volumes.resize(DEFAULT, ROOT, GROWN)


async def test_a_resize_that_was_cut_short_ends_with_its_program(world: World) -> None:
    after = await cut_short(world.a, ROOT, Work.RESIZING)
    await after.tidy_up(TOOL_ENDS_S - 1)
    with pytest.raises(ConflictError, match="counts as over 75 s after its agent is back"):
        await world.a.domains.start(WEB)
    await after.tidy_up(TOOL_ENDS_S)
    await world.a.domains.start(WEB)


async def test_that_of_a_node_that_was_removed_is_void(world: World) -> None:
    await cut_short(world.b, ROOT, Work.RESIZING)
    with pytest.raises(ConflictError):
        await world.a.domains.start(WEB)
    await remove_b(world)
    await world.a.domains.start(WEB)


async def test_what_it_had_open_keeps_nobody_from_deleting_a_volume(world: World) -> None:
    volumes = world.a.cluster.volumes
    await volumes.create(DEFAULT, VolumeCreate(name=NEW, capacity_bytes=MIB))
    await world.b.pool.open(NEW, FencingToken(5), read_only=True)
    with pytest.raises(ConflictError, match="volume new is open"):
        await volumes.delete(DEFAULT, NEW)
    await remove_b(world)
    await volumes.delete(DEFAULT, NEW)


async def test_what_is_half_made_is_used_by_nobody_until_it_is_deleted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LUN whose image was copied half when its agent was killed looked like any other."""
    monkeypatch.setattr(SimulatedPool, "makes_at_once", False)
    volumes = world.a.cluster.volumes
    after = await cut_short(world.a, NEW, Work.MAKING)
    await world.a.pool.create(NEW, capacity_bytes=MIB, format=DiskFormat.RAW)
    await after.tidy_up(0)
    spec = spec_of("db", disks=[{"volume": "new"}], nics=())
    await world.a.domains.define(spec)
    words = (
        "volume default/new may be half made: the agent of a ended while it was made; delete it "
        r"\(`ferry volume rm new --pool default`\)"
    )
    with pytest.raises(ConflictError, match=words):
        await world.b.domains.start(DomainName("db"))
    with pytest.raises(ConflictError, match=words):
        await volumes.clone(DEFAULT, NEW, VolumeClone(name="copy"))
    with pytest.raises(ConflictError, match=words):
        await volumes.create(DEFAULT, VolumeCreate(name=NEW, capacity_bytes=MIB))
    await world.a.domains.delete(DomainName("db"))
    await volumes.delete(DEFAULT, NEW)
    await volumes.create(DEFAULT, VolumeCreate(name=NEW, capacity_bytes=MIB))
    await world.a.domains.define(spec)
    await world.b.domains.start(DomainName("db"))


async def test_where_nothing_half_made_shows_no_note_stays(world: World) -> None:
    after = await cut_short(world.a, NEW, Work.MAKING)
    await after.tidy_up(0)
    await world.a.cluster.volumes.create(DEFAULT, VolumeCreate(name=NEW, capacity_bytes=MIB))


async def test_a_note_that_could_not_be_struck_is_struck_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes, works = world.a.cluster.volumes, world.a.works

    async def refuse(*_: object) -> bool:
        raise StoreError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(world.a.typed, "delete_if", refuse)
        await volumes.resize(DEFAULT, ROOT, GROWN)
    with pytest.raises(FerryError):
        await world.b.domains.start(WEB)
    await works.tidy_up(0)
    await world.b.domains.start(WEB)
