"""A real etcd of three members that are killed, frozen and brought back under the store."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import pytest

from migrator.errors import StoreError
from migrator.model import DomainName, NodeName, OwnershipRecord, OwnershipState
from node_agent.state.etcd import EtcdSettings, EtcdStore
from node_agent.state.ownership import StoreOwnership
from node_agent.state.port import Entry, Swap
from tests.contract.etcd_members import EtcdMember, running_members

PATIENCE_S = 60.0
T = TypeVar("T")


async def patiently(work: Callable[[], Awaitable[T]]) -> T:
    """Do it, however long an election takes."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await work()
            except StoreError:
                continue


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[EtcdMember]]:
    with running_members(3) as members:
        yield members


@pytest.fixture
async def members(cluster: list[EtcdMember]) -> AsyncIterator[list[EtcdMember]]:
    """All three, running; whoever was killed is back for the next test."""
    yield cluster
    for member in cluster:
        if member.process is None:
            member.start()
        else:
            member.thaw()
    for member in cluster:
        await asyncio.to_thread(member.wait_ready)


@pytest.fixture
async def store(members: list[EtcdMember]) -> AsyncIterator[EtcdStore]:
    settings = EtcdSettings(
        endpoints=tuple(member.endpoint for member in members), prefix=f"/{uuid.uuid4().hex}/"
    )
    store = EtcdStore(settings)
    await patiently(store.open)  # The last test's members may still be electing.
    yield store
    await store.close()


async def test_any_one_member_may_die(store: EtcdStore, members: list[EtcdMember]) -> None:
    changes = store.watch("d/")
    for number, member in enumerate(members):
        await patiently(partial(store.put, "d/a", b"before %d" % number))
        await asyncio.to_thread(member.kill)
        await patiently(partial(store.put, "d/a", b"without %s" % member.name.encode()))
        entry = await store.get("d/a")
        assert entry is not None and entry.value == b"without %s" % member.name.encode()
        member.start()
        await asyncio.to_thread(member.wait_ready)
    await patiently(partial(store.put, "d/end", b""))
    seen: list[bytes | None] = []
    async with asyncio.timeout(PATIENCE_S):
        while not seen or seen[-1] != b"":
            seen.append((await anext(changes)).value)
    wanted = [
        value
        for number, member in enumerate(members)
        for value in (b"before %d" % number, b"without %s" % member.name.encode())
    ]
    # A write whose outcome is unknown is repeated, and may have been carried out before.
    assert [value for value, _ in itertools.groupby(seen)] == [*wanted, b""]


async def test_a_frozen_member_is_left_for_the_next(
    store: EtcdStore, members: list[EtcdMember]
) -> None:
    await store.put("d/a", b"1")
    members[0].freeze()  # The one that is asked first.
    await patiently(partial(store.put, "d/a", b"2"))
    entry = await store.get("d/a")
    assert entry is not None and entry.value == b"2"


async def test_without_a_majority_nothing_passes_and_it_says_why(
    members: list[EtcdMember], store: EtcdStore, caplog: pytest.LogCaptureFixture
) -> None:
    ownership = StoreOwnership(store)
    before = OwnershipRecord(domain="web", token=1, owner="n1", state=OwnershipState.RUNNING)
    assert await ownership.compare_and_set(None, before)
    for member in members[:2]:
        await asyncio.to_thread(member.kill)
    with pytest.raises(
        StoreError, match=f"{members[0].endpoint[1]}: .*(refused|failed to connect)"
    ):
        await ownership.compare_and_set(before, before.passed_to(NodeName("n2")))
    members[0].start()
    await asyncio.to_thread(members[0].wait_ready)
    record = await patiently(lambda: ownership.read(DomainName("web")))
    # The write that found no majority may have been carried out now: it said so.
    assert record in (before, before.passed_to(NodeName("n2")))
    await store.get("ownership/web")
    told = [each.message for each in caplog.records if "answers again, after" in each.message]
    assert len(told) == 1, told


async def test_no_write_is_lost_or_doubled_while_members_die(
    members: list[EtcdMember], store: EtcdStore
) -> None:
    """Two counters that count by compare-and-set; an unknown outcome may count once, or not."""
    certain, unknown = 0, 0
    killing = asyncio.create_task(_kill_in_turn(members))
    try:
        while not killing.done():
            try:
                entry = await store.get("counter")
                value = 0 if entry is None else int(entry.value)
                written = await store.put_if(
                    "counter", b"%d" % (value + 1), None if entry is None else entry.revision
                )
            except StoreError as error:
                unknown += "unknown" in str(error)
                continue
            assert written is not None, "nobody else counts"
            certain += 1
    finally:
        killing.cancel()
    await asyncio.gather(killing, return_exceptions=True)
    final = await patiently(lambda: store.get("counter"))
    assert final is not None
    assert certain <= int(final.value) <= certain + unknown


async def test_what_is_written_together_is_never_halved_while_members_die(
    members: list[EtcdMember], store: EtcdStore
) -> None:
    """A counter, and a log entry for each of its numbers. An unknown outcome is whole, too."""

    async def both() -> tuple[Entry | None, Sequence[Entry]]:
        return await store.get("counter"), await store.list_prefix("log/")

    certain = 0
    killing = asyncio.create_task(_kill_in_turn(members))
    try:
        while not killing.done():
            try:
                entry = await store.get("counter")
                number = 1 if entry is None else int(entry.value) + 1
                revision = None if entry is None else entry.revision
                swap = Swap(key="counter", value=b"%d" % number, expected_revision=revision)
                assert await store.append_if("log/", b"%d" % number, keep=100_000, swap=swap)
                certain += 1
            except StoreError:
                continue
    finally:
        killing.cancel()
    await asyncio.gather(killing, return_exceptions=True)
    final, log = await patiently(both)
    assert final is not None
    assert [int(entry.value) for entry in log] == list(range(1, int(final.value) + 1))
    assert certain <= len(log)


async def _kill_in_turn(members: list[EtcdMember]) -> None:
    for member in members:
        await asyncio.sleep(0.2)
        await asyncio.to_thread(member.kill)
        await asyncio.sleep(0.2)
        member.start()
        await asyncio.to_thread(member.wait_ready)
