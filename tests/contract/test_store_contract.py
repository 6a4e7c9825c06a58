"""The state store's contract, on every driver."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from migrator.errors import LocalProtocolError, StoreError
from migrator.model import DomainName, NodeName, OwnershipRecord, OwnershipState
from node_agent.state import watches
from node_agent.state.drivers import DRIVERS
from node_agent.state.etcd import EtcdSettings, EtcdStore
from node_agent.state.memory import SimulatedData, SimulatedStore
from node_agent.state.ownership import StoreOwnership, ownership_key
from node_agent.state.port import Change, StateStore, Swap
from node_agent.state.sqlite import SqliteStore
from node_agent.state.typed import TypedStore
from node_agent.state.watches import StoreClosed
from tests.contract.etcd_members import EtcdMember, running_members

MakeStore = Callable[[], StateStore]


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdMember]:
    """One etcd server for all tests here; each has its own prefix."""
    with running_members(1) as (member,):
        yield member


@pytest.fixture(params=sorted(DRIVERS))
def make(request: pytest.FixtureRequest, tmp_path: Path) -> MakeStore:
    """Makes instances that share one state, as the agents of a cluster do."""
    if request.param == SqliteStore.name:
        return lambda: SqliteStore(tmp_path / "cluster.sqlite")
    if request.param == EtcdStore.name:
        member: EtcdMember = request.getfixturevalue("etcd")
        prefix = f"/{uuid.uuid4().hex}/"
        settings = EtcdSettings(endpoints=(member.endpoint,), prefix=prefix)
        return lambda: EtcdStore(settings)
    data = SimulatedData()
    return lambda: SimulatedStore(data)


@asynccontextmanager
async def opened(*stores: StateStore) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for store in stores:
            await store.open()
            stack.push_async_callback(store.close)
        yield


async def take(changes: AsyncIterator[Change], count: int) -> list[tuple[str, bytes | None]]:
    async with asyncio.timeout(30):
        return [
            (change.key, change.value) for change in [await anext(changes) for _ in range(count)]
        ]


def record(token: int, owner: str = "n1") -> OwnershipRecord:
    return OwnershipRecord(domain="web", token=token, owner=owner, state=OwnershipState.RUNNING)


# --- every driver ----------------------------------------------------------------------------


async def test_writes_compare_and_revisions_grow(make: MakeStore) -> None:
    store = make()
    async with opened(store):
        assert await store.get("domains/a") is None
        first = await store.put_if("domains/a", b"1", None)
        assert first is not None
        assert await store.put_if("domains/a", b"2", None) is None
        assert await store.put_if("domains/a", b"2", first + 1) is None
        second = await store.put_if("domains/a", b"2", first)
        assert second is not None and second > first
        entry = await store.get("domains/a")
        assert entry is not None and (entry.value, entry.revision) == (b"2", second)
        third = await store.put("nodes/n1", b"x")
        assert third > second
        assert not await store.delete_if("domains/a", first)
        assert await store.delete_if("domains/a", second)
        assert not await store.delete_if("domains/a", second)
        assert await store.put_if("domains/a", b"3", second) is None
        again = await store.put_if("domains/a", b"3", None)
        assert again is not None and again > third


async def test_listing_is_by_key_and_below_the_prefix_only(make: MakeStore) -> None:
    store = make()
    async with opened(store):
        for key in ("b/2", "b/10", "bb/1", "a/1", "b/1"):
            await store.put(key, key.encode())
        assert [entry.key for entry in await store.list_prefix("b/")] == ["b/1", "b/10", "b/2"]
        assert len(await store.list_prefix("")) == 5
        assert await store.list_prefix("c/") == []


async def test_what_was_written_since_is_told_and_how_many_there_are(make: MakeStore) -> None:
    store, other = make(), make()
    async with opened(store, other):
        for key in ("b/1", "b/2", "bb/1", "b/3"):
            await store.put(key, b"old")
        whole = await store.list_written("b/", 0)
        assert list(whole.entries) == list(await store.list_prefix("b/"))
        assert whole.count == 3
        nothing = await store.list_written("b/", whole.revision)
        assert (list(nothing.entries), nothing.count) == ([], 3)
        assert nothing.revision >= whole.revision
        await other.put("b/2", b"new")
        await other.put("bb/1", b"new")
        gone = await other.get("b/1")
        assert gone is not None
        assert await other.delete_if("b/1", gone.revision)
        last = await other.put("b/10", b"new")
        since = await store.list_written("b/", whole.revision)
        assert [(entry.key, entry.value) for entry in since.entries] == [
            ("b/10", b"new"),
            ("b/2", b"new"),
        ]
        assert since.count == 3
        assert since.revision >= last
        assert since.era == whole.era
        assert list((await store.list_written("b/", last)).entries) == []


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "a b", "a/\u00fc", "x" * 600])
async def test_odd_keys_are_refused(make: MakeStore, key: str) -> None:
    store = make()
    async with opened(store):
        with pytest.raises(StoreError, match="not a key"):
            await store.put(key, b"")


async def test_append_numbers_and_drops_the_oldest(make: MakeStore) -> None:
    store = make()
    async with opened(store):
        numbers = [await store.append("events/", b"%d" % n, keep=3) for n in range(6)]
        assert numbers == [1, 2, 3, 4, 5, 6]
        entries = await store.list_prefix("events/")
        assert [entry.key for entry in entries] == [f"events/{n:016d}" for n in (4, 5, 6)]
        for entry in entries:
            assert await store.delete_if(entry.key, entry.revision)
        assert await store.append("events/", b"", keep=3) == 7


def swap(key: str, value: bytes, expected_revision: int | None) -> Swap:
    return Swap(key=key, value=value, expected_revision=expected_revision)


async def test_an_entry_and_a_key_are_written_together_or_not_at_all(make: MakeStore) -> None:
    store = make()
    async with opened(store):
        changes = store.watch("")
        await store.append("events/", b"1", keep=2)
        assert await store.append_if("events/", b"2", keep=2, swap=swap("k/a", b"x", None))
        first = await store.get("k/a")
        assert first is not None and first.value == b"x"
        for expected in (None, first.revision + 100):
            late = swap("k/a", b"y", expected)
            assert not await store.append_if("events/", b"no", keep=2, swap=late)
        assert await store.get("k/a") == first
        again = swap("k/a", b"z", first.revision)
        assert await store.append_if("events/", b"3", keep=2, swap=again)
        entries = await store.list_prefix("events/")
        assert [(entry.key, entry.value) for entry in entries] == [
            (f"events/{2:016d}", b"2"),
            (f"events/{3:016d}", b"3"),
        ]
        second = await store.get("k/a")
        assert second is not None and second.value == b"z" and second.revision > first.revision
        assert await store.put_if("k/a", b"", second.revision) is not None
        assert await store.append("events/", b"4", keep=2) == 4
        seen = await take(changes, 9)
        assert sorted(seen[1:3]) == [(f"events/{2:016d}", b"2"), ("k/a", b"x")]
        assert (f"events/{1:016d}", None) in seen[3:6] and ("k/a", b"z") in seen[3:6]
        for bad in ("a b", ""):
            with pytest.raises(StoreError, match="not a key"):
                await store.append_if("events/", b"", keep=2, swap=swap(bad, b"", None))
        assert len(await store.list_prefix("events/")) == 2


async def test_of_many_that_write_a_key_with_an_entry_one_does(make: MakeStore) -> None:
    """While others append: those take no turn of it away."""
    stores = [make() for _ in range(4)]
    async with opened(*stores):
        revision: int | None = None
        for number in range(10):
            results = await asyncio.gather(
                *(
                    store.append_if("events/", b"won", keep=99, swap=swap("k/a", b"", revision))
                    for store in stores
                ),
                *(store.append("events/", b"other", keep=99) for store in stores),
            )
            assert results[:4].count(True) == 1, number
            entry = await stores[0].get("k/a")
            assert entry is not None
            revision = entry.revision
        values = [entry.value for entry in await stores[0].list_prefix("events/")]
        assert (values.count(b"won"), values.count(b"other")) == (10, 40)


async def test_watch_begins_with_the_call_and_sees_all_instances_in_order(make: MakeStore) -> None:
    one, two = make(), make()
    async with opened(one, two):
        await one.put("d/old", b"")
        changes = two.watch("d/")
        await two.get("d/old")  # Now it has begun, also for what others write.
        await one.put("d/a", b"1")
        await two.put("e/a", b"")
        await two.put("d/a", b"2")
        revision = await one.put("d/b", b"3")
        assert await one.delete_if("d/b", revision)
        assert await take(changes, 4) == [
            ("d/a", b"1"),
            ("d/a", b"2"),
            ("d/b", b"3"),
            ("d/b", None),
        ]


async def test_watch_from_the_past_misses_and_repeats_nothing(make: MakeStore) -> None:
    one, two = make(), make()
    async with opened(one, two):
        start = await one.put("d/a", b"0")
        other = two.watch("")  # The second watch of an instance joins a running one.
        await two.get("d/a")
        for number in range(1, 50):
            await one.put("d/a", b"%d" % number)
        changes = two.watch("d/", start)
        for number in range(50, 100):
            await one.put("d/a", b"%d" % number)
        expected = [("d/a", b"%d" % number) for number in range(1, 100)]
        assert await take(changes, 99) == expected
        assert await take(other, 99) == expected


async def test_another_instances_change_arrives_within_100_ms(make: MakeStore) -> None:
    one, two = make(), make()
    async with opened(one, two):
        changes = two.watch("d/")
        await two.get("d/a")
        loop = asyncio.get_running_loop()
        late_s = []
        for _ in range(20):  # A busy machine may make some late.
            await one.put("d/a", b"")
            written_s = loop.time()
            await take(changes, 1)
            late_s.append(loop.time() - written_s)
        assert sorted(late_s)[5] < 0.1


async def test_watch_ends_with_the_store_after_what_came_before(make: MakeStore) -> None:
    store = make()
    async with opened(store):
        changes = store.watch("d/")
        await store.put("d/a", b"1")

        async def rest() -> list[bytes | None]:
            return [change.value async for change in changes]

        waiting = asyncio.create_task(rest())
        await asyncio.sleep(0)
    assert await waiting == [b"1"]
    with pytest.raises(StoreClosed):
        await store.get("d/a")
    with pytest.raises(StoreClosed):
        store.watch("d/")
    await store.close()


async def test_a_watcher_that_is_too_slow_is_told(
    make: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 256
    monkeypatch.setattr(watches, "QUEUE_LIMIT", limit)
    store = make()
    async with opened(store):
        changes = store.watch("events/")
        for _ in range(limit // 64 + 1):
            await asyncio.gather(*(store.append("events/", b"", keep=1) for _ in range(64)))
        async with asyncio.timeout(30):
            with pytest.raises(StoreError, match="list again"):
                while True:
                    await anext(changes)


async def test_a_watch_from_before_the_log_or_from_the_future_is_refused(
    make: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = 256
    for driver in ("memory", "database", "etcd.store"):
        monkeypatch.setattr(f"node_agent.state.{driver}.KEPT_CHANGES", kept)
    store = make()
    async with opened(store):
        for _ in range(kept // 64 + 5):
            await asyncio.gather(*(store.put("d/a", b"") for _ in range(64)))
        for since in (1, 10**9):
            with pytest.raises(StoreError, match="list again"):
                await anext(store.watch("d/", since))


async def test_a_cancelled_watcher_may_go_on(make: MakeStore) -> None:
    store = make()
    async with opened(store):
        changes = store.watch("d/")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await anext(changes)
        await store.put("d/a", b"1")
        assert await take(changes, 1) == [("d/a", b"1")]


async def test_exactly_one_wins(make: MakeStore) -> None:
    stores = [make() for _ in range(4)]
    async with opened(*stores):
        revision = await stores[0].put("ownership/web", b"0")
        for _ in range(20):
            results = await asyncio.gather(
                *(
                    store.put_if("ownership/web", b"%d" % index, revision)
                    for index, store in enumerate(stores)
                )
            )
            (revision,) = [result for result in results if result is not None]


async def test_ownership_passes_by_value_and_tokens_never_shrink(make: MakeStore) -> None:
    one, two = make(), make()
    async with opened(one, two):
        source, destination = StoreOwnership(one), StoreOwnership(two)
        assert await source.read(DomainName("web")) is None
        assert await source.compare_and_set(None, record(1))
        assert not await destination.compare_and_set(None, record(1, "n2"))
        passed = record(1).passed_to(NodeName("n2"))
        rolled_back = record(1).passed_to(NodeName("n1"))
        won = await asyncio.gather(
            source.compare_and_set(record(1), rolled_back),
            destination.compare_and_set(record(1), passed),
        )
        assert sorted(won) == [False, True]
        winner = await source.read(DomainName("web"))
        assert winner == (rolled_back if won[0] else passed)
        with pytest.raises(LocalProtocolError):
            await source.compare_and_set(winner, record(1))
        assert not await source.remove(record(1))
        assert winner is not None and await source.remove(winner)
        assert await destination.read(DomainName("web")) is None


async def test_a_write_that_changes_nothing_overtakes_a_late_one(make: MakeStore) -> None:
    """What was sent before, and whose outcome is unknown, can't land after it."""
    one, two = make(), make()
    async with opened(one, two):
        source, destination = StoreOwnership(one), StoreOwnership(two)
        assert await source.compare_and_set(None, record(1))
        before = await two.get("ownership/web")
        assert before is not None and await source.read(DomainName("web")) == record(1)
        assert await destination.compare_and_set(record(1), record(1))
        late = await two.put_if("ownership/web", b"late", before.revision)
        assert late is None
        passed = record(1).passed_to(NodeName("n1"))
        assert await source.compare_and_set(record(1), passed)  # Though it saw an older revision.
        assert await destination.read(DomainName("web")) == passed


