"""A node's silence and return are told once each, by whichever agents there are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager

import pytest

from migrator.model import NodeInfo, NodeName
from node_agent.events import ClusterEvent, EventKind, EventLog
from node_agent.nodes import Heartbeat, NodeRegistry
from node_agent.resources import BEATS
from node_agent.silence import SILENCES, Silence, SilenceWatch
from node_agent.state.memory import SimulatedData, SimulatedStore
from node_agent.state.port import Swap
from node_agent.state.typed import TypedStore
from tests.unit.heartbeats import heartbeat


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Agent:
    """What an agent has to do with heartbeats. Its wall clock is its own."""

    def __init__(self, name: str, data: SimulatedData, clock: Clock, ahead_s: float) -> None:
        self.name = NodeName(name)
        self.store = SimulatedStore(data)
        self.typed = TypedStore(self.store)
        self.clock, self.ahead_s = clock, ahead_s
        self.events = EventLog(self.typed, name)
        self.start()

    def start(self) -> None:
        """A fresh process: it remembers nothing."""
        self.registry = NodeRegistry(
            self.typed, self._describe, clock=self._wall, monotonic=self.clock
        )
        self.watch = SilenceWatch(
            self.name, self.typed, self.events, clock=self._wall, monotonic=self.clock
        )

    def _wall(self) -> float:
        return self.clock() + self.ahead_s

    async def _describe(self) -> NodeInfo:
        return heartbeat(self.name)


class Cluster:
    """Agents, a second after the other."""

    def __init__(self, agents: list[Agent], clock: Clock) -> None:
        self.agents = {str(agent.name): agent for agent in agents}
        self.clock = clock

    async def seconds(self, count: int, *, without: Collection[str] = ()) -> None:
        """So long only those that are not `without` are alive."""
        for _ in range(count):
            self.clock.now += 1.0
            alive = [agent for name, agent in self.agents.items() if name not in without]
            for agent in alive:
                await agent.registry.beat()
            for agent in alive:
                agent.watch.saw(await agent.registry.read())
            for _ in range(100):  # Side by side, as their store's calls come.
                await asyncio.sleep(0)

    async def told(self) -> list[ClusterEvent]:
        anybody = next(iter(self.agents.values()))
        for agent in self.agents.values():
            async with asyncio.timeout(5):
                await agent.events._idle.wait()
        return list(await anybody.events.read())

    async def kinds(self) -> list[tuple[str, object]]:
        return [(event.kind, event.data["node"]) for event in await self.told()]


@asynccontextmanager
async def cluster(*names: str) -> AsyncIterator[Cluster]:
    data, clock = SimulatedData(), Clock()
    agents = [Agent(name, data, clock, ahead_s=300.0 * number) for number, name in enumerate(names)]
    for agent in agents:
        await agent.store.open()
        await agent.events.open()
        agent.watch.open()
    try:
        yield Cluster(agents, clock)
    finally:
        for agent in agents:
            await agent.watch.close()
            await agent.events.close()
            await agent.store.close()


SILENT, BACK = EventKind.NODE_SILENT, EventKind.NODE_BACK


async def test_silence_and_return_are_told_once_though_all_see_them() -> None:
    async with cluster("a", "b", "c", "d") as world:
        await world.seconds(20)
        await world.seconds(30, without=["d"])
        assert await world.kinds() == [(SILENT, "d")]
        await world.seconds(4)
        assert await world.kinds() == [(SILENT, "d")], "it may go again"
        await world.seconds(10)
        assert await world.kinds() == [(SILENT, "d"), (BACK, "d")]
        silent, back = await world.told()
        assert silent.message == (
            "node d is silent: no heartbeat for 6 s; whether its guests run isn't known"
        )
        assert back.message == "node d is back after 31 s of silence"
        assert back.data["silent_s"] == 31.0
        await world.seconds(10, without=["d"])
        assert (await world.kinds())[2:] == [(SILENT, "d")]


async def test_two_that_fall_silent_are_two() -> None:
    async with cluster("a", "b", "c") as world:
        await world.seconds(15)
        await world.seconds(10, without=["b", "c"])
        await world.seconds(10, without=["b"])
        assert await world.kinds() == [(SILENT, "b"), (SILENT, "c"), (BACK, "c")]


async def test_a_node_that_comes_and_goes_is_not_told_of_each_time() -> None:
    async with cluster("a", "b") as world:
        await world.seconds(15)
        for _ in range(10):
            await world.seconds(7, without=["b"])
            await world.seconds(2)
        assert await world.kinds() == [(SILENT, "b")]
        await world.seconds(10)
        assert await world.kinds() == [(SILENT, "b"), (BACK, "b")]


async def test_after_an_outage_of_the_store_nobody_is_called_silent() -> None:
    """Everybody's heartbeat is old then, in the eyes of whoever is first to read."""
    async with cluster("a", "b", "c") as world:
        await world.seconds(15)
        world.clock.now += 60.0  # Nobody could read or write.
        await world.seconds(3, without=["c"])
        await world.seconds(20)
        assert await world.kinds() == []
        world.clock.now += 60.0
        await world.seconds(20, without=["c"])
        assert await world.kinds() == [(SILENT, "c")], (
            "that it has really gone is told all the same"
        )


