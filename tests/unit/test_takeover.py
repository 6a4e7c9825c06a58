"""A silent node's domain, taken over behind a fence; a node that comes back ends its stale copy."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from hypervisor.simulated.driver import SimulatedHypervisor
from migrator.errors import (
    ConflictError,
    FenceError,
    NotFoundError,
    RefusedError,
    StorageError,
    StoreError,
)
from migrator.model import (
    DomainName,
    DomainState,
    DomainStatus,
    FencingToken,
    NodeName,
    OwnershipRecord,
    OwnershipState,
    VolumeName,
)
from migrator.ports import Launch
from node_agent.domain_ownership import DomainOwnership
from node_agent.domain_records import DomainRecords
from node_agent.events import EventKind
from node_agent.state.ownership import ownership_key
from storage.simulated import SimulatedPool
from tests.unit.agent_world import SimulatedNode, World, open_world, spec_of
from tests.unit.node_life import eventually

WEB = DomainName("web")
ROOT = VolumeName("root")
A = NodeName("a")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """`web` runs on `a`, whose agent is silent then; its process lives on."""
    async with open_world(tmp_path) as opened:
        await opened.a.domains.define(spec_of())
        await opened.a.domains.start(WEB)
        yield opened


async def silence(world: World) -> None:
    """`a` says nothing any more, and neither reads nor writes the store."""
    await world.a.domains.close()
    await world.a.registry.close()
    world.a.store.faults.unavailable = True
    world.b.registry._unreachable_after_s = -1.0  # However young its last word is.


async def owner(node: SimulatedNode) -> tuple[int, str, OwnershipState]:
    record = await node.ownership.read(WEB)
    assert record is not None
    return record.token, record.owner, record.state


async def state(node: SimulatedNode) -> DomainState:
    return (await node.domains.status(WEB)).state


async def test_a_silent_nodes_domain_starts_from_disk_behind_a_fence(world: World) -> None:
    await silence(world)
    record = await world.b.takeover.take_over(WEB)
    assert (record.token, record.owner) == (3, "b")
    assert await state(world.b) is DomainState.RUNNING
    assert await world.b.pool.verify(ROOT) == 3
    with pytest.raises(StorageError):
        world.a.pool.write(ROOT, FencingToken(1))
    assert not world.volumes.stale_writes()


async def test_the_record_is_won_and_the_fence_confirmed_before_it_starts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await silence(world)
    seen: list[object] = []
    start = SimulatedHypervisor.start

    async def spy(driver: SimulatedHypervisor, launch: Launch) -> None:
        seen.extend([await owner(world.b), await world.b.pool.verify(ROOT)])
        await start(driver, launch)

    monkeypatch.setattr(SimulatedHypervisor, "start", spy)
    await world.b.takeover.take_over(WEB)
    assert seen == [(3, "b", OwnershipState.RUNNING), 3]


async def test_a_storage_that_cannot_fence_refuses_and_says_so(world: World) -> None:
    world.volumes.enforces = False
    await silence(world)
    await world.a.hub.close()
    with pytest.raises(RefusedError, match=r"can't shut a out of volume root.*--powered-off a`"):
        await world.b.takeover.take_over(WEB)
    assert await owner(world.b) == (1, "a", OwnershipState.RUNNING)
    with pytest.raises(RefusedError, match="its node is a, not b"):
        await world.b.takeover.take_over(WEB, NodeName("b"))
    record = await world.b.takeover.take_over(WEB, A, user="eve")
    assert (record.token, record.owner) == (3, "b")
    (noted,) = (await world.b.records.get(WEB)).history
    assert noted.user == "eve"
    assert "no fence: eve vouched that a is powered off" in noted.text
    shown = await world.b.cluster.get_domain(WEB)
    assert shown.history == (noted,)


async def test_nobody_s_word_is_taken_against_what_can_be_known(world: World) -> None:
    """The fence works, or the node speaks: by its heartbeat, or when it is called."""
    with pytest.raises(RefusedError) as refused:
        await world.b.takeover.take_over(WEB, A, user="eve")
    speaks, fenced = refused.value.reasons
    assert "its node a is ready: stop or migrate it (its last heartbeat is" in speaks
    assert "its storage can shut a out, and does: nobody's word is needed" in fenced
    await silence(world)
    with pytest.raises(RefusedError, match="nobody's word is needed"):
        await world.b.takeover.take_over(WEB, A)
    world.volumes.enforces = False
    # Its agent lives, though it can't write its heartbeat.
    with pytest.raises(RefusedError, match="a is not powered off: its agent answers"):
        await world.b.takeover.take_over(WEB, A)
    assert await owner(world.b) == (1, "a", OwnershipState.RUNNING)
    assert (await world.b.records.get(WEB)).history == ()
    await world.a.hub.close()
    assert (await world.b.takeover.take_over(WEB, A)).owner == "b"


async def test_a_word_that_can_t_be_written_down_is_no_word(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.volumes.enforces = False
    await silence(world)
    await world.a.hub.close()

    async def unavailable(*_: object, **__: object) -> None:
        raise StoreError("the store is away")

    monkeypatch.setattr(DomainRecords, "note", unavailable)
    with pytest.raises(StoreError):
        await world.b.takeover.take_over(WEB, A, user="eve")
    assert await owner(world.b) == (1, "a", OwnershipState.RUNNING)
    assert await state(world.b) is DomainState.STOPPED


async def test_a_domain_without_a_volume_is_refused(world: World) -> None:
    nics = [{"mac": "52:54:00:00:00:02", "bridge": "br0"}]
    await world.a.domains.define(spec_of("bare", disks=[], nics=nics))
    await world.a.domains.start(DomainName("bare"))
    await silence(world)
    with pytest.raises(RefusedError, match="no volume to shut a out of"):
        await world.b.takeover.take_over(DomainName("bare"))


async def test_all_reasons_at_once(world: World) -> None:
    world.volumes.enforces = False
    with pytest.raises(RefusedError) as refused:
        await world.b.takeover.take_over(WEB)
    alive, unfenced = refused.value.reasons
    assert "its node a is ready: stop or migrate it" in alive
    assert "pool default (simulated) can't" in unfenced
    with pytest.raises(RefusedError, match="it is a's own"):
        await world.a.takeover.take_over(WEB)
    await world.a.domains.stop(WEB)
    with pytest.raises(RefusedError, match="it doesn't run: start it"):
        await world.b.takeover.take_over(WEB)
    with pytest.raises(NotFoundError):
        await world.b.takeover.take_over(DomainName("nobody"))


async def test_an_unconfirmed_fence_starts_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def accepts(_pool: SimulatedPool, _volume: VolumeName, _token: FencingToken) -> None:
        """Says that it fenced, and didn't."""

    await silence(world)
    monkeypatch.setattr(SimulatedPool, "fence", accepts)
    with pytest.raises(FenceError, match="token 1 fenced it last, not 3"):
        await world.b.takeover.take_over(WEB)
    assert await state(world.b) is DomainState.STOPPED
    assert await owner(world.b) == (3, "b", OwnershipState.STOPPED)


