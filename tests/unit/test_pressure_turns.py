"""One move at a time because of pressure, whichever agents hear of it, of whatever targets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

from migrator.errors import ConflictError, FerryError, PeerError
from node_agent.drain.world import DrainWorld
from node_agent.events import EventLog
from node_agent.pressure.policy import (
    COOLDOWN_S,
    REPORTS_MIN,
    SUSTAINED_S,
    PressureReport,
    Proposal,
    Standing,
)
from node_agent.pressure.service import PressureService
from node_agent.pressure.turn import TURN_S
from node_agent.state.memory import SimulatedData, SimulatedStore
from node_agent.state.typed import TypedStore

_S = Standing


class Cluster:
    """What a move is asked of. It is listed once it has begun, which takes its time."""

    def __init__(self) -> None:
        self.migrations: list[Any] = []
        self.begin = asyncio.Event()
        self.begin.set()
        self.asked = asyncio.Event()
        self.error: FerryError | None = None

    async def list_outlines(self) -> Sequence[Any]:
        seen = list(self.migrations)
        await asyncio.sleep(0)
        return seen

    async def migrate(self, domain: str, body: object) -> Any:
        self.asked.set()
        await self.begin.wait()
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        migration = SimpleNamespace(id=f"m{len(self.migrations)}", ended=False)
        self.migrations.append(migration)
        return migration


class Agent(PressureService):
    """One that knows a move for every node."""

    async def _propose(self, report: PressureReport, source: str) -> Proposal | str:
        return Proposal(
            domain=f"vm of {source}", source=source, destination="n9", seconds=1.0, reason="load"
        )

    async def _source(self, report: PressureReport) -> str:
        return report.node or ""


class World:
    def __init__(self) -> None:
        self.now_s = 1000.0
        self.cluster = Cluster()
        self.stores = [SimulatedStore(data) for data in [SimulatedData()] * 2]

        async def views() -> dict[str, object]:
            return {}

        drains = cast(DrainWorld, SimpleNamespace(cluster=self.cluster, views=views))
        self.logs = [EventLog(TypedStore(store), "n1") for store in self.stores]
        self.agents = [
            Agent(TypedStore(store), drains, events, clock=lambda: self.now_s)
            for store, events in zip(self.stores, self.logs, strict=True)
        ]

    async def tell(self, agent: int, node: str) -> Standing:
        report = PressureReport(node=node, level=0.95, apply=True)
        return (await self.agents[agent].report(report)).standing

    async def nearly_due(self, *nodes: str) -> None:
        """The next report of each is to be acted upon."""
        for _ in range(REPORTS_MIN):
            for node in nodes:
                assert await self.tell(0, node) is _S.NOTED
            self.now_s += SUSTAINED_S / REPORTS_MIN


@asynccontextmanager
async def open_world() -> AsyncIterator[World]:
    world = World()
    for store, events in zip(world.stores, world.logs, strict=True):
        await store.open()
        await events.open()
    try:
        yield world
    finally:
        for store, events in zip(world.stores, world.logs, strict=True):
            await events.close()
            await store.close()


async def test_two_agents_that_hear_of_two_nodes_make_one_move() -> None:
    async with open_world() as world:
        await world.nearly_due("n1", "n2")
        standings = await asyncio.gather(world.tell(0, "n1"), world.tell(1, "n2"))
        assert sorted(standings) == [_S.MOVING, _S.RESTING]
        assert len(world.cluster.migrations) == 1


async def test_a_move_that_is_being_begun_is_under_way() -> None:
    async with open_world() as world:
        await world.nearly_due("n1", "n2")
        world.cluster.begin.clear()
        first = asyncio.create_task(world.tell(0, "n1"))
        await world.cluster.asked.wait()
        assert await world.tell(1, "n2") is _S.RESTING
        world.cluster.begin.set()
        assert await first is _S.MOVING
        assert await world.tell(1, "n2") is _S.RESTING
        world.cluster.migrations[0].ended = True
        assert await world.tell(1, "n2") is _S.MOVING


async def test_a_move_that_was_refused_keeps_nobody_from_his() -> None:
    async with open_world() as world:
        await world.nearly_due("n1", "n2")
        world.cluster.error = ConflictError("it was just stopped")
        assert await world.tell(0, "n1") is _S.NO_MOVE
        world.cluster.error = None
        assert await world.tell(1, "n2") is _S.MOVING


async def test_a_move_of_which_nobody_knows_whether_it_began_is_waited_for() -> None:
    async with open_world() as world:
        await world.nearly_due("n1", "n2")
        world.cluster.error = PeerError("no answer")
        assert await world.tell(0, "n1") is _S.NO_MOVE
        world.cluster.error = None
        assert await world.tell(1, "n2") is _S.RESTING
        world.now_s += TURN_S
        assert await world.tell(1, "n2") is _S.MOVING


async def test_a_turn_of_a_clock_that_is_far_ahead_holds_nobody_up() -> None:
    async with open_world() as world:
        await world.nearly_due("n1", "n2")
        world.now_s += 10 * COOLDOWN_S
        world.cluster.error = PeerError("no answer")
        await world.nearly_due("n1")
        assert await world.tell(0, "n1") is _S.NO_MOVE
        world.now_s -= 10 * COOLDOWN_S
        world.cluster.error = None
        assert await world.tell(1, "n2") is _S.MOVING