@pytest.mark.parametrize("value", [b"", b"\x01", b"\x81\xa1\x80", b"\x81\xa1x" + b"\x91" * 30_000])
async def test_a_corrupt_value_names_its_key(make: MakeStore, value: bytes) -> None:
    store = make()
    async with opened(store):
        await store.put(ownership_key("web"), value)
        with pytest.raises(StoreError, match="ownership/web is not a OwnershipRecord"):
            await StoreOwnership(store).read(DomainName("web"))
        with pytest.raises(StoreError, match="ownership/web"):
            await TypedStore(store).list_prefix("ownership/", OwnershipRecord)


async def test_following_gives_what_is_there_and_then_changes(make: MakeStore) -> None:
    one, two = make(), make()
    async with opened(one, two):
        typed = TypedStore(one)
        await typed.put("ownership/web", record(1))
        followed = TypedStore(two).follow("ownership/", OwnershipRecord)
        async with asyncio.timeout(30):
            assert (await anext(followed)).value == record(1)
            await one.put("ownership/bad", b"\x01")  # Logged and skipped.
            revision = await typed.put("ownership/web", record(2))
            assert (await anext(followed)).value == record(2)
            await typed.delete_if("ownership/web", revision)
            gone = await anext(followed)
        assert (gone.key, gone.value) == ("ownership/web", None)


