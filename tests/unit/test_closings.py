"""Which volumes a node closes, and when: those that another domain uses later, and none never."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import Mock

import msgspec
import pytest

from migrator.model import (
    DiskFormat,
    DiskSpec,
    DomainName,
    DomainSpec,
    FencingToken,
    NodeName,
    PoolName,
    VolumeName,
)
from migrator.ports import VolumeDriver
from node_agent.closings import Closings, Left
from node_agent.domains import DomainService
from node_agent.state_file import StateFile
from tests.unit.agent_world import World, open_world, spec_of
from tests.unit.node_life import eventually

DEFAULT, ISO = PoolName("default"), VolumeName("iso")
A = NodeName("a")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as opened:
        await opened.a.pool.create(ISO, capacity_bytes=2**20, format=DiskFormat.RAW)
        yield opened


def reader(name: str) -> DomainSpec:
    return spec_of(name, disks=(DiskSpec(volume=ISO, read_only=True),), nics=())


def opened_on_a(world: World) -> set[int]:
    """The tokens under which the node has the volume open."""
    return {token for node, token in world.volumes.volumes[ISO].opened if node == A}


def closings_of(world: World, path: Path) -> Closings:
    """As an agent of node a has them, with a file."""
    node = world.a
    return Closings(node.pools, node.hypervisor.launched_all, file=StateFile(path))


async def started(domains: DomainService, *names: str) -> None:
    for name in names:
        await domains.define(reader(name))
        await domains.start(DomainName(name))


async def test_who_stops_takes_no_disk_from_who_reads_it_too(world: World) -> None:
    """The exports of a node's readers are known by their tokens alone: on an NBD pool the other
    domain's disk was gone, and it stood still, or saw errors."""
    domains = world.a.domains
    await started(domains, "one", "two")
    await domains.stop(DomainName("one"), timeout_s=0)
    await domains.start(DomainName("one"))
    tokens = opened_on_a(world)
    assert len(tokens) == 2, "the two have different ones"
    await domains.stop(DomainName("one"), timeout_s=0)
    assert opened_on_a(world) == tokens
    await domains.stop(DomainName("two"), timeout_s=0)
    assert opened_on_a(world) == set(), "what the first one left is closed with the last"


async def test_one_that_was_away_is_closed_when_it_is_back(world: World, tmp_path: Path) -> None:
    node, path = world.a, tmp_path / "closings.json"
    await node.pool.open(ISO, FencingToken(7), read_only=False)
    closings = closings_of(world, path)
    node.pool.faults.lost = True
    await closings.let_go("web", DEFAULT, ISO, 7)
    await closings.retry()
    left = [Left(pool="default", volume="iso", token=7)]
    assert (closings.left, opened_on_a(world)) == (left, {7})
    after = closings_of(world, path)  # Another agent.
    await after.open()
    await after.close()
    assert after.left == left
    node.pool.faults.lost = False
    await after.retry()
    assert (after.left, opened_on_a(world)) == ([], set())
    assert msgspec.json.decode(path.read_bytes()) == []


async def test_what_is_open_anew_is_not_closed_for_what_was(world: World, tmp_path: Path) -> None:
    """A migration that is begun again opens it under the token that it had before."""
    node = world.a
    closings = closings_of(world, tmp_path / "closings.json")
    node.pool.faults.lost = True
    await closings.let_go("web", DEFAULT, ISO, 1)
    node.pool.faults.lost = False
    spec = reader("web")
    closings.begin(spec)
    await node.pool.open(ISO, FencingToken(1), read_only=True)
    await closings.retry()
    assert opened_on_a(world) == {1}, "it is about to be launched"
    await started(node.domains, "web")
    closings.end(spec)
    await closings.retry()
    assert opened_on_a(world) == {1}, "it runs"
    await node.domains.stop(DomainName("web"), timeout_s=0)
    await closings.retry()
    assert (closings.left, opened_on_a(world)) == ([], set())


async def test_a_file_that_is_none_and_a_pool_that_is_gone_do_no_harm(
    world: World, tmp_path: Path
) -> None:
    path = tmp_path / "closings.json"
    path.write_text("{")
    closings = closings_of(world, path)
    await closings.open()
    await closings.close()
    await closings.let_go("web", PoolName("gone"), ISO, 3)
    await closings.retry()
    assert closings.left == [Left(pool="gone", volume="iso", token=3)]


async def test_what_is_noted_while_others_are_closed_stays_noted(
    world: World, tmp_path: Path
) -> None:
    """All that a retry has closed is struck at its end: when its slowest pool has answered."""
    node, path, slow = world.a, tmp_path / "closings.json", PoolName("slow")
    asked, answer = asyncio.Event(), asyncio.Event()

    async def close(_volume: VolumeName, _token: FencingToken) -> None:
        asked.set()
        await answer.wait()

    async def closed() -> bool:
        return not opened_on_a(world)

    pools: dict[PoolName, VolumeDriver] = {DEFAULT: node.pool}
    pools[slow] = Mock(spec=VolumeDriver, close=close)
    left = [Left(pool="default", volume="iso", token=7), Left(pool="slow", volume="iso", token=1)]
    path.write_bytes(msgspec.json.encode(left))
    closings = Closings(pools, node.hypervisor.launched_all, file=StateFile(path))
    await closings.open()
    await node.pool.open(ISO, FencingToken(7), read_only=False)
    retry = asyncio.create_task(closings.retry())
    await asyncio.wait_for(asked.wait(), 5.0)
    await eventually(closed)
    await node.pool.open(ISO, FencingToken(9), read_only=False)
    node.pool.faults.lost = True
    await closings.let_go("web", DEFAULT, ISO, 9)
    node.pool.faults.lost = False
    answer.set()
    await retry
    assert closings.left == [Left(pool="default", volume="iso", token=9)]
    await closings.retry()
    assert (closings.left, opened_on_a(world)) == ([], set())
    await closings.close()
