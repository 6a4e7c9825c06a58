"""Two clusters that have one place for their pools: the second is refused, and harms nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from migrator.errors import ConflictError, StorageError
from migrator.model import DomainName, FencingToken, NodeName, PoolName, VolumeName
from node_agent.cli.errors import ExitCode
from node_agent.events import EventKind
from node_agent.pools import PoolSet
from node_agent.state.memory import SimulatedStore
from node_agent.state.typed import TypedStore
from storage.settings import SimulatedSettings
from storage.simulated import SharedVolumes, SimulatedPool
from tests.unit.agent_world import World, spec_of
from tests.unit.api_client import SPEC, Client, ask
from tests.unit.ferry_command import Ferry

pytestmark = pytest.mark.allow_blocking("the CLI is synchronous; it runs in a thread")

ROOT = VolumeName("root")
DEFAULT = PoolName("default")


@asynccontextmanager
async def another_cluster(volumes: SharedVolumes) -> AsyncIterator[PoolSet]:
    """Its node has the name of one of ours, and the pool is the same place."""
    store = SimulatedStore()
    await store.open()
    pools = PoolSet(
        [SimulatedSettings(name="default")],
        lambda settings: SimulatedPool(PoolName(settings.name), volumes, NodeName("a")),
        TypedStore(store),
        "a",
    )
    await pools.open()
    try:
        yield pools
    finally:
        await pools.close()
        await store.close()


async def test_another_clusters_pool_is_left_as_it_is(client: Client, world: World) -> None:
    """Also what its own node of the same name has open there."""
    await ask(client, "POST", "/v1/domains", SPEC, status=201)
    async with another_cluster(world.volumes) as other:
        await other.claim(DEFAULT)
        await other[DEFAULT].open(ROOT, FencingToken(1), read_only=False)
        await other[DEFAULT].fence(ROOT, FencingToken(1))
        before = world.volumes.volumes[ROOT].info
        volumes = "/v1/pools/default/volumes"
        for method, path, body in (
            ("POST", volumes, {"name": "v", "capacity_bytes": 4096}),
            ("POST", f"{volumes}/root/resize", {"capacity_bytes": 2 * 1024**2}),
            ("POST", f"{volumes}/root/clone", {"name": "copy"}),
            ("POST", "/v1/domains/web/start", {"node": "a"}),
        ):
            problem = await ask(client, method, path, body, status=409)
            assert "belongs to another cluster (without a name, identity" in problem["detail"]
        await ask(client, "DELETE", "/v1/domains/web", status=204)
        problem = await ask(client, "DELETE", f"{volumes}/root", status=409)
        assert "ferry pool takeover default --from" in problem["detail"]
        with pytest.raises(ConflictError, match="belongs to another cluster"):
            await world.a.domains.build_launch(spec_of(), FencingToken(9))
        await world.a.domains.tear_down(spec_of(), FencingToken(9))
        volume = world.volumes.volumes[ROOT]
        assert (volume.info, volume.newest) == (before, 1)
        assert volume.opened == {("a", 1)}
        assert await world.a.ownership.read(DomainName("web")) is None
        assert list(world.volumes.volumes) == [ROOT]
        shown = await ask(client, "GET", "/v1/pools/default", status=200)
        assert shown["health"]["reachable"] and "belongs to another cluster" in shown["refused"]
        await other.claim(DEFAULT)


async def test_a_pool_is_taken_over_by_name_and_the_other_is_refused_then(
    ferry: Ferry, world: World
) -> None:
    async with another_cluster(world.volumes) as other:
        await other.claim(DEFAULT)
        owner = world.volumes.owner
        assert owner is not None
        assert " refused " in (await ferry("pool", "ls")).out
        assert f"--from {owner.identity}" in (await ferry("pool", "show", "default")).out
        wrong = await ferry("pool", "takeover", "default", "--from", "x", code=ExitCode.REFUSED)
        assert f"--from {owner.identity}" in wrong.err and world.volumes.owner == owner
        done = await ferry("pool", "takeover", "default", "--from", owner.identity)
        assert done.out == "pool default is this cluster's\n"
        for identity in (owner.identity, "x"):  # Of one that is ours it is of no account.
            done = await ferry("pool", "takeover", "default", "--from", identity)
            assert done.out == "pool default was this cluster's already; nothing was done\n"
        assert " ok " in (await ferry("pool", "ls")).out
        await ferry("volume", "create", "v", "--size", "1M")
        with pytest.raises(ConflictError, match="belongs to another cluster"):
            await other.claim(DEFAULT)
    taken = [e for e in await world.a.events.read() if e.kind == EventKind.POOL_TAKEN_OVER]
    assert len(taken) == 1 and owner.identity in taken[0].message


async def test_a_new_pool_of_another_cluster_is_added_only_if_it_is_said(
    client: Client, world: World
) -> None:
    world.shared_volumes["fast"] = SharedVolumes()
    fast = {"name": "fast", "driver": "simulated"}
    async with another_cluster(world.shared_volumes["fast"]) as other:
        await other.claim(DEFAULT)
        owner = world.shared_volumes["fast"].owner
        assert owner is not None
        for query in ("", "?from=x"):
            problem = await ask(client, "POST", f"/v1/pools{query}", fast, status=409)
            assert f"`ferry pool add fast ... --from {owner.identity}`" in problem["detail"]
        await ask(client, "GET", "/v1/pools/fast", status=404)
        await ask(client, "POST", f"/v1/pools?from={owner.identity}", fast, status=201)
        with pytest.raises(ConflictError):
            await other.claim(DEFAULT)
    world.shared_volumes["plain"] = SharedVolumes()
    plain = {"name": "plain", "driver": "simulated"}
    await ask(client, "POST", f"/v1/pools?from={owner.identity}", plain, status=201)
    added = [e.message for e in await world.a.events.read() if e.kind == EventKind.POOL_ADDED]
    assert ["another cluster's" in text for text in added] == [True, False]


async def test_a_pool_that_is_nobodys_becomes_the_first_ones_who_uses_it(
    client: Client, world: World
) -> None:
    """To look at it changes nothing. All nodes of a cluster are one, also after a restart."""
    await ask(client, "GET", "/v1/pools/default", status=200)
    assert world.volumes.owner is None
    await world.b.pools.claim(DEFAULT)
    owner = world.volumes.owner
    assert owner is not None and owner.node == "b"
    await ask(client, "POST", "/v1/domains", SPEC, status=201)
    await ask(client, "POST", "/v1/domains/web/start", {"node": "a"}, status=200)
    restarted = PoolSet([SimulatedSettings(name="default")], world.a._make_pool, world.a.typed, "a")
    await restarted.open()
    await restarted.claim(DEFAULT)
    await restarted.close()
    assert world.volumes.owner == owner


async def test_a_storage_that_doesnt_say_whose_it_is_is_told_as_that(world: World) -> None:
    world.a.pool.faults.lost = True
    with pytest.raises(StorageError, match="is lost"):
        await world.a.pools.claim(DEFAULT)
