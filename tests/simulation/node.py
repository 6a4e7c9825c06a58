"""A simulated node: its agent (volatile), its journal, its clock, and how processes die."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from migrator.journal_entry import JournalEntry, answer_without_session, entry_of, restore
from migrator.model import MigrationRequest, MigrationState, NodeName, Role
from migrator.ports import DomainEventKind
from migrator.session import messages as m
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from migrator.session.source import SourceSession
from tests.simulation import checkers, effects, post_copy
from tests.simulation.guests import G, Guest
from tests.simulation.world import AIM_S, LONG_DOWN_S, N1, N2, SPEC, STRAGGLER_S, World

_K = DomainEventKind
_AIMED_AT = (
    MigrationState.SWITCHOVER,
    MigrationState.HANDOFF,
    MigrationState.RECOVERING,
    MigrationState.CANCELLING,
)
_BURSTS = ((AIM_S,), (AIM_S, AIM_S), (AIM_S, 0.5), (AIM_S, 0.5, 3.0), (0.3, 3.0))
"""How soon after such a state kills come. It takes two or three to make most rules matter."""
OTHER_ROLE = {Role.SOURCE: Role.DESTINATION, Role.DESTINATION: Role.SOURCE}
NodeSession = SourceSession | DestinationSession


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message between agents: which migration, and the role of whom it is for."""

    migration_id: str
    role: Role
    message: m.SessionMessage