async def test_of_two_takeovers_one_wins(world: World) -> None:
    await silence(world)
    await world.b.takeover.take_over(WEB)
    with pytest.raises(RefusedError, match="it is b's own"):
        await world.b.takeover.take_over(WEB)
    assert await owner(world.b) == (3, "b", OwnershipState.RUNNING)


async def test_by_the_cluster_from_any_node(world: World) -> None:
    await silence(world)
    domain = await world.b.cluster.take_over(WEB, NodeName("b"))
    assert domain.node == "b"
    with pytest.raises(NotFoundError, match="there is no node c"):
        await world.b.cluster.take_over(WEB, NodeName("c"))


# --- the node that comes back ---


def ownership_of(node: SimulatedNode) -> DomainOwnership:
    """A node's ownership code anew, as after a restart, with a quick sweep."""
    ownership = node.domains.ownership
    ownership._sweep_s = 0.02
    return ownership


async def test_a_node_that_comes_back_after_a_partition_ends_its_stale_copy(world: World) -> None:
    await silence(world)
    await world.b.takeover.take_over(WEB)
    assert await state(world.a) is DomainState.RUNNING
    ownership = ownership_of(world.a)
    await ownership.open()
    with pytest.raises(StoreError):
        await ownership._sweep_once()
    assert await state(world.a) is DomainState.RUNNING
    world.a.store.faults.unavailable = False

    async def ended() -> bool:
        return await state(world.a) is DomainState.STOPPED

    await eventually(ended)
    assert await state(world.b) is DomainState.RUNNING
    assert await owner(world.b) == (3, "b", OwnershipState.RUNNING)

    async def told() -> bool:
        events = await world.b.events.read(limit=50)
        return any(event.kind == EventKind.DOMAIN_DESTROYED for event in events)

    await eventually(told)  # When all of it is closed.
    assert not world.a.fabric.plugged


