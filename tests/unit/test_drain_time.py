"""A drain's time and the clocks of those who coordinate it: set, or different from one another."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from migrator.errors import NotFoundError
from migrator.model import NodeState
from node_agent.drain import coordinator as coordinator_module
from node_agent.drain import outlook, undrain
from node_agent.drain import vocabulary as v
from node_agent.drain.coordinator import Coordinator
from node_agent.drain.machine import DrainMachine
from node_agent.drain.records import DrainRecords
from node_agent.drain.resources import CancelMode, Drain, DrainState, Move, MoveState, Operation
from node_agent.drain.watch import DrainWatch
from node_agent.hooks.model import HookPoint
from node_agent.nodes import NodeView
from node_agent.state.memory import SimulatedData, SimulatedStore
from node_agent.state.typed import TypedStore, Versioned
from tests.unit.heartbeats import heartbeat

DAY_S = 86_400.0


async def records_of() -> DrainRecords:
    store = SimulatedStore(SimulatedData())
    await store.open()
    return DrainRecords(TypedStore(store))


def drain(id: str, created_at_s: float, **changes: Any) -> Drain:
    return Drain(
        id=id,
        operation=Operation.DRAIN,
        node="n1",
        state=changes.pop("state", DrainState.RUNNING),
        created_at_s=created_at_s,
        started_at_s=created_at_s,
        coordinator="n2",
        term=1,
        **changes,
    )


class Nobody:
    """A world in which nothing can be asked, and nobody is silent."""

    async def views(self) -> dict[str, NodeView]:
        return {}

    def __getattr__(self, name: str) -> Any:
        raise NotFoundError(name)


class Heard:
    def emit(self, *_: object, **__: object) -> None:
        """Into the void."""


async def left_alone(*_: object) -> None:
    """A cordon that stays as it is."""


async def coordinator(
    records: DrainRecords, made: Drain, clock: Callable[[], float]
) -> Coordinator:
    rest: Any = None
    return Coordinator(
        await records.get(made.id),
        records=records,
        world=Nobody(),  # type: ignore[arg-type]
        events=Heard(),  # type: ignore[arg-type]
        hooks=rest,
        settle=left_alone,
        clock=clock,
    )


async def coordinated(records: DrainRecords, id: str, beats: int, work: Coordinator) -> Drain:
    """Until the record was written so often."""
    first = (await records.get(id)).value.beat
    task = asyncio.create_task(work.run())
    async with asyncio.timeout(30):
        while (await records.get(id)).value.beat < first + beats:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return (await records.get(id)).value


@pytest.mark.parametrize("step_s", [DAY_S, -DAY_S])
async def test_a_clock_that_is_set_ends_no_drain(step_s: float) -> None:
    records, wall = await records_of(), [1000.0]
    going = Move(
        domain="web", source="n1", destination="n2", state=MoveState.MOVING, migration="m-1"
    )
    waits = Move(domain="db", source="n1", destination="n2")
    made = drain("d", 1000.0, moves=(going, waits), parallel=1, hooked=True)
    await records.add(made)
    work = await coordinator(records, made, lambda: wall[0])
    wall[0] += step_s
    now = await coordinated(records, "d", 2, work)
    assert [each.state for each in now.moves] == [MoveState.MOVING, MoveState.WAITING]
    assert 1000.0 <= now.at_s < 1060.0


async def test_a_bug_in_the_look_at_the_nodes_is_logged_and_told_and_the_drain_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It ended the ticker unseen, and the drain stood still until another agent took it over."""

    async def fails(_: Nobody) -> dict[str, NodeView]:
        raise KeyError("n4")

    monkeypatch.setattr(coordinator_module, "TICK_S", 0.01)
    monkeypatch.setattr(coordinator_module, "SAVE_S", 0.05)
    records = await records_of()
    going = Move(
        domain="web", source="n1", destination="n2", state=MoveState.MOVING, migration="m-1"
    )
    made = drain("d", 1000.0, moves=(going,), hooked=True)
    await records.add(made)
    work = await coordinator(records, made, lambda: 1000.0)
    with monkeypatch.context() as patch:
        patch.setattr(Nobody, "views", fails)
        now = await coordinated(records, "d", 3, work)
    told = "word of the nodes (an error inside the agent n2: KeyError('n4'))"
    assert now.waits_for == told
    logged = [each for each in caplog.records if "can't be looked at" in each.getMessage()]
    assert len(logged) == 1 and logged[0].exc_info is not None