class Node:
    """One node. `up` False: its agent is dead; engines die with it, hypervisors don't."""

    def __init__(self, world: World, name: NodeName) -> None:
        self.world = world
        self.name = name
        self.other: Node
        self.skew_s = world.random.choice((0.0, 0.0, -3.0, 0.4, 7.0))
        self.up = True
        self.boot = 1
        self.incarnation = 0
        """Changes with each death of the agent: what was meant for the dead one is dropped."""
        self.session: NodeSession | None = None
        self.journal: dict[str, JournalEntry] = {}
        self.durable: dict[str, JournalEntry] = {}
        self.engine = 0
        """Serial number of the engine process; 0: none."""
        self.engine_serial = 0
        self.linked = 0
        """Source: the engine that ours is connected to."""
        self.served: Guest | None = None
        """Source: the guest whose memory our engine has open."""
        self.pending: set[int] = set()
        self.timers: dict[v.TimerName, int] = {}
        self.fence_token = 0
        """That this agent last asked for; a resume is under it."""
        self.token_before = 0
        self.resume_noted = False
        self.rebooted_committed = False
        self.ended: dict[str, str] = {}
        """How the migrations ended here."""
        self._timer_serial = 0
        self.lanes: dict[str, float] = {}

    def _aimed(self) -> None:
        if not self.world.healed:
            self.world.random.choice((self, self.other)).kill_randomly()

    def kill_randomly(self) -> None:
        faults, chance = self.world.faults, self.world.random.random()
        if chance < faults.hypervisor_share:
            self.kill_guest("killed")
        elif chance < faults.hypervisor_share + faults.reboot_share:
            self.reboot()
        elif self.world.random.random() < 0.4:
            self.kill_engine("killed")
        else:
            self.crash("killed")

    @property
    def clock_s(self) -> float:
        return self.world.now_s + self.skew_s

    def open_entries(self) -> list[JournalEntry]:
        return [entry for entry in self.journal.values() if not entry.ended]

    # --- process life ---

    def crash(self, why: str, *, down_s: float = 5.0) -> None:
        if not self.up:
            return
        self.world.log("{}: agent killed ({})", self.name, why)
        self.up = False
        self.incarnation += 1
        self.session = None
        self.timers.clear()
        self.fence_token = 0
        for lane in ("record", "volume", "engine"):
            self.lanes.pop(lane, None)  # Connections of the agent's own. The monitor has a queue.
        self.kill_engine(why, told=False)
        self.other.peer_changed(lost=True)
        if self.world.chance(self.world.faults.long_down):
            down_s = LONG_DOWN_S
        self.world.after(0.2 + self.world.delay(down_s), self.restart)

    def reboot(self) -> None:
        """The host dies: agent, engine, hypervisor, and what the journal had in the page cache."""
        self.world.log("{}: host dies", self.name)
        entries = self.open_entries()
        if self.session is not None:
            entries.append(entry_of(self.session, boot_id=""))
        if any(each.committed and each.role is Role.DESTINATION for each in entries):
            self.rebooted_committed = True
        self.kill_guest("host died", told=False)
        self.crash("host died", down_s=12.0)
        self.journal = dict(self.durable)
        self.lanes.clear()
        self.boot += 1

    def restart(self) -> None:
        self.up = True
        self.world.log("{}: agent restarted", self.name)
        # Opening the journal syncs it: an end that was read, and acted on, must not be forgotten
        # by a later power loss.
        self.durable = dict(self.journal)
        for entry in self.open_entries():
            self.session = self.restored(entry)
            self.token_before = entry.token
            self.feed(v.Recover())
        self.other.peer_changed(lost=False)

    def kill_engine(self, why: str, *, told: bool = True) -> None:
        if not self.engine:
            return
        self.engine = 0
        self.served = None
        self.world.log("{}: engine gone ({})", self.name, why)
        post_copy.note_loss(self.world, [self, self.other])
        if told:
            self.soon(v.EngineLost(reason=why))
        post_copy.peer_engine_gone(self.other)
        own, its = self.world.guests.get(self.name), self.world.guests.get(self.other.name)
        armed = any(guest is not None and guest.armed for guest in (own, its))
        if self.other.engine and not armed:
            most_s = self.world.random.choice((0.3, 10.0))  # It tries to reconnect for a while.
            self.other.soon(v.EngineLost(reason="the other engine is gone"), most_s)
        for node in (self, self.other):
            guest = self.world.guests.get(node.name)
            if guest is not None:
                effects.channel_broke(node, guest)

    def kill_guest(self, why: str, *, told: bool = True) -> None:
        guest = self.world.guests.pop(self.name, None)
        if guest is None:
            return
        self.world.log("{}: hypervisor gone in {} ({})", self.name, guest.state.value, why)
        checkers.died(self.world, guest, why)
        post_copy.note_loss(self.world, [self, self.other])
        if told:
            self.guest_event(_K.EXITED)
        other = self.world.guests.get(self.other.name)
        if other is not None and guest.state in (G.INCOMING, G.LOADED):
            effects.channel_broke(self.other, other)

    # --- events in ---

    def soon(self, event: v.Event, most_s: float = 0.002) -> None:
        """Feed an event a little later, if the agent is still the same then."""
        self.soon_at(event, self.world.now_s + self.world.delay(most_s))

    def soon_at(self, event: v.Event, at_s: float) -> None:
        incarnation = self.incarnation
        # An event is of its migration: the runner of an ended one is gone.
        session = self.session

        def deliver() -> None:
            if self.up and self.incarnation == incarnation and self.session is session:
                self.feed(event)

        self.world.after(at_s - self.world.now_s, deliver)

    def guest_event(self, kind: DomainEventKind) -> None:
        """A monitor's events arrive in their order."""
        at_s = max(self.world.now_s + self.world.delay(0.002), self.lanes.get("events", 0.0))
        self.lanes["events"] = at_s
        self.soon_at(v.GuestReported(kind=kind, at_s=self.clock_s), at_s)

    def peer_changed(self, *, lost: bool) -> None:
        self.soon(v.PeerLost() if lost else v.PeerBack(), 1.0)

    def feed(self, event: v.Event) -> None:
        session = self.session
        if session is None:
            return
        self.world.log("{}: {}", self.name, event)
        before = session.state
        commands = session.handle(event, self.clock_s)
        if session.state is not before:
            self.world.log("{}: {} -> {}", self.name, before.value, session.state.value)
            if session.state in _AIMED_AT and self.world.chance(self.world.faults.aimed):
                for most_s in self.world.random.choice(_BURSTS):
                    self.world.after(self.world.delay(most_s), self._aimed)
        self.perform(commands)

    def receive(self, envelope: Envelope) -> None:
        if not self.up:
            return
        message = envelope.message
        session = self.session
        if session is not None and session.migration_id == envelope.migration_id:
            self.feed(v.Received(message=message))
            return
        entry = self.journal.get(envelope.migration_id)
        if entry is None and isinstance(message, m.Prepare):
            if session is not None or self.world.guests.get(self.name) is not None:
                self.send(envelope, m.Refused(reasons=("the domain is busy here",)))
            else:
                self.begin_destination(envelope.migration_id, message)
            return
        answer = answer_without_session(envelope.role, entry, message)
        if answer is not None:
            self.send(envelope, answer)

    # --- sessions; mutants override these ---

    def new_source(self, migration_id: str, token: int, request: MigrationRequest) -> SourceSession:
        return SourceSession(
            migration_id=migration_id,
            spec=SPEC,
            source=self.name,
            destination=self.other.name,
            token=token,
            request=request,
            created_at_s=self.clock_s,
        )

    def new_destination(self, migration_id: str, prepare: m.Prepare) -> DestinationSession:
        return DestinationSession(
            migration_id=migration_id,
            spec=prepare.spec,
            source=self.other.name,
            destination=self.name,
            token=prepare.token,
            request=prepare.request,
            created_at_s=self.clock_s,
        )

    def restored(self, entry: JournalEntry) -> NodeSession:
        return restore(entry, boot_id=f"boot-{self.boot}")

    def begin_source(self, migration_id: str, request: MigrationRequest) -> None:
        self.world.log("{}: {} begins: {}", self.name, migration_id, request)
        self.token_before = self.world.record.token
        self.session = self.new_source(migration_id, self.token_before, request)
        self.feed(v.Begin())

    def begin_destination(self, migration_id: str, prepare: m.Prepare) -> None:
        self.resume_noted = self.rebooted_committed = False
        self.token_before = prepare.token
        self.session = self.new_destination(migration_id, prepare)
        self.feed(v.Begin())

    # --- commands out ---

    def perform(self, commands: list[v.Command]) -> None:
        """In order. A Journal that fails takes what stands behind it along."""
        incarnation = self.incarnation
        for command in commands:
            if self.world.chance(self.world.faults.crash_per_command):
                self.crash(f"before {type(command).__name__}")
            if self.incarnation != incarnation:
                return
            if isinstance(command, v.Journal):
                if not self.write_journal(command.durable, resuming=command.resuming):
                    self.soon(v.CommandFailed(command="Journal", error="disk full"))
                    return
            elif isinstance(command, v.Send):
                session = self.session
                assert session is not None
                self.send(Envelope(session.migration_id, OTHER_ROLE[session.role], command.message))
            else:
                self.perform_one(command)

    def write_journal(self, durable: bool, *, resuming: bool = False) -> bool:
        session = self.session
        assert session is not None
        entry = entry_of(session, boot_id=f"boot-{self.boot}", resuming=resuming)
        failed = self.world.chance(self.world.faults.journal_failure)
        if failed and (not durable or self.world.random.random() < 0.5):
            return False
        self.resume_noted = entry.resuming
        self.journal[entry.migration_id] = entry
        if durable and not failed:  # It may have failed in fsync: written, for the time being.
            self.durable[entry.migration_id] = entry
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
            case _:
                effects.begin(self, command)

    def _start_timer(self, command: v.StartTimer) -> None:
        self._timer_serial += 1
        serial = self.timers[command.name] = self._timer_serial

        def fire() -> None:
            if self.timers.get(command.name) == serial:
                del self.timers[command.name]
                self.feed(v.TimerFired(name=command.name))

        self.world.after(command.seconds, fire)

    def _finish(self) -> None:
        """Until the end is in the journal, the session answers for itself."""
        session = self.session
        assert session is not None
        self.ended[session.migration_id] = session.state.value
        if self.write_journal(True):
            self.world.log("{}: finished {} ({})", self.name, session.state.value, session.error)
            self.session = None
            self.timers.clear()
            return
        incarnation = self.incarnation

        def again() -> None:
            if self.incarnation == incarnation and self.session is session:
                self._finish()

        self.world.after(1.0, again)

    def send(self, envelope: Envelope, answer: m.SessionMessage | None = None) -> None:
        """Send, or `answer` an envelope that came."""
        world, faults, other = self.world, self.world.faults, self.other
        if answer is not None:
            envelope = Envelope(envelope.migration_id, OTHER_ROLE[envelope.role], answer)
        deliver = partial(other.receive, envelope)
        for _ in range(1 + world.chance(faults.duplicate)):
            cut = self.name in world.cut_from and not world.healed
            if not other.up or cut or world.chance(faults.loss):
                world.log("{}: lost {}", self.name, envelope.message)
                continue
            late = world.chance(faults.straggler)
            world.after(world.delay(STRAGGLER_S if late else faults.delay_s_max), deliver)


def two_nodes(world: World, make: type[Node]) -> list[Node]:
    nodes = [make(world, N1), make(world, N2)]
    nodes[0].other, nodes[1].other = nodes[1], nodes[0]
    return nodes
