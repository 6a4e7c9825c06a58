"""A node's side of one migration: the production session, its timers, lane and engine.

It does what the production runner does: performs the session's commands in their order, and feeds
it what comes of them. `effects` says what that is here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from migrator.journal_entry import JournalEntry, entry_of, restore
from migrator.lane import Lane
from migrator.model import MigrationId, MigrationRequest, MigrationState, NodeName, Role
from migrator.ports import DomainEvent
from migrator.runner import NOTE_S, STEP_S
from migrator.session import messages as m
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from migrator.session.source import SourceSession
from tests.simulation import effects, post_copy
from tests.simulation.checkers import cancels, shown
from tests.simulation.disk import says_resumed
from tests.simulation.guests import Guest
from tests.simulation.loop import AGENT
from tests.simulation.world import AIM_S, PAUSED_S

if TYPE_CHECKING:
    from tests.simulation.agent import Agent
    from tests.simulation.cluster import Domain
    from tests.simulation.node import Node

_AIMED_AT = (
    MigrationState.SWITCHOVER,
    MigrationState.HANDOFF,
    MigrationState.POSTCOPY,
    MigrationState.RECOVERING,
    MigrationState.CANCELLING,
)
_BURSTS = ((AIM_S,), (AIM_S, AIM_S), (AIM_S, 0.5), (AIM_S, 0.5, 3.0), (0.3, 3.0))
"""How soon after such a state kills come. It takes two or three to make most rules matter."""
NodeSession = SourceSession | DestinationSession


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message between agents: which migration, and the role of whom it is for."""

    migration_id: str
    role: Role
    message: m.SessionMessage
    sender: NodeName
    receiver: NodeName


class Sessions:
    """Makes the sessions of both sides; mutants override it."""

    def source(self, side: Side, token: int, request: MigrationRequest) -> SourceSession:
        return SourceSession(
            migration_id=side.migration_id,
            spec=side.domain.spec,
            source=side.node.name,
            destination=side.other.node.name,
            token=token,
            request=request,
            created_at_s=side.node.clock_s,
        )

    def destination(self, side: Side, prepare: m.Prepare) -> DestinationSession:
        return DestinationSession.asked(
            prepare,
            side.migration_id,
            source=side.other.node.name,
            here=side.node.name,
            created_at_s=side.node.clock_s,
        )

    def restored(self, side: Side, entry: JournalEntry) -> NodeSession:
        return restore(entry, boot_id=side.node.boot_id)

    def journalled(self, side: Side, entry: JournalEntry) -> JournalEntry:
        """What is written, of what the session says."""
        return entry

    def commands(self, side: Side, commands: list[v.Command]) -> list[v.Command]:
        """What is performed, of what the session says."""
        return commands


class Migration:
    """Both sides of one migration."""

    def __init__(self, id: str, domain: Domain, source: Node, destination: Node) -> None:
        self.id = MigrationId(id)
        self.domain = domain
        self.source = Side(self, source, Role.SOURCE)
        self.destination = Side(self, destination, Role.DESTINATION)
        self.sides = {Role.SOURCE: self.source, Role.DESTINATION: self.destination}