async def test_who_takes_over_goes_on_with_the_drains_time_not_with_its_own() -> None:
    records = await records_of()
    made = drain("d", 1000.0, at_s=1500.0)
    await records.add(made)
    work = await coordinator(records, made, lambda: 1000.0 + DAY_S)
    assert 1500.0 <= work.now_s < 1510.0
    assert work.drain.at_s >= 1500.0
    await asyncio.sleep(0.02)
    assert work.drain.at_s > 1500.01, "whoever looks at it sees its time go on"
    older = drain("e", 1000.0)  # Of an agent that doesn't tell.
    await records.add(older)
    assert (await coordinator(records, older, lambda: 1234.0)).now_s >= 1234.0


class Clocks:
    """Of the agent n3: its own, and how far n2's is ahead of it."""

    def __init__(self, ahead_s: float | None) -> None:
        self.wall_s, self.monotonic_s, self.ahead_s = 5000.0, 70.0, ahead_s
        self.judges_in_s = 0.0

    def wait(self, seconds: float) -> None:
        self.wall_s += seconds
        self.monotonic_s += seconds

    async def views(self) -> dict[str, NodeView]:
        ahead = {"n2": self.ahead_s, "n1": 3600.0, "n4": 3600.0}  # Ours is an hour behind.
        return {
            name: NodeView(
                info=heartbeat(name),
                state=NodeState.READY,
                heartbeat_age_s=0.1,
                revision=1,
                clock_offset_s=offset_s,
            )
            for name, offset_s in ahead.items()
        }


class Taker:
    """What a watch needs of the service of n3."""

    def __init__(self, clocks: Clocks) -> None:
        self.node, self.world, self.events = "n3", clocks, Heard()
        self.begun: asyncio.Queue[Drain] = asyncio.Queue()

    def coordinates(self, name: str) -> bool:
        return False

    def begin(self, entry: Versioned[Drain]) -> None:
        self.begun.put_nowait(entry.value)


@contextlib.asynccontextmanager
async def watching(
    records: DrainRecords, clocks: Clocks
) -> AsyncIterator[tuple[Taker, DrainWatch]]:
    taker = Taker(clocks)
    watch = DrainWatch(
        taker,  # type: ignore[arg-type]
        records._store,
        records,
        silent_s=5.0,
        look_s=0.01,
        clock=lambda: clocks.wall_s,
        monotonic=lambda: clocks.monotonic_s,
    )
    watch.open()
    yield taker, watch
    await watch.close()


async def known(watch: DrainWatch, condition: Callable[[Drain], bool] = lambda _: True) -> None:
    async with asyncio.timeout(5):
        while not any(map(condition, watch.drains())):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_who_takes_over_knows_for_how_long_nobody_coordinated() -> None:
    """By its own clock, where it has followed the drain; also if somebody cancels it meanwhile."""
    records, clocks = await records_of(), Clocks(ahead_s=DAY_S)
    await records.add(drain("d", 1000.0, at_s=1010.0, unattended_s=2.0, beat=7))
    async with watching(records, clocks) as (taker, watch):
        await known(watch)
        clocks.wait(4.0)
        await records.ask_cancel("d", CancelMode.LET_END)
        await known(watch, lambda drain: drain.cancel is CancelMode.LET_END)
        clocks.wait(92.0)
        async with asyncio.timeout(5):
            taken = await taker.begun.get()
    assert (taken.coordinator, taken.at_s) == ("n3", 1010.0)
    assert taken.unattended_s == 98.0