# --- faults ----------------------------------------------------------------------------------


async def test_simulated_faults_are_one_nodes_own() -> None:
    data = SimulatedData()
    one, two = SimulatedStore(data), SimulatedStore(data)
    async with opened(one, two):
        one.faults.unavailable = True
        with pytest.raises(StoreError, match="nothing was written"):
            await one.put("d/a", b"1")
        await two.put("d/a", b"2")
        one.faults.unavailable = False
        one.faults.lose_replies = True
        with pytest.raises(StoreError, match="unknown"):
            await one.put("d/a", b"3")
        entry = await two.get("d/a")
        assert entry is not None and entry.value == b"3"


async def test_following_lists_again_after_a_fault() -> None:
    data = SimulatedData()
    one, two = SimulatedStore(data), SimulatedStore(data)
    async with opened(one, two):
        await TypedStore(two).put("ownership/web", record(1))
        gone = await TypedStore(two).put("ownership/gone", record(1))
        followed = TypedStore(one).follow("ownership/", OwnershipRecord)
        seen = [(await anext(followed)).key for _ in range(2)]
        assert seen == ["ownership/gone", "ownership/web"]
        one.faults.unavailable = True
        await two.delete_if("ownership/gone", gone)
        await TypedStore(two).put("ownership/web", record(2))
        asyncio.get_running_loop().call_later(
            0.1, lambda: setattr(one.faults, "unavailable", False)
        )
        async with asyncio.timeout(30):
            resynced = [await anext(followed) for _ in range(2)]
        assert [(change.key, change.value) for change in resynced] == [
            ("ownership/gone", None),
            ("ownership/web", record(2)),
        ]
