"""What agents write and read of each other every second: little, however many they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest

from migrator.errors import StoreError
from migrator.model import NodeInfo, NodeName
from node_agent.nodes import DESCRIBED_AGAIN_S, Heartbeat, NodeRegistry
from node_agent.resources import BEATS, NODES
from node_agent.state.memory import SimulatedStore
from node_agent.state.port import Entry
from node_agent.state.typed import TypedStore
from tests.unit.heartbeats import heartbeat, speak

N1, N2 = NodeName("n1"), NodeName("n2")


class CountingStore(SimulatedStore):
    """Knows what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self.broken = False

    async def get(self, key: str) -> Entry | None:
        self.asked[f"get {key}"] += 1
        if self.broken:
            raise StoreError("away")
        return await super().get(key)

    async def list_prefix(self, prefix: str) -> Sequence[Entry]:
        self.asked[f"list {prefix}"] += 1
        return await super().list_prefix(prefix)

    async def put(self, key: str, value: bytes) -> int:
        self.asked[f"put {key}"] += 1
        return await super().put(key, value)


class World:
    """One agent, n1, and the store that it has in common with others."""

    def __init__(self) -> None:
        self.store = CountingStore()
        self.typed = TypedStore(self.store)
        self.now_s = 1000.0
        self.info = heartbeat(N1, round_trips_ms={"n2": 0.1})
        self.registry = NodeRegistry(
            self.typed, self._describe, clock=self._clock, monotonic=self._clock
        )

    async def _describe(self) -> NodeInfo:
        return self.info

    def _clock(self) -> float:
        return self.now_s

    async def second(self) -> dict[NodeName, NodeInfo]:
        """One more, as the agent spends it: what it knows of each node."""
        self.now_s += 1.0
        self.store.asked.clear()
        await self.registry.beat()
        return {name: view.info for name, view in (await self.registry.read()).items()}


@pytest.fixture
async def world() -> World:
    made = World()
    await made.store.open()
    return made


def of_nodes(world: World) -> dict[str, int]:
    return {what: times for what, times in world.store.asked.items() if NODES in what}


async def test_what_nodes_are_like_is_written_and_read_when_it_changes(world: World) -> None:
    await speak(world.typed, heartbeat(N2, 1000.0))
    await world.second()
    assert of_nodes(world) == {f"put {NODES}n1": 1, f"list {NODES}": 1}
    for trip_ms in (0.2, 0.3):
        world.info = msgspec.structs.replace(world.info, round_trips_ms={"n2": trip_ms})
        await world.second()
        assert of_nodes(world) == {}
        assert world.store.asked[f"put {BEATS}n1"] == world.store.asked[f"list {BEATS}"] == 1
    await speak(world.typed, heartbeat(N2, 1003.0, pools=("fast",)))
    world.info = msgspec.structs.replace(world.info, boot_id="another")
    known = await world.second()
    assert known[N2].pools == ("fast",) and known[N1].boot_id == "another"
    assert known[N2].heartbeat_at_s == 1003.0
    assert of_nodes(world) == {f"put {NODES}n1": 1, f"get {NODES}n1": 1, f"get {NODES}n2": 1}


async def test_the_first_round_trip_to_a_node_is_told_at_once(world: World) -> None:
    trips: dict[str, float] = {}
    for name, ms in (("n2", 0.1), ("n3", 0.2)):
        trips[name] = ms
        world.info = heartbeat(N1, round_trips_ms=dict(trips))
        assert (await world.second())[N1].round_trips_ms == trips


async def test_many_that_change_are_read_in_one_go(world: World) -> None:
    await world.second()
    for number in range(2, 52):
        await speak(world.typed, heartbeat(f"n{number}", world.now_s))
    assert len(await world.second()) == 51
    assert of_nodes(world) == {f"list {NODES}": 1}


async def test_a_description_that_was_lost_is_back_within_a_minute(world: World) -> None:
    await world.second()
    entry = await world.typed.get(f"{NODES}n1", NodeInfo)
    assert entry is not None and await world.typed.delete_if(entry.key, entry.revision)
    fresh = NodeRegistry(world.typed, world._describe, clock=world._clock, monotonic=world._clock)
    assert await fresh.read() == {}, "a node of which only the heartbeat is known"
    world.now_s += DESCRIBED_AGAIN_S
    await world.second()
    assert set(await fresh.read()) == {N1}


async def test_what_could_not_be_read_is_read_with_the_next_look(world: World) -> None:
    await speak(world.typed, heartbeat(N2, 1000.0))
    await world.second()
    await speak(world.typed, heartbeat(N2, 1001.0, pools=("fast",)))
    world.store.broken = True
    with pytest.raises(StoreError):
        await world.second()
    world.store.broken = False
    assert (await world.second())[N2].pools == ("fast",)


async def test_a_late_heartbeat_of_a_removed_node_is_of_no_node(world: World) -> None:
    await world.second()
    late = Heartbeat(node=N2, at_s=world.now_s, described=1)
    await world.typed.put(f"{BEATS}n2", late)
    assert set(await world.second()) == {N1}
    assert await world.registry.names() == [N1]


async def test_a_heartbeat_is_small() -> None:
    """Two hundred agents read those of two hundred nodes each second."""
    beat = Heartbeat(node="a-host-with-a-longer-name", at_s=1.79e9, described=0xFFFFFFFF)
    assert len(msgspec.msgpack.encode(beat)) < 80


async def test_that_its_host_goes_down_is_heard_with_the_next_heartbeat(world: World) -> None:
    ends = False
    world.registry.goes_down = lambda: ends
    assert not (await world.second())[N1].going_down
    ends = True
    assert (await world.second())[N1].going_down