@pytest.mark.parametrize(
    ("coordinator", "ahead_s", "written_at_s"),
    [
        ("n3", None, 5000.0 - 70.0),
        ("n2", 400.0, 5400.0 - 70.0),
        ("n2", None, 8600.0 - 70.0),  # It isn't heard: its clock is taken to be as most are.
    ],
    ids=["its own", "a clock that is known", "a silent node's"],
)
async def test_who_was_not_there_knows_it_too(
    coordinator: str, ahead_s: float | None, written_at_s: float
) -> None:
    """All agents were down: monotonic clocks tell nothing of that."""
    records, clocks = await records_of(), Clocks(ahead_s)
    made = drain("d", 1000.0, at_s=1010.0, written_at_s=written_at_s)
    await records.add(msgspec.structs.replace(made, coordinator=coordinator))
    async with watching(records, clocks) as (taker, watch):
        await known(watch)
        clocks.wait(6.0)
        async with asyncio.timeout(5):
            taken = await taker.begun.get()
    assert taken.unattended_s == pytest.approx(76.0)


async def test_the_time_without_a_coordinator_is_told_and_prolongs_nothing() -> None:
    records = await records_of()
    made = drain("d", 1000.0, at_s=1020.3, unattended_s=76.0, timeout_s=60.0, hooked=True)
    machine = DrainMachine(made)
    machine.handle(v.CancelAsked(mode=CancelMode.LET_END), 1020.3)
    machine.handle(v.HookDone(point=HookPoint.NODE_OPENED), 1020.3)
    ended = machine.drain
    assert ended.state is DrainState.CANCELLED
    assert ended.ended_at_s == pytest.approx(1096.3)
    said = ended.history[-1]
    assert said.text.endswith("cancelled after 96.3 s, 76 s of it without a coordinator")
    assert said.at_s == pytest.approx(1096.3)
    await records.add(made)
    work = await coordinator(records, made, lambda: 4711.0)
    assert 1020.3 <= work.now_s < 1021.0, "its timeout is by its own time"
    moves = (Move(domain="a", source="n1", destination="n2", planned_s=5.0),)
    left = [
        outlook.left_s(msgspec.structs.replace(each, moves=moves), 1020.3)
        for each in (made, msgspec.structs.replace(made, unattended_s=0.0))
    ]
    assert left[0] == left[1] == 5.0


async def test_the_last_drain_is_the_newest_whoever_made_it() -> None:
    """n2's clock is ahead: what n3 makes after it is the node's newest drain all the same."""
    records = await records_of()
    moved = Move(domain="web", source="n1", destination="n2", state=MoveState.MOVED)
    first = drain("first", 5000.0, state=DrainState.DONE, restored_by="back", moves=(moved,))
    await records.add(first)
    second = drain("second", 4000.0, state=DrainState.DONE, moves=(moved,))
    entry = await records.add(second)
    assert entry.value == (await records.get("second")).value
    listed = await records.list_drains()
    assert [each.id for each in listed] == ["second", "first"]
    assert [each.id for each in undrain.to_undo(listed, "n1")] == ["second"]
    await records.add(drain("third", 9000.0))
    assert (await records.list_drains())[0].created_at_s == 9000.0


async def test_the_drains_time_goes_on_where_it_was_whatever_the_machines_uptime(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sum that needs one bit more than its parts was rounded: the time went back a little."""
    records = await records_of()
    made = drain("d", 1000.0, at_s=1500.0)
    await records.add(made)
    work = await coordinator(records, made, lambda: 1000.0)
    with monkeypatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "time", lambda: 3000.0000000000005)
        assert work.now_s == 1500.0


async def test_after_an_outage_no_drain_is_taken_from_a_coordinator_that_could_not_write() -> None:
    """All found its record old when the store was back, and took it over at once."""
    records, clocks = await records_of(), Clocks(ahead_s=0.0)
    await records.add(drain("d", 1000.0, at_s=1010.0))
    clocks.judges_in_s = 10.0
    async with watching(records, clocks) as (taker, watch):
        await known(watch)
        clocks.wait(60.0)
        for _ in range(3):
            await watch._take_over_silent()
        assert taker.begun.empty()
        clocks.judges_in_s = 0.0
        async with asyncio.timeout(5):
            assert (await taker.begun.get()).coordinator == "n3"
