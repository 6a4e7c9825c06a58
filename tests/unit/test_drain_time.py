"""A drain's time and the clocks of those who coordinate it: set, or different from one another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from migrator.errors import NotFoundError
from node_agent.drain import undrain
from node_agent.drain.coordinator import Coordinator
from node_agent.drain.records import DrainRecords
from node_agent.drain.resources import Drain, DrainState, Move, MoveState, Operation
from node_agent.state.memory import SimulatedData, SimulatedStore
from node_agent.state.typed import TypedStore

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

    async def unreachable(self) -> frozenset[str]:
        return frozenset()

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
