"""What is read often and known already is what the store has, whatever happened to that."""

from __future__ import annotations

import asyncio
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrator.errors import StoreError
from migrator.model import OwnershipRecord, OwnershipState
from node_agent.state import known
from node_agent.state.known import KnownPrefix
from node_agent.state.memory import SimulatedData, SimulatedStore
from node_agent.state.port import Entry, Written
from node_agent.state.typed import TypedStore

PREFIX: Final = "ownership/"


def record(domain: str, token: int) -> OwnershipRecord:
    return OwnershipRecord(domain=domain, token=token, owner="n1", state=OwnershipState.RUNNING)


class SomeStore(SimulatedStore):
    """Of some era; tells from which revision on it was asked."""

    def __init__(self, data: SimulatedData) -> None:
        super().__init__(data)
        self.era = 1
        self.asked: list[int] = []

    async def list_written(self, prefix: str, since_revision: int) -> Written:
        self.asked.append(since_revision)
        written = await super().list_written(prefix, since_revision)
        return Written(
            entries=written.entries,
            count=written.count,
            revision=written.revision,
            era=self.era,
        )


class World:
    """One reader, and everything that others do to the store."""

    def __init__(self) -> None:
        self.data = SimulatedData()
        self.copy: tuple[dict[str, Entry], int] = ({}, 0)
        self.store = SomeStore(self.data)
        self.typed = TypedStore(self.store)
        self.known = KnownPrefix(self.typed, PREFIX, OwnershipRecord)

    async def put(self, domain: str, token: int) -> None:
        await self.typed.put(PREFIX + domain, record(domain, token))

    async def delete(self, domain: str) -> None:
        entry = await self.store.get(PREFIX + domain)
        if entry is not None:
            await self.store.delete_if(PREFIX + domain, entry.revision)

    def back_up(self) -> None:
        self.copy = (dict(self.data.entries), self.data.revision)

    def restore(self) -> None:
        entries, self.data.revision = self.copy
        self.data.entries = dict(entries)

    async def listed(self) -> list[tuple[str, OwnershipRecord]]:
        return [(e.key, e.value) for e in await self.typed.list_prefix(PREFIX, OwnershipRecord)]

    async def is_what_is_listed(self) -> None:
        assert list((await self.known.read()).items()) == await self.listed()


@pytest.fixture
async def world() -> World:
    made = World()
    await made.store.open()
    return made


Step = tuple[str, str, int, bool]
STEPS: Final = st.lists(
    st.tuples(
        st.sampled_from(("put", "put", "put", "delete", "other", "back up", "restore", "fail")),
        st.sampled_from("abc"),
        st.integers(min_value=1, max_value=9),
        st.booleans(),
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_it_is_what_a_listing_would_have_been(steps: list[Step]) -> None:
    async def play() -> None:
        world = World()
        await world.store.open()
        for what, domain, token, reads in steps:
            if what == "put":
                await world.put(domain, token)
            elif what == "delete":
                await world.delete(domain)
            elif what == "other":
                await world.store.put(f"nodes/{domain}", b"x")
            elif what == "back up":
                world.back_up()
            elif what == "restore":
                world.restore()
                world.store.era += 1
            elif what == "fail":
                world.store.faults.unavailable = True
                with pytest.raises(StoreError):
                    await world.known.read()
                world.store.faults.unavailable = False
            if reads:
                await world.is_what_is_listed()
        await world.is_what_is_listed()

    asyncio.run(play())


async def test_only_what_was_written_since_is_read(world: World) -> None:
    for domain in "abc":
        await world.put(domain, 1)
    await world.is_what_is_listed()
    await world.put("b", 2)
    await world.is_what_is_listed()
    await world.is_what_is_listed()
    assert world.store.asked == [0, 3, 4]


async def test_all_of_it_is_read_where_some_were_deleted(world: World) -> None:
    for domain in "abc":
        await world.put(domain, 1)
    await world.is_what_is_listed()
    await world.delete("b")
    await world.put("d", 1)
    await world.is_what_is_listed()
    assert world.store.asked == [0, 3, 0]


async def test_a_store_that_went_back_is_read_anew_though_its_term_is_the_same(
    world: World,
) -> None:
    await world.put("a", 1)
    world.back_up()
    await world.put("a", 2)
    await world.put("b", 1)
    await world.is_what_is_listed()
    world.restore()
    await world.put("b", 1)
    await world.is_what_is_listed()


async def test_another_term_is_read_anew_though_its_revision_is_newer(world: World) -> None:
    await world.put("a", 1)
    world.back_up()
    await world.put("a", 2)
    await world.is_what_is_listed()
    world.restore()
    world.store.era += 1
    await world.put("b", 1)
    await world.put("b", 2)
    await world.delete("b")
    await world.is_what_is_listed()


async def test_after_an_outage_all_of_it_is_read(world: World) -> None:
    await world.put("a", 1)
    await world.is_what_is_listed()
    world.store.faults.unavailable = True
    with pytest.raises(StoreError):
        await world.known.read()
    world.store.faults.unavailable = False
    await world.is_what_is_listed()
    assert world.store.asked == [0, 1, 0]


async def test_what_is_new_is_in_its_place(world: World) -> None:
    await world.put("b", 1)
    await world.is_what_is_listed()
    await world.put("a", 1)
    await world.is_what_is_listed()


async def test_it_is_read_anew_once_in_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.put("a", 1)
    await world.is_what_is_listed()
    monkeypatch.setattr(known, "ANEW_S", 0.0)
    await world.is_what_is_listed()
    assert world.store.asked == [0, 0]


async def test_one_that_reads_slowly_undoes_nothing_that_another_has_read(world: World) -> None:
    await world.put("a", 1)
    await world.is_what_is_listed()
    asked, let_go = asyncio.Event(), asyncio.Event()

    async def slow(call: str) -> None:
        world.store.faults.delay = None
        asked.set()
        await let_go.wait()

    world.store.faults.delay = slow
    late = asyncio.create_task(world.known.read())
    await asked.wait()
    await world.put("a", 2)
    newer = await world.known.read()
    assert newer[PREFIX + "a"].token == 2
    let_go.set()
    await late
    await world.is_what_is_listed()
