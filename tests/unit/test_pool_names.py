"""Two pools of one place: `pool add` refuses it, and an agent.toml can have it all the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrator.errors import ConflictError
from migrator.model import DiskSpec, NodeName, PoolName, VolumeName
from migrator.ports import VolumeDriver
from node_agent.doctor.examination import _pools
from node_agent.domain_records import DomainRecords
from node_agent.pools import PoolSet
from node_agent.resources import DomainRecord, PoolList
from node_agent.volume_works import VolumeWorks
from node_agent.volumes import VolumeService
from storage.settings import DirectorySettings, PoolSettings
from storage.simulated import SharedVolumes, SimulatedPool
from tests.unit.agent_world import World, open_world, spec_of

FAST, OTHER, QUICK = PoolName("fast"), PoolName("other"), PoolName("quick")
WEB = VolumeName("web")
A = NodeName("a")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as opened:
        yield opened


def pools_of(world: World, **paths: str) -> PoolSet:
    """An agent's with a configuration of directories; volumes are in memory, by path."""
    places = {path: SharedVolumes() for path in paths.values()}

    def make(settings: PoolSettings) -> VolumeDriver:
        assert isinstance(settings, DirectorySettings)
        return SimulatedPool(PoolName(settings.name), places[settings.path], A)

    settings = [DirectorySettings(name=name, path=path) for name, path in paths.items()]
    return PoolSet(settings, make, world.a.typed, "a")


def record(name: str, *disks: DiskSpec) -> DomainRecord:
    return DomainRecord(spec=spec_of(name, disks=disks, nics=()), defined_at_s=1.0)


def disk(pool: PoolName, *, read_only: bool = False) -> DiskSpec:
    return DiskSpec(volume=WEB, pool=pool, read_only=read_only)


async def test_a_volume_is_one_domain_s_by_whichever_name(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Each could be started, and each start cut the other one off from the disk."""
    pools = pools_of(world, fast="/srv/a", other="/srv/b", quick="/srv/a")
    assert "pool quick is the place of pool fast under a second name" in caplog.text
    records = DomainRecords(world.a.typed, pools.first_name)
    await records.add(record("one", disk(QUICK)))
    words = r"volume fast/web \(pool quick is the same place\) belongs to domain one"
    with pytest.raises(ConflictError, match=words):
        await records.add(record("two", disk(FAST)))
    with pytest.raises(ConflictError, match="two of its disks are one volume"):
        await records.add(record("three", disk(FAST, read_only=True), disk(QUICK, read_only=True)))
    await records.add(record("four", disk(OTHER)))


async def test_a_volume_in_use_is_in_use_by_whichever_name(world: World) -> None:
    pools = pools_of(world, fast="/srv/a", quick="/srv/a")
    records = DomainRecords(world.a.typed, pools.first_name)
    works = VolumeWorks(world.a.typed, A, pools)
    volumes = VolumeService(pools, records, world.a.events, works, world.a.registry.names)
    await records.add(record("one", disk(QUICK)))
    with pytest.raises(ConflictError, match="volume fast/web is a disk of domain one"):
        await volumes.delete(FAST, WEB)
    shown = PoolList(pools=tuple(await volumes.list_pools()))
    assert [each.same_as for each in shown.pools] == ["", "fast"]

    class Client:
        def get(self, *_: object) -> PoolList:
            return shown

    findings = list(_pools(Client(), running=True))  # type: ignore[arg-type]
    assert [(each.check, str(each.level)) for each in findings][1] == ("pool quick", "warning")
    assert "the place of pool fast under a second name" in findings[1].detail


async def test_two_ways_to_one_place_are_known_once_both_were_used(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By two mounts of one share, say."""

    async def mark(pool: SimulatedPool) -> str:
        return "4711" if pool.pool in (FAST, QUICK) else "4712"

    monkeypatch.setattr(SimulatedPool, "mark", mark)
    pools = pools_of(world, fast="/srv/a", other="/srv/b", quick="/srv/c")
    await pools.open()
    assert [pools.first_name(each) for each in (FAST, OTHER, QUICK)] == [FAST, OTHER, QUICK]
    for each in (FAST, OTHER, QUICK):
        await pools.claim(each)
    assert [pools.first_name(each) for each in (FAST, OTHER, QUICK)] == [FAST, OTHER, FAST]
    assert pools.first_name(PoolName("none")) == "none"
    await pools.close()