async def test_a_whole_cluster_that_starts_is_not_called_silent() -> None:
    async with cluster("a", "b", "c") as world:
        await world.seconds(15)
        world.clock.now += 3_600.0
        for agent in world.agents.values():
            await agent.watch.close()
            agent.start()
            agent.watch.open()
        await world.seconds(4, without=["b", "c"])
        await world.seconds(20)
        assert await world.kinds() == []


async def test_agents_that_were_restarted_know_what_was_told() -> None:
    async with cluster("a", "b", "c") as world:
        await world.seconds(15)
        await world.seconds(10, without=["c"])
        for name in ("a", "b"):
            await world.agents[name].watch.close()
            world.agents[name].start()
            world.agents[name].watch.open()
        await world.seconds(20, without=["c"])
        assert await world.kinds() == [(SILENT, "c")]
        await world.seconds(10)
        assert await world.kinds() == [(SILENT, "c"), (BACK, "c")]
        back = (await world.told())[-1]
        assert (back.message, back.data["silent_s"]) == ("node c is back", None), "nobody saw it go"


@pytest.mark.parametrize("set_by_s", [-40_000.0, 20.0, 3e7])
async def test_a_node_whose_clock_is_set_meanwhile_is_back_after_as_long_as_it_was_away(
    set_by_s: float,
) -> None:
    """It came back after 0 s, or after a year."""
    async with cluster("a", "b") as world:
        await world.seconds(15)
        await world.seconds(30, without=["b"])
        world.agents["b"].ahead_s += set_by_s
        await world.seconds(10)
        back = (await world.told())[-1]
        assert back.message == "node b is back after 31 s of silence"
        assert back.data["silent_s"] == 31.0


Append = Callable[[], Awaitable[bool]]


def at_the_next_telling(agent: Agent, way: Callable[[Append], Awaitable[bool]]) -> None:
    """The agent's next write of a change goes that way; what follows goes well."""
    store, append_if = agent.store, agent.store.append_if

    async def once(prefix: str, value: bytes, *, keep: int, swap: Swap) -> bool:
        store.append_if = append_if  # type: ignore[method-assign]
        return await way(lambda: append_if(prefix, value, keep=keep, swap=swap))

    store.append_if = once  # type: ignore[method-assign]


async def test_a_telling_of_unknown_outcome_is_one() -> None:
    """The write got through, its answer didn't."""
    async with cluster("a", "b") as world:
        await world.seconds(15)
        agent = world.agents["a"]

        async def answer_lost(append: Append) -> bool:
            agent.store.faults.lose_replies = True
            try:
                return await append()
            finally:
                agent.store.faults.lose_replies = False

        await world.seconds(5, without=["b"])
        at_the_next_telling(agent, answer_lost)
        await world.seconds(1, without=["b"])
        assert await world.kinds() == [(SILENT, "b")]
        await world.seconds(5, without=["b"])
        assert await world.kinds() == [(SILENT, "b")]
        await world.seconds(10)
        assert await world.kinds() == [(SILENT, "b"), (BACK, "b")]


@pytest.mark.parametrize("written", [False, True])
async def test_what_an_agent_dies_at_telling_is_told_once(written: bool) -> None:
    """Its record was written, and then it died before the event was: nobody told it any more."""
    async with cluster("a", "b", "c") as world:
        await world.seconds(15)
        agent = world.agents["a"]

        async def last(append: Append) -> bool:
            if written:
                await append()
            await asyncio.Event().wait()
            raise AssertionError

        await world.seconds(5, without=["c"])
        at_the_next_telling(agent, last)
        await world.seconds(1, without=["b", "c"])
        assert await world.kinds() == ([(SILENT, "c")] if written else [])
        await agent.watch.close()
        agent.start()
        agent.watch.open()
        await world.seconds(5, without=["c"])
        assert await world.kinds() == [(SILENT, "c")]
        await world.seconds(10)
        assert await world.kinds() == [(SILENT, "c"), (BACK, "c")]


async def test_a_slow_agent_does_not_tell_what_was_true_before() -> None:
    """It has read of the silence, and comes to tell it when the node is back and gone again."""
    async with cluster("a", "b", "slow") as world:
        await world.seconds(15)
        slow = world.agents["slow"].watch
        await world.seconds(5, without=["b"])
        world.clock.now += 1.0
        stale = await world.agents["slow"].registry.read()
        await world.seconds(5, without=["b"])
        await world.seconds(20, without=["slow"])
        assert await world.kinds() == [(SILENT, "b"), (BACK, "b"), (SILENT, "slow")]
        slow._views, slow._told = stale, {NodeName("b"): False}
        await slow._look()
        assert len(await world.kinds()) == 3


async def test_a_removed_node_leaves_no_record_and_is_not_back() -> None:
    async with cluster("a", "b") as world:
        await world.seconds(15)
        await world.seconds(10, without=["b"])
        typed = world.agents["a"].typed
        heartbeat = await typed.get(f"{BEATS}b", Heartbeat)
        assert heartbeat is not None
        await typed.delete_if(heartbeat.key, heartbeat.revision)
        await world.seconds(2, without=["b"])
        assert await typed.list_prefix(SILENCES, Silence) == []
        await world.seconds(20)
        assert await world.kinds() == [(SILENT, "b")], "a new one of that name is nobody's return"