async def test_a_driver_s_bug_doesn_t_end_the_looking_after_stale_copies(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await silence(world)
    await world.b.takeover.take_over(WEB)
    world.a.store.faults.unavailable = False
    hypervisor, failures = world.a.hypervisor, iter([OSError(errno.EROFS, "read-only")])
    destroy, list_domains = hypervisor.destroy, hypervisor.list_domains
    lists = iter([ValueError("a bug")])

    async def fail_first(domain: DomainName) -> None:
        for failure in failures:
            raise failure
        await destroy(domain)

    async def fail_to_list() -> Sequence[DomainStatus]:
        for failure in lists:
            raise failure
        return await list_domains()

    monkeypatch.setattr(hypervisor, "destroy", fail_first)
    monkeypatch.setattr(hypervisor, "list_domains", fail_to_list)
    await ownership_of(world.a).open()

    async def ended() -> bool:
        return await state(world.a) is DomainState.STOPPED

    await eventually(ended)


async def test_a_node_that_reboots_into_another_owner_ends_its_stale_copy_first(
    world: World,
) -> None:
    await silence(world)
    await world.b.takeover.take_over(WEB)
    world.a.store.faults.unavailable = False
    await world.a.domains.ownership.reconcile([WEB])
    assert await state(world.a) is DomainState.STOPPED


@pytest.mark.parametrize("stopped", [False, True])
async def test_a_start_ends_a_stale_copy_before_it_takes_the_record(
    world: World, stopped: bool
) -> None:
    """Also if the agent dies right after: the stale copy must not be taken for the domain."""
    await silence(world)
    await world.b.takeover.take_over(WEB)
    if stopped:
        await world.b.domains.stop(WEB)
    world.a.store.faults.unavailable = False
    stale = (await world.a.domains.status(WEB)).pid
    if stopped:
        await world.a.domains.start(WEB)
        assert (await world.a.domains.status(WEB)).pid not in (None, stale)
    else:
        with pytest.raises(ConflictError, match="runs on b"):
            await world.a.domains.start(WEB)
    assert not world.volumes.stale_writes()


@pytest.mark.parametrize("theirs", [OwnershipState.RUNNING, OwnershipState.STOPPED])
async def test_a_guest_that_is_newer_than_the_store_is_left_as_it_is(
    world: World, theirs: OwnershipState
) -> None:
    """The store was restored from a backup, or is another cluster's with a domain of the name."""
    await world.a.domains.stop(WEB)
    await world.a.domains.start(WEB)
    assert await world.a.hypervisor.launched_token(WEB) == 2
    older = OwnershipRecord(domain=WEB, token=1, owner="b", state=theirs)
    await world.a.typed.put(ownership_key(WEB), older)
    ownership = world.a.domains.ownership
    await ownership.reconcile([WEB])
    await ownership._sweep_once()
    assert await state(world.a) is DomainState.RUNNING
    expected = "runs on b" if theirs is OwnershipState.RUNNING else "the guest is left as it is"
    with pytest.raises(ConflictError, match=expected):
        await world.a.domains.start(WEB)
    assert await state(world.a) is DomainState.RUNNING

    async def told() -> bool:
        return any(each.kind == EventKind.STORE_BEHIND for each in await world.a.events.read())

    await eventually(told)
    events = [each for each in await world.a.events.read() if each.kind == EventKind.STORE_BEHIND]
    assert len(events) == 1
    assert events[0].message.startswith(
        "domain web runs on a under token 2, and the store knows it under 1, of b: the store was"
    )
    assert not [e for e in await world.a.events.read() if e.kind == EventKind.DOMAIN_DESTROYED]


@pytest.mark.parametrize("restarted", [False, True])
async def test_stale_copies_end_at_once_though_their_storage_hangs(
    world: World, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    """Each close may take what a hung server takes; the last copy would live on for minutes."""
    names = [DomainName(name) for name in ("db", "mail", "web")]
    for name in names[:2]:
        await world.a.domains.define(spec_of(name, disks=[], nics=[]))
        await world.a.domains.start(name)
    for name in names:
        there = OwnershipRecord(domain=name, token=3, owner="b", state=OwnershipState.RUNNING)
        await world.b.typed.put(ownership_key(name), there)
    hangs = asyncio.Event()
    launches = world.a.domains.ownership._launches

    async def hang(*_: object) -> None:
        await hangs.wait()

    monkeypatch.setattr(launches, "tear_down", hang)
    ownership = world.a.domains.ownership
    ending = asyncio.create_task(
        ownership.reconcile(names) if restarted else ownership._sweep_once()
    )

    async def ended() -> bool:
        return not world.a.host.guests

    await eventually(ended)
    assert not ending.done()
    hangs.set()
    await ending
