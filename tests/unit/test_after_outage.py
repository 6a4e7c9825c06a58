"""Right after an outage all heartbeats are old, and that says nothing of anybody yet."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from migrator.errors import RefusedError, StoreError
from migrator.model import DomainName, MaintenancePolicy, NodeInfo, NodeName, NodeState
from node_agent.drain import vocabulary as v
from node_agent.drain.coordinator import Coordinator
from node_agent.drain.hearing import OUTAGE_S, Hearing
from node_agent.drain.machine import DrainMachine
from node_agent.drain.mishaps import ERRORS_MAX
from node_agent.drain.records import DrainRecords
from node_agent.drain.resources import (
    CancelMode,
    Drain,
    DrainState,
    Move,
    MoveState,
    Operation,
)
from node_agent.machines import MachinePinner
from node_agent.migrations.checks import node_reasons
from node_agent.nodes import LISTENS_ANEW, SETTLE_S, NodeRegistry, NodeView
from node_agent.state.memory import SimulatedData, SimulatedStore
from node_agent.state.typed import TypedStore
from node_agent.trust.removal import NodeRemoval
from tests.unit.agent_world import open_world, spec_of
from tests.unit.heartbeats import heartbeat, speak

N1, N2 = NodeName("n1"), NodeName("n2")


class Listener:
    """n1's agent, and n2 that speaks when it is told to."""

    def __init__(self) -> None:
        self.store = SimulatedStore(SimulatedData())
        self.typed = TypedStore(self.store)
        self.now_s = 1000.0
        self.capabilities = heartbeat("n1").capabilities
        self.start()

    def start(self) -> None:
        """A fresh process: it remembers nothing."""
        self.registry = NodeRegistry(
            self.typed, self._describe, clock=lambda: self.now_s, monotonic=lambda: self.now_s
        )

    async def _describe(self) -> NodeInfo:
        return heartbeat("n1", capabilities=self.capabilities)

    async def seconds(self, count: int, *, heard: bool) -> NodeView:
        """n2 as it is seen after so many."""
        for _ in range(count):
            self.now_s += 1.0
            await self.registry.beat()
            if heard:
                await speak(self.typed, heartbeat("n2", self.now_s))
            view = (await self.registry.read())[N2]
        return view


@pytest.fixture
async def listener() -> Listener:
    made = Listener()
    await made.store.open()
    await made.seconds(20, heard=True)
    return made


async def test_a_node_that_falls_silent_before_our_eyes_is_judged_at_once(
    listener: Listener,
) -> None:
    view = await listener.seconds(7, heard=False)
    assert view.state is NodeState.UNREACHABLE and view.judged_in_s == 0.0
    assert LISTENS_ANEW not in view.silence and listener.registry.judges_in_s == 0.0


@pytest.mark.parametrize("restarted", [False, True])
async def test_after_an_outage_a_silence_counts_once_it_could_have_been_broken(
    listener: Listener, restarted: bool
) -> None:
    """A store that was away, or this agent's own start: after a power cut it is both."""
    listener.store.faults.unavailable = True
    listener.now_s += 60.0
    with pytest.raises(StoreError):
        await listener.registry.read()
    assert listener.registry.judges_in_s == SETTLE_S
    listener.store.faults.unavailable = False
    if restarted:
        listener.start()
    view = await listener.seconds(1, heard=False)
    assert view.state is NodeState.UNREACHABLE and view.judged_in_s == SETTLE_S
    (reason,) = node_reasons(N1, N2, await listener.registry.read())
    assert "no heartbeat for 61 s" in reason and LISTENS_ANEW in reason
    view = await listener.seconds(4, heard=False)
    assert 0.0 < view.judged_in_s < SETTLE_S
    if restarted:
        view = await listener.seconds(1, heard=True)
        assert view.state is NodeState.READY and view.judged_in_s == 0.0
    else:
        view = await listener.seconds(6, heard=False)
        assert view.state is NodeState.UNREACHABLE and view.judged_in_s == 0.0


