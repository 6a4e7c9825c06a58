"""A move that waited for its turn begins only where its domain still is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from node_agent.drain.coordinator import Coordinator
from node_agent.drain.records import DrainRecords
from node_agent.drain.resources import Drain, DrainState, Move, MoveState, Operation
from node_agent.nodes import NodeView
from node_agent.state.memory import SimulatedData, SimulatedStore
from node_agent.state.typed import TypedStore


class Moved:
    """A world in which somebody has just moved the domain to `owner`."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self.cluster = self

    async def views(self) -> dict[str, NodeView]:
        return {}

    async def owner(self, domain: str) -> str:
        return self._owner

    async def migrate(self, *_: object) -> None:
        raise AssertionError("it was moved once more")


class Unheard:
    def emit(self, *_: object, **__: object) -> None:
        """Into the void."""

    async def run(self, *_: object) -> None:
        """A hook that has nothing to say."""


@pytest.mark.parametrize(
    ("operation", "state"),
    [(Operation.DRAIN, MoveState.GONE), (Operation.UNDRAIN, MoveState.LEFT)],
)
async def test_what_was_moved_while_it_waited_is_not_moved_again(
    operation: Operation, state: MoveState
) -> None:
    """A drain took it from where an operator had put it; an undrain, from its home."""
    store = SimulatedStore(SimulatedData())
    await store.open()
    records = DrainRecords(TypedStore(store))
    drain = Drain(
        id="d",
        operation=operation,
        node="n1",
        state=DrainState.RUNNING,
        created_at_s=1.0,
        started_at_s=1.0,
        coordinator="n3",
        term=1,
        hooked=True,
        moves=(Move(domain="web", source="n1", destination="n2"),),
    )
    world: Any = Moved("n3")
    unheard: Any = Unheard()

    async def settle(*_: object) -> None: ...

    work = Coordinator(
        await records.add(drain),
        records=records,
        world=world,
        events=unheard,
        hooks=unheard,
        settle=settle,
        clock=lambda: 1.0,
    )
    task = asyncio.create_task(work.run())
    async with asyncio.timeout(10):
        while not work.drain.moves[0].state.ended:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert work.drain.moves[0].state is state
    assert "n3" in (work.drain.moves[0].error or "")