class Side:
    """See the module. It outlives the agent: what is the agent's alone ends in `agent_died`."""

    def __init__(self, migration: Migration, node: Node, role: Role) -> None:
        self.migration = migration
        self.migration_id = migration.id
        self.domain = migration.domain
        self.node = node
        self.role = role
        self.world = node.world
        self.session: NodeSession | None = None
        self.engine = 0
        """Serial number of the engine process; 0: none."""
        self.engine_serial = 0
        self._gone_engine = self._silent_engine = 0
        """The newest that was killed; and that of which the session has heard so."""
        self.linked = 0
        """Source: the engine that ours is connected to."""
        self.served: Guest | None = None
        """Source: the guest whose memory our engine has open."""
        self.pending: set[int] = set()
        self.running_pass: tuple[int, Callable[..., None]] | None = None
        self.timers: dict[v.TimerName, int] = {}
        self.fence_token = 0
        """That this agent last asked for; a resume is under it."""
        self.token_before = 0
        self.resume_uncertain = False
        """A guest may have been resumed here, for all that this node can know."""
        self._uncertain_before = False
        self._resume_noted = False
        """The next resume is behind a note, which counts from then on."""
        self.rebooted_committed = False
        self.leaving: Guest | None = None
        """Source: the guest that was to move."""
        self.cancel_noted: v.CancelRequested | None = None
        """Source: what its journal has had."""
        self.ended: MigrationState | None = None
        self.error: str | None = None
        self.engine_due_s = 0.0
        self._timer_serial = 0
        self.guest_lane = Lane("guest")
        self.record_lane = Lane("record")
        self._held: deque[list[v.Command]] | None = None
        """What waits for a note that the disk has; None: nothing does."""

    @property
    def other(self) -> Side:
        roles = {Role.SOURCE: Role.DESTINATION, Role.DESTINATION: Role.SOURCE}
        return self.migration.sides[roles[self.role]]

    @property
    def guest(self) -> Guest | None:
        return self.domain.guests.get(self.node.name)

    @property
    def pages_flow(self) -> bool:
        """The engines' connections carry."""
        return self.node.cluster.pages_flow(self.node.name, self.other.node.name)

    @property
    def name(self) -> str:
        return f"{self.node.name} {self.migration_id}"

    # --- life ---

    def begin(self, session: NodeSession) -> None:
        self.session = session
        self.leaving = self.leaving or self.guest
        self.token_before = session.token
        self.resume_uncertain = self.rebooted_committed = self._resume_noted = False
        self.guest_lane, self.record_lane = Lane("guest"), Lane("record")
        self._held = None

    def restore(self, entry: JournalEntry) -> None:
        """A session from the journal; what the checkers know of the time before stays."""
        uncertain = self.resume_uncertain or entry.resuming or says_resumed(entry, self)
        rebooted = self.rebooted_committed
        self.begin(self.node.cluster.sessions.restored(self, entry))
        self.resume_uncertain, self.rebooted_committed = uncertain, rebooted

    def agent_died(self, why: str) -> None:
        self.session = None
        self.timers.clear()
        self.fence_token = 0
        self._held = None
        self.guest_lane.clear()
        self.record_lane.clear()
        self.kill_engine(why, told=False)

    def kill_engine(self, why: str, *, told: bool = True) -> None:
        if not self.engine:
            return
        gone, self.engine = self.engine, 0
        self.served = None
        self.world.log("{}: engine gone ({})", self.name, why)
        post_copy.note_loss(self.migration)
        if told:
            self._gone_engine = gone
            self.soon(v.EngineLost(reason=why))
        other = self.other
        post_copy.peer_engine_gone(other)
        guests = self.domain.guests
        own, its = self.guest, other.guest
        armed = any(guest is not None and guest.armed for guest in (own, its))
        if other.engine and not armed:
            most_s = self.world.random.choice((0.3, 10.0))  # It tries to reconnect for a while.
            other.soon(v.EngineLost(reason="the other engine is gone"), most_s)
        for side in (self, other):
            guest = guests.get(side.node.name)
            if guest is not None:
                effects.channel_broke(side, guest)

    # --- events in ---

    def soon(self, event: v.Event, most_s: float = 0.002) -> None:
        """Feed an event a little later, if the session is still the same then."""
        self.soon_at(event, self.world.now_s + self.world.delay(most_s))

    def soon_at(self, event: v.Event, at_s: float) -> None:
        session = self.session
        if session is None:
            return

        def deliver() -> None:
            if self.session is session:
                self.feed(event)

        self.world.after(at_s - self.world.now_s, deliver)

    def guest_reported(self, event: DomainEvent) -> None:
        self.feed(v.GuestReported(kind=event.kind, at_s=event.at_s))

    def feed(self, event: v.Event) -> None:
        session, held = self.session, self.node.held
        if session is None:
            return
        if held is not None:
            held.append(lambda: self._feed_later(session, event))
            return
        token = AGENT.set(self.node.agent)
        try:
            self._feed(session, event)
        finally:
            AGENT.reset(token)

    def _feed_later(self, session: NodeSession, event: v.Event) -> None:
        if self.session is session:
            self.feed(event)

    def _feed(self, session: NodeSession, event: v.Event) -> None:
        world = self.world
        match event:
            case v.EngineLost():
                self._silent_engine = self._gone_engine
            case v.EngineListening() if event.port <= post_copy.port_of(self._silent_engine):
                return  # What a dead one had still to say is dropped (`EngineDriver`).
        world.log("{}: {}", self.name, event)
        if isinstance(event, v.CommandFailed) and event.without_effect:
            self.resume_uncertain = self._uncertain_before
        before, shown_before = session.state, shown.end_of(session)
        commands = session.handle(event, self.node.clock_s)
        shown.check(shown_before, session)
        if session.state is not before:
            world.log("{}: {} -> {}", self.name, before.value, session.state.value)
            if session.state in _AIMED_AT and world.chance(world.faults.aimed):
                for most_s in world.random.choice(_BURSTS):
                    world.after(world.delay(most_s), self._aimed)
            if session.state in _AIMED_AT and world.chance(world.faults.paused):
                world.after(world.delay(AIM_S), self._pause)
        if session.over and self.node.agent is not None:
            self.node.agent.locks.end_migration(self.domain.name, self.migration_id)
        self.perform(self.node.cluster.sessions.commands(self, commands))

    def _aimed(self) -> None:
        if not self.world.healed:
            side = self.world.random.choice((self, self.other))
            side.node.kill_randomly(side)

    def _pause(self) -> None:
        world = self.world
        if not world.healed:
            side = world.random.choice((self, self.other))
            left_s = world.faults.heal_at_s - world.elapsed_s
            side.node.stop_agent(min(world.delay(world.random.choice(PAUSED_S)), left_s))

    # --- commands out ---

    def perform(self, commands: list[v.Command]) -> None:
        """In order. A Journal that fails takes what stands behind it along."""
        if self._held is not None:
            self._held.append(commands)
            return
        session = self.session
        for index, command in enumerate(commands):
            if self.world.chance(self.world.faults.crash_per_command):
                self.node.crash(f"before {type(command).__name__}")
            if self.session is not session:
                return
            if isinstance(command, v.Journal):
                if self.node.disk.begin():
                    self._hold_up(command, commands[index + 1 :])
                    return
                if not self.write_journal(command.durable, resuming=command.resuming):
                    dropped = tuple(commands[index + 1 :])
                    failed = v.CommandFailed(command="Journal", error="full", dropped=dropped)
                    self.soon(failed)
                    return
            elif isinstance(command, v.Send):
                self.send(command.message)
            else:
                self.perform_one(command)

    def _hold_up(self, command: v.Journal, behind: list[v.Command]) -> None:
        """The disk hangs, and with it all that follows: for as long as the runner waits."""
        session, held = self.session, deque([behind])
        self._held = held
        entry = self._entry(resuming=command.resuming)

        def done() -> None:
            if self._held is held:
                if entry.cancel is not None:
                    self.cancel_noted = entry.cancel
                self._go_on(held)

        write = self.node.disk.write(entry, command.durable, lambda: self.node.when_going(done))

        def give_up() -> None:
            if self.session is session and self._held is held:
                write.given_up = True
                dropped = tuple(held.popleft())
                failed = v.CommandFailed(command="Journal", error="it hangs", dropped=dropped)
                self.feed(failed)
                self._go_on(held)

        brief = command.resuming or command.standing or not command.durable
        seconds = NOTE_S if brief else STEP_S
        self.world.after(seconds, lambda: self.node.when_going(give_up))

    def _go_on(self, held: deque[list[v.Command]]) -> None:
        session, self._held = self.session, None
        while held and self.session is session:
            self.perform(held.popleft())  # Another Journal may hold up the rest.

    def _entry(self, *, resuming: bool = False) -> JournalEntry:
        session = self.session
        assert session is not None
        if resuming:
            self._doubt_resume()
            self._resume_noted = True
        entry = entry_of(session, boot_id=self.node.boot_id, resuming=resuming)
        return self.node.cluster.sessions.journalled(self, entry)

    def _doubt_resume(self) -> None:
        self._uncertain_before = self.resume_uncertain
        self.resume_uncertain = True

    def write_journal(self, durable: bool, *, resuming: bool = False) -> bool:
        session, node = self.session, self.node
        assert session is not None
        entry = entry_of(session, boot_id=node.boot_id, resuming=resuming)
        entry = node.cluster.sessions.journalled(self, entry)
        failed = self.world.chance(self.world.faults.journal_failure)
        if failed and (not durable or self.world.random.random() < 0.5):
            return False
        if resuming:
            self._doubt_resume()
            self._resume_noted = True
        node.journal[entry.migration_id] = entry
        if not failed:
            cancels.note(self)
        if durable and not failed:  # It may have failed in fsync: written, for the time being.
            node.durable[entry.migration_id] = entry
        return not failed

    def perform_one(self, command: v.Command) -> None:
        match command:
            case v.StartTimer():
                self._start_timer(command)
            case v.StopTimer():
                self.timers.pop(command.name, None)
            case v.Finish():
                self._finish()
            case v.Announce():
                pass
            case v.ResumeGuest():
                if not self._resume_noted:
                    self._doubt_resume()
                self._resume_noted = False
                effects.begin(self, command)
            case _:
                effects.begin(self, command)

    def _start_timer(self, command: v.StartTimer) -> None:
        self._timer_serial += 1
        serial = self.timers[command.name] = self._timer_serial

        def fire() -> None:
            if self.timers.get(command.name) == serial:
                del self.timers[command.name]
                self.feed(v.TimerFired(name=command.name))

        seconds = command.seconds * self.node.tick
        self.world.after(seconds, lambda: self.node.when_going(fire))

    def _finish(self) -> None:
        """Until the end is in the journal, the session answers for itself, and has the domain."""
        session = self.session
        assert session is not None
        cancels.check_end(self)
        self.ended, self.error = session.state, session.error
        if self.node.disk.begin():
            done = partial(self.node.when_going, partial(self._end_noted, session))
            self.node.disk.write(self._entry(), True, done)
            return
        if self.write_journal(True):
            self._end_noted(session)
            return

        def again() -> None:
            if self.session is session:
                self._finish()

        self.world.after(1.0, lambda: self.node.when_going(again))

    def _end_noted(self, session: NodeSession) -> None:
        agent = self.node.agent
        if self.session is session and agent is not None:
            self.world.log("{}: finished {} ({})", self.name, session.state.value, session.error)
            agent.spawn(self._let_go(agent))

    async def _let_go(self, agent: Agent) -> None:
        """What it gave last is done first."""
        await self.guest_lane.drained(STEP_S)
        forgets = self.world.faults.forgetful and self.role is Role.DESTINATION
        if forgets and self.guest_lane._task is None:  # Else it is at it yet.
            self.node.forget(self.migration_id)
        self.session = None
        self.timers.clear()
        agent.locks.release_from_migration(self.domain.name, self.migration_id)

    def send(self, message: m.SessionMessage) -> None:
        receiver = self.other
        envelope = Envelope(
            self.migration_id, receiver.role, message, self.node.name, receiver.node.name
        )
        self.node.cluster.send(self.node, envelope)