async def test_a_store_that_takes_its_time_is_not_away(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else where each look takes long nobody would ever be called silent."""
    slow = listener.registry._store.list_prefix

    async def takes_its_time(*given: Any) -> Any:
        listener.now_s += 4.0
        return await slow(*given)

    monkeypatch.setattr(listener.registry._store, "list_prefix", takes_its_time)
    view = await listener.seconds(4, heard=False)
    assert view.state is NodeState.UNREACHABLE and view.judged_in_s == 0.0


async def test_a_machine_is_pinned_to_what_nodes_have_that_are_not_heard_yet(
    listener: Listener,
) -> None:
    """Else a domain that is defined right after an outage can never move to them."""
    old = msgspec.structs.replace(
        heartbeat("n2", listener.now_s).capabilities, machine_types=("pc-q35-7.2",)
    )
    new = msgspec.structs.replace(old, machine_types=("pc-q35-10.0", "pc-q35-7.2"))
    listener.capabilities = new
    await speak(listener.typed, heartbeat("n2", listener.now_s, capabilities=old))
    listener.now_s += 60.0
    listener.start()
    await listener.seconds(1, heard=False)
    assert await MachinePinner(listener.registry)("q35") == "pc-q35-7.2"
    await listener.seconds(12, heard=False)
    assert await MachinePinner(listener.registry)("q35") == "pc-q35-10.0"


async def test_nobody_takes_a_domain_over_or_removes_a_node_before_its_silence_counts(
    tmp_path: Path,
) -> None:
    """Its guest runs on there, and was ended for the store's outage."""
    async with open_world(tmp_path) as world:
        await world.a.domains.define(spec_of())
        await world.a.domains.start(DomainName("web"))
        await world.a.registry.close()
        registry = world.b.registry
        registry._unreachable_after_s, registry._settle_s = 0.0, 3600.0
        with pytest.raises(RefusedError, match="whether its node a is silent isn't known yet"):
            await world.b.takeover.take_over(DomainName("web"))
        removal = NodeRemoval(
            world.b.name,
            world.b.typed,
            nodes=registry,
            records=world.b.records,
            migrations=world.b.migrations,
            secured=True,
        )
        with pytest.raises(RefusedError, match="whether it is silent isn't known yet"):
            await removal.remove(NodeName("a"), force=True)
        registry._settle_s = 0.0
        assert (await world.b.takeover.take_over(DomainName("web"))).owner == "b"


# --- a drain -------------------------------------------------------------------------------------


def drain(*moves: Move, **changes: Any) -> Drain:
    made = Drain(
        id="d",
        operation=Operation.DRAIN,
        node="n1",
        state=DrainState.RUNNING,
        created_at_s=1.0,
        started_at_s=1.0,
        coordinator="n3",
        term=2,
        hooked=True,
        moves=moves,
    )
    return msgspec.structs.replace(made, **changes)


def begun(commands: list[v.Command]) -> list[v.Command]:
    return [each for each in commands if isinstance(each, (v.Begin, v.Seek, v.Boot))]


def test_a_move_waits_until_its_nodes_are_heard() -> None:
    machine = DrainMachine(drain(Move(domain="web", source="n1", destination="n2")))
    assert not begun(machine.handle(v.Took(unheard={"n2": 9.0}), 1.0))
    assert machine.waits_for(1.0) == "n2 to be heard after an outage (for at most 9 s more)"
    assert not begun(machine.handle(v.Tick(unheard={"n1": 8.0}), 2.0))
    assert begun(machine.handle(v.Tick(), 3.0))


def test_no_other_place_is_looked_for_among_nodes_that_are_not_heard_yet() -> None:
    """It was found that no node can take it, and the move was over."""
    move = Move(domain="web", source="n1", destination="n2", state=MoveState.SEEKING)
    machine = DrainMachine(drain(move))
    assert not begun(machine.handle(v.Took(unheard={"n3": 9.0}), 1.0))
    assert begun(machine.handle(v.Tick(unreachable=frozenset({"n3"})), 11.0))


def test_what_is_powered_off_is_started_when_its_destination_is_heard() -> None:
    """Three starts that got no answer within three seconds gave it up."""
    move = Move(
        domain="web",
        source="n1",
        destination="n2",
        policy=MaintenancePolicy.STOP,
        state=MoveState.BOOTING,
        powered_off=True,
    )
    machine = DrainMachine(drain(move))
    machine.handle(v.Took(unheard={"n2": 9.0}), 1.0)
    assert not begun(machine.handle(v.Looked(domain="web", owner=None), 1.1))
    assert not begun(machine.handle(v.Tick(unheard={"n2": 5.0}), 5.0))
    assert begun(machine.handle(v.Tick(), 6.0)) == [v.Boot(domain="web", node="n2")]
    assert not begun(machine.handle(v.Tick(), 7.0)), "once"


def test_a_source_that_listens_anew_itself_costs_no_attempt() -> None:
    machine = DrainMachine(drain(Move(domain="web", source="n1", destination="n2")))
    assert begun(machine.handle(v.Took(), 1.0))
    for at in range(20):
        assert begun(machine.handle(v.NotYet(domain="web", reason="listens"), 2.0 + at))
    assert machine.drain.moves[0].attempts == 1


def test_a_drain_gives_nodes_the_time_to_boot_that_a_power_cut_takes() -> None:
    """The first host's agent found the others silent after ten seconds, and gave up."""
    hearing, silent = Hearing(), NodeState.UNREACHABLE
    n2 = NodeView(info=heartbeat("n2"), state=silent, heartbeat_age_s=60.0, judged_in_s=9.0)
    n3 = msgspec.structs.replace(n2, info=heartbeat("n3"), judged_in_s=0.0)
    judged = msgspec.structs.replace(n2, judged_in_s=0.0)
    heard = msgspec.structs.replace(judged, state=NodeState.READY)
    assert hearing.look({"n2": n2, "n3": n3}, 100.0) == (frozenset({"n3"}), {"n2": OUTAGE_S})
    later = hearing.look({"n2": judged, "n3": n3}, 120.0)
    assert later == (frozenset({"n3"}), {"n2": OUTAGE_S - 20.0}), "n3 is known to be silent"
    assert hearing.look({"n2": judged}, 100.0 + OUTAGE_S) == (frozenset({"n2"}), {})
    assert hearing.look({"n2": n2}, 101.0 + OUTAGE_S) == (frozenset({"n2"}), {}), (
        "it was waited for"
    )
    assert hearing.look({"n2": heard}, 200.0) == (frozenset(), {})
    assert hearing.look({"n2": judged}, 300.0) == (frozenset({"n2"}), {}), (
        "it fell silent before our eyes"
    )


# --- a coordinator with a bug --------------------------------------------------------------------


class Quiet:
    """A world in which nothing happens, whose events are kept, and whose hooks say nothing."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.cluster = self

    def emit(self, _kind: object, text: str, **_: object) -> None:
        self.told.append(text)

    async def views(self) -> dict[str, NodeView]:
        return {}

    async def owner(self, _: str) -> str:
        return "n1"

    async def migration_of(self, *_: object) -> None:
        return None

    async def run(self, *_: object) -> None: ...

    async def settle(self, *_: object) -> None: ...


async def coordinated(moves: tuple[Move, ...]) -> tuple[Coordinator, Quiet, DrainRecords]:
    store = SimulatedStore(SimulatedData())
    await store.open()
    records, quiet = DrainRecords(TypedStore(store)), Quiet()
    rest: Any = quiet
    work = Coordinator(
        await records.add(drain(*moves)),
        records=records,
        world=rest,
        events=rest,
        hooks=rest,
        settle=quiet.settle,
        clock=lambda: 1.0,
    )
    return work, quiet, records


WAITS = Move(domain="web", source="n1", destination="n2", planned_start_s=1.0)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETRY_S", "TICK_S"):
        monkeypatch.setattr(f"node_agent.drain.coordinator.{name}", 0.01)


async def test_a_bug_in_the_machine_costs_a_drain_nothing_but_a_look(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It ended the coordinator, and the drain was taken over as if the agent had been restarted."""
    work, quiet, records = await coordinated((WAITS,))
    failures = 1
    handle = DrainMachine.handle

    def fails_once(machine: DrainMachine, event: v.Event, now: float) -> list[v.Command]:
        nonlocal failures
        if isinstance(event, v.Tick) and failures:
            failures -= 1
            raise KeyError("web")
        return handle(machine, event, now)

    monkeypatch.setattr(DrainMachine, "handle", fails_once)
    running = asyncio.create_task(work.run())
    async with asyncio.timeout(30):
        while not any("such errors" in text for text in quiet.told):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await records.ask_cancel("d", CancelMode.LET_END)
        await running
    assert (await records.get("d")).value.state is DrainState.CANCELLED
    assert any("KeyError('web')" in text and "1 of 5" in text for text in quiet.told)
    assert [each for each in caplog.records if each.exc_info], "the log has the traceback"


async def test_a_bug_that_comes_again_and_again_ends_the_drain_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    going = Move(
        domain="db", source="n1", destination="n2", state=MoveState.MOVING, migration="m-1"
    )
    work, quiet, records = await coordinated((WAITS, going))
    looks = 0

    def fails(*_: object) -> list[v.Command]:
        nonlocal looks
        looks += 1
        raise KeyError("web")

    monkeypatch.setattr(DrainMachine, "handle", fails)
    async with asyncio.timeout(30):
        await work.run()
    ended = (await records.get("d")).value
    assert (ended.state, ended.errors, looks) == (DrainState.PARTIAL, ERRORS_MAX, ERRORS_MAX)
    assert "KeyError('web')" in (ended.error or "")
    assert {move.state for move in ended.moves} == {MoveState.LEFT}
    assert "ferry migration show m-1" in (ended.moves[1].error or "")
    assert "given up" in quiet.told[-1]
