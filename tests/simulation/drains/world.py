"""A cluster of made-up nodes in which a drain, or an undrain, is carried out by real machines.

One heap of things that happen, one seed for all chance. The faults: coordinators that die between
saving and acting, or in the midst of acting (what they had asked for happens all the same, late,
and nobody hears the answer); nodes that fall silent and come back; migrations that fail, are
refused, end at a bad moment; requests that are lost, or whose answer is.

What must hold at each step is checked where it happens: `check` raises AssertionError.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from migrator.model import (
    Migration,
    MigrationProgress,
    MigrationRequest,
    MigrationState,
    NodeState,
)
from node_agent.drain import vocabulary as v
from node_agent.drain.machine import DrainMachine
from node_agent.drain.resources import (
    CancelMode,
    Drain,
    DrainState,
    Move,
    MoveState,
    Operation,
)
from node_agent.planner.model import DomainFacts, NodeFacts, PlanOptions
from node_agent.planner.plan import plan_moves
from tests.simulation.drains import beginnings, checkers
from tests.simulation.drains.checkers import SOURCE, Guest
from tests.simulation.drains.faults import Faults
from tests.simulation.drains.outages import Outages

MIB = 2**20
HORIZON_S = 4000.0
"""Far beyond what any drain with healed faults needs."""
FAULTS_UNTIL_S = 60.0


@dataclass(slots=True)
class Coordinator:
    machine: DrainMachine
    term: int
    alive: bool = True
    unreachable: frozenset[str] = frozenset()


@dataclass
class World:
    seed: int
    faults: Faults
    operation: Operation = Operation.DRAIN
    make: Callable[[Drain], DrainMachine] = DrainMachine
    now: float = 0.0
    guests: dict[str, Guest] = field(default_factory=dict)
    dead: dict[str, float] = field(default_factory=dict)
    """Silent nodes, and since when."""
    cordon: NodeState = NodeState.READY
    migrations: dict[str, Migration] = field(default_factory=dict)
    incoming: list[str] = field(default_factory=list)
    """On their way to the node that is drained, from before its cordon."""
    seen: Counter[str] = field(default_factory=Counter)
    """What has happened, so that a test can tell whether its faults struck."""

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self.outages = Outages(self)
        self.nodes = [f"n{n}" for n in range(self.dice.randint(2, 5))]
        beginnings.make_guests(self)
        self.record = self._plan()
        self.coordinator: Coordinator | None = None

    # --- the beginning -----------------------------------------------------------------------

    def _facts(self, places: dict[str, str]) -> tuple[list[NodeFacts], list[DomainFacts]]:
        """`places`: where domains are going, as in `drain.survey`."""
        nodes = [
            NodeFacts(name=name, memory_bytes=1000 * MIB, admits=self._admits(name))
            for name in self.nodes
        ]
        domains = [
            msgspec.structs.replace(guest.facts, node=places.get(guest.facts.name, guest.owner))
            for guest in self.guests.values()
            if guest.running or guest.facts.name in places
        ]
        return nodes, domains

    def _admits(self, name: str) -> bool:
        closed = self.operation is Operation.DRAIN and name == SOURCE
        return not closed and name not in self.dead and name not in self.outages

    def _plan(self) -> Drain:
        already = beginnings.leave_already(self)
        nodes, domains = self._facts({move.domain: move.destination or "" for move in already})
        wanted: tuple[tuple[str, str], ...] = ()
        if self.operation is Operation.UNDRAIN:
            wanted = tuple((name, SOURCE) for name in self.guests)
        leaving = [name for name, guest in self.guests.items() if guest.migration is None]
        plan = plan_moves(nodes, domains, leaving, PlanOptions(wanted=wanted, parallel=2))
        drain = self.operation is Operation.DRAIN
        self.cordon = NodeState.DRAINING if drain else NodeState.RESTORING
        return Drain(
            id="drain",
            operation=self.operation,
            node=SOURCE,
            state=DrainState.RUNNING,
            created_at_s=0.0,
            started_at_s=0.0,
            parallel=plan.parallel,
            links=dict.fromkeys(self.nodes, 100000000.0),
            exclude=tuple(each.domain for each in plan.blockers),
            moves=tuple(
                Move(
                    domain=move.domain,
                    source=move.source,
                    destination=move.destination,
                    policy=move.policy,
                    wire_bytes=move.wire_bytes,
                )
                for move in plan.moves
            )
            + already,
        )

    # --- time --------------------------------------------------------------------------------

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._heap, (self.now + seconds, self._number, what))

    def run(self) -> None:
        """Until the drain has ended; AssertionError if it breaks a rule, or doesn't end."""
        self._take_over()
        self.later(0.5, self._tick)
        if self.operation is Operation.DRAIN and self.faulty(self.faults.arrives_late):
            self.incoming.append("late")
            self.later(self.dice.uniform(0.0, 40.0), lambda: self._arrive("late"))
        while not self.record.ended:
            self.now, _, what = heapq.heappop(self._heap)
            assert self.now < HORIZON_S, f"not over: {self.record}"
            what()
        self._check_end()

    def faulty(self, chance: float) -> bool:
        return self.now < FAULTS_UNTIL_S and self.dice.random() < chance

    def _tick(self) -> None:
        self.later(0.5, self._tick)
        if self.faulty(self.faults.node_dies):
            self._kill_node(self.dice.choice(self.nodes))
        if self.faulty(self.faults.cancelled) and self.record.cancel is CancelMode.NO:
            mode = self.dice.choice([CancelMode.LET_END, CancelMode.ABORT])
            self.seen[f"cancel {mode}"] += 1
            self.tell(v.CancelAsked(mode=mode))
        if self.faulty(self.faults.outage) and self.coordinator is not None:
            self._crash()
            self.outages.begin()
        self.tell(v.Tick(unreachable=frozenset(self.dead), unheard=self.outages.unheard()))

    def _arrive(self, name: str) -> None:
        """A migration that had begun before the cordon ends on the node that is drained."""
        self.incoming.remove(name)
        facts = DomainFacts(name=name, node=SOURCE, memory_bytes=10 * MIB, content_bytes=MIB)
        self.guests[name] = Guest(facts=facts, owner=SOURCE)
        self.seen["arrival"] += 1

    # --- nodes and coordinators --------------------------------------------------------------

    def _kill_node(self, name: str) -> None:
        if name in self.dead:
            return
        self.seen["node dies"] += 1
        self.dead[name] = self.now
        self.later(self.dice.uniform(2, 40), lambda: self._revive(name))

    def _revive(self, name: str) -> None:
        """Its agent is back; its migrations find out what is true, and give up."""
        self.dead.pop(name, None)
        for migration in list(self.migrations.values()):
            ours = name in (migration.source, migration.destination)
            if ours and not migration.ended and self.dice.random() < 0.5:
                self._end_migration(migration.id, MigrationState.FAILED, "a node died")

    def _take_over(self) -> None:
        self.record = msgspec.structs.replace(
            self.record, term=self.record.term + 1, coordinator=f"c{self.record.term}"
        )
        self.coordinator = Coordinator(machine=self.make(self.record), term=self.record.term)
        self.tell(v.Took(unheard=self.outages.unheard()))
        if self.record.cancel is not CancelMode.NO:
            self.tell(v.CancelAsked(mode=self.record.cancel))

    def _crash(self) -> None:
        self.seen["coordinator dies"] += 1
        self.coordinator = None
        self.later(self.dice.uniform(1, 8), self._take_over)

    def tell(self, event: v.Event) -> None:
        """Give the coordinator an event: it saves what it decides, then acts; or dies before."""
        one = self.coordinator
        if one is None or self.record.ended:
            return
        before = one.machine.changes
        commands = one.machine.handle(event, self.now)
        if one.machine.changes != before:
            if self.faulty(self.faults.coordinator_dies):
                self._crash()  # Before it was saved: then nothing was done, either.
                return
            self.record = one.machine.drain
            checkers.record(self.record)
        for command in commands:
            if self.faulty(self.faults.coordinator_dies):
                self._crash()
                return
            self._perform(command, one.term)

    def answer(self, term: int, event: v.Event) -> None:
        """What came of a command, for whoever coordinates in that term."""
        if self.coordinator is not None and self.coordinator.term == term:
            self.tell(event)

    # --- commands ----------------------------------------------------------------------------

    def _perform(self, command: v.Command, term: int) -> None:
        delay_s = self.dice.choice([0.01, 0.05, 0.5, 3.0])
        match command:
            case v.Tell():
                pass
            case v.SetCordon(state=state):
                self.cordon = state
            case v.Limit(bandwidth_bytes_per_s=share):
                assert share is None or share > 0
            case v.RunHook(point=point):
                self.later(delay_s, lambda: self.answer(term, v.HookDone(point=point)))
            case v.Follow(migration=migration):
                self._follow(command.domain, migration, term)
            case v.CancelMigration(migration=migration):
                self.later(delay_s, lambda: self.cancel(migration))
            case _:
                self.later(delay_s, lambda: self._arrived(command, term))

    def _arrived(self, command: v.Command, term: int) -> None:
        """A command that asks somebody: who may be away, and whose answer may be lost."""
        domain = getattr(command, "domain", "")
        if domain and self.faulty(self.faults.request_lost):
            self.seen["request lost"] += 1
            self.later(1.0, lambda: self.answer(term, v.Unclear(domain=domain, reason="no answer")))
            return
        event = self._done(command, term)
        if event is None:
            return
        if domain and self.faulty(self.faults.request_lost):
            self.seen["answer lost"] += 1
            event = v.Unclear(domain=domain, reason="no answer")
        self.answer(term, event)

    def _done(self, command: v.Command, term: int) -> v.Event | None:
        match command:
            case v.Look(domain=domain):
                return self._look(domain, command.migration)
            case v.Begin():
                return self._begin(command, term)
            case v.Seek():
                return self._seek(command)
            case v.PowerOff(domain=domain):
                return self._power_off(domain)
            case v.Boot():
                return self._boot(command)
            case v.Check():
                return self._check()
        raise AssertionError(command)

    def _look(self, domain: str, known: str | None) -> v.Event:
        guest = self.guests[domain]
        migration = self.migrations.get(guest.migration or known or "")
        owner = guest.owner if guest.running else None
        return v.Looked(domain=domain, owner=owner, migration=migration)

    def _begin(self, command: v.Begin, term: int) -> v.Event | None:
        guest = self.guests[command.domain]
        assert command.destination != self.record.node or self.operation is Operation.UNDRAIN, (
            "sent to the node that is being drained"
        )
        if guest.owner in self.dead:
            return v.Unclear(domain=command.domain, reason="its node is silent")
        if guest.migration is not None:
            return v.Unclear(domain=command.domain, reason="is being migrated already")
        if not guest.running:
            return v.Unclear(domain=command.domain, reason="it is stopped")
        if command.destination == guest.owner:
            return v.Unclear(domain=command.domain, reason="it runs there already")
        if command.destination in self.outages:  # The source's agent has just begun to listen, too.
            return v.NotYet(domain=command.domain, reason="it isn't heard yet")
        if not self._admits(command.destination) or self.faulty(self.faults.refused):
            self.seen["refused"] += 1
            reason = f"node {command.destination} is no place"
            return v.Refused(domain=command.domain, reason=reason, elsewhere=True)
        name = self.migrate(command.domain, command.destination)
        event = v.Accepted(domain=command.domain, migration=self.migrations[name])
        self._follow(command.domain, name, term)
        return event

    def migrate(self, domain: str, destination: str) -> str:
        guest = self.guests[domain]
        name = f"m{len(self.migrations)}"
        guest.migration = name
        self.migrations[name] = Migration(
            id=name,
            domain=domain,
            source=guest.owner,
            destination=destination,
            request=MigrationRequest(destination=destination),
            state=MigrationState.SETUP,
            progress=MigrationProgress(state=MigrationState.SETUP),
            created_at_s=self.now,
        )
        self.later(self.dice.uniform(0.2, 1.0), lambda: self._precopy(name))
        return name

    def _precopy(self, id: str) -> None:
        migration = self.migrations[id]
        if not migration.ended:
            self.migrations[id] = msgspec.structs.replace(migration, state=MigrationState.PRECOPY)
            self.later(self.dice.uniform(0.5, 10.0), lambda: self._complete(id))

    def _complete(self, id: str) -> None:
        migration = self.migrations[id]
        if migration.ended:
            return
        if {migration.source, migration.destination} & self.dead.keys():
            self.later(1.0, lambda: self._complete(id))  # It waits for its connection.
        elif self.faulty(self.faults.migration_fails):
            self.seen["migration fails"] += 1
            self._end_migration(id, MigrationState.FAILED, "it didn't converge")
        else:
            self._end_migration(id, MigrationState.COMPLETED, None)

    def _end_migration(self, id: str, state: MigrationState, error: str | None) -> None:
        migration = self.migrations[id]
        guest = self.guests[migration.domain]
        self.migrations[id] = msgspec.structs.replace(migration, state=state, error=error)
        guest.migration = None
        if state is MigrationState.COMPLETED:
            guest.owner = migration.destination
            guest.moves += 1
            checkers.moved(guest, self.guests.values())

    def cancel(self, id: str) -> None:
        migration = self.migrations[id]
        if not migration.ended:
            self._end_migration(id, MigrationState.CANCELLED, None)

    def _follow(self, domain: str, id: str, term: int) -> None:
        def watch() -> None:
            migration = self.migrations[id]
            self.answer(term, v.Seen(domain=domain, migration=migration))
            if not migration.ended:
                self.later(0.3, watch)

        self.later(0.3, watch)

    def _seek(self, command: v.Seek) -> v.Event:
        guest = self.guests[command.domain]
        off = any(each.domain == command.domain and each.powered_off for each in self.record.moves)
        here = guest.owner == self.record.node and guest.migration is None
        if guest.running == off or not (off or here):
            return self._look(command.domain, None)
        places = {
            move.domain: move.destination
            for move in self.record.moves
            if move.destination and not move.state.ended and move.state is not MoveState.SEEKING
        }
        if off:
            places[command.domain] = SOURCE
        nodes, domains = self._facts(places)
        forbidden = frozenset((command.domain, node) for node in command.tried)
        plan = plan_moves(
            nodes, domains, [command.domain], PlanOptions(forbidden=forbidden, parallel=2)
        )
        found = plan.moves[0].destination if plan.moves else None
        if found is None:
            return v.NoPlace(domain=command.domain, reason="no node can take it")
        return v.Found(domain=command.domain, destination=found, wire_bytes=50 * MIB)

    def _power_off(self, domain: str) -> v.Event:
        guest = self.guests[domain]
        if guest.running and guest.owner in self.dead:
            return v.Unclear(domain=domain, reason="its node is silent")
        guest.running = False
        return v.PoweredOff(domain=domain)

    def _boot(self, command: v.Boot) -> v.Event:
        guest = self.guests[command.domain]
        if guest.running:
            return v.Failed(domain=command.domain, error=f"it runs on {guest.owner}")
        if command.node in self.dead or command.node in self.outages:
            return v.Unclear(domain=command.domain, reason="the node is silent")
        if not self._admits(command.node) or self.faulty(self.faults.boot_fails):
            self.seen["boot fails"] += 1
            return v.Failed(domain=command.domain, error="it doesn't start", node=command.node)
        guest.owner, guest.running = command.node, True
        guest.moves += 1
        checkers.moved(guest, self.guests.values())
        return v.Booted(domain=command.domain, node=command.node)

    def _check(self) -> v.Event:
        if SOURCE in self.dead:
            return v.CheckFailed(reason="it is silent")
        here = tuple(
            name for name, guest in self.guests.items() if guest.running and guest.owner == SOURCE
        )
        incoming = tuple(self.incoming)
        return v.Checked(owned=here, processes=here, incoming=incoming, boot_id="boot")

    def _check_end(self) -> None:
        off = [name for name, guest in self.guests.items() if not guest.running]
        checkers.told_off(self.record, off)
        if self.operation is not Operation.DRAIN:
            assert self.cordon is NodeState.READY or self.coordinator is None
            return
        here = [
            name for name, guest in self.guests.items() if guest.running and guest.owner == SOURCE
        ]
        checkers.end(self.record, here, self.incoming, asked=SOURCE not in self.dead)
