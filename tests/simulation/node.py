"""A simulated node: its agent process (volatile), its engine, and how commands are performed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from migrator.journal_entry import answer_without_session, entry_of, restore
from migrator.model import MigrationRequest, MigrationState, NodeName, PassReport, Role
from migrator.ports import AbortOutcome, DomainEventKind
from migrator.session import messages as m
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from migrator.session.source import SourceSession
from tests.simulation.world import DESTINATION, PAGES, SOURCE, SPEC, Guest, World

_K = DomainEventKind
_RECORD = (v.SwapRecord, v.ReadRecord)
_ENGINE = (v.StartEngine, v.ConnectEngine, v.RunPass, v.StopEngine)


class Node:
    """One node. `up` False: its agent is dead; the hypervisor process lives on in the world."""

    def __init__(self, world: World, name: NodeName) -> None:
        self.world = world
        self.name = name
        self.other: Node
        self.role = Role.SOURCE if name == SOURCE else Role.DESTINATION
        self.up = True
        self.incarnation = 0
        self.session: SourceSession | DestinationSession | None = None
        self.engine = False
        self.pending: set[int] = set()
        self.timers: dict[v.TimerName, int] = {}
        self._timer_serial = 0
        self._lanes: dict[str, float] = {}

    # --- process life ---

    def crash(self, why: str) -> None:
        if not self.up:
            return
        self.world.log(f"{self.name}: agent killed ({why})")
        self.up = False
        self.incarnation += 1
        self.session = None
        self.timers.clear()
        self.kill_engine(why, told=False)
        self.other.peer_changed(lost=True)
        self.world.after(0.2 + self.world.delay(5.0), self.restart)

    def restart(self) -> None:
        self.up = True
        self.world.log(f"{self.name}: agent restarted")
        for entry in self.world.journals[self.name].values():
            if not entry.ended:
                self.session = restore(entry, boot_id="boot")
                self.feed(v.Recover())
        self.other.peer_changed(lost=False)

    def kill_engine(self, why: str, *, told: bool = True) -> None:
        if not self.engine:
            return
        self.engine = False
        self.world.log(f"{self.name}: engine gone ({why})")
        if told:
            self.soon(lambda: v.EngineLost(reason=why))
        other = self.other
        if other.engine:
            other.soon(lambda: v.EngineLost(reason="the other engine is gone"), 0.3)
        for node in (self, other):
            guest = self.world.guests.get(node.name)
            if guest is not None:
                node.channel_broke(guest)

    def channel_broke(self, guest: Guest) -> None:
        """The relay of the device state is cut: what QEMU does then (FACTS.md)."""
        if guest.state == "pre-switchover":
            guest.state = "running"
            self.world.log(f"{self.name}: source resumes by itself")
            self.guest_event(_K.MIGRATION_FAILED)
            self.guest_event(_K.RESUMED)
        elif guest.state == "sending":
            # The last bytes may or may not have left: the hypervisor knows only that it sent them.
            guest.state = "postmigrate"
            self.guest_event(_K.DEVICE_STATE_SENT)
        elif guest.state == "incoming" and self.world.guests.get(SOURCE) is not None:
            self.kill_guest("device channel broke")

    def kill_guest(self, why: str) -> None:
        guest = self.world.guests.pop(self.name, None)
        if guest is None:
            return
        self.world.log(f"{self.name}: hypervisor gone in {guest.state} ({why})")
        if guest.state in ("running", "pre-switchover"):
            self.world.memory_lost = True  # What another copy holds is older.
        elif guest.state in ("sending", "postmigrate"):
            others = [g for g in self.world.guests.values() if g.state in ("loaded", "running")]
            if not others:
                self.world.memory_lost = True
        elif guest.state == "loaded" and self.world.guests.get(SOURCE) is None:
            self.world.memory_lost = True
        self.guest_event(_K.EXITED)
        if guest.node == DESTINATION:
            source = self.world.guests.get(SOURCE)
            if source is not None:
                self.other.channel_broke(source)

    # --- events in ---

    def soon(self, make: Callable[[], v.Event], most_s: float = 0.002) -> None:
        """Feed an event a little later, if the agent is still the same then."""
        incarnation = self.incarnation

        def deliver() -> None:
            if self.up and self.incarnation == incarnation:
                self.feed(make())

        self.world.after(self.world.delay(most_s), deliver)

    def guest_event(self, kind: DomainEventKind) -> None:
        at_s = self.world.now_s
        self.soon(lambda: v.GuestReported(kind=kind, at_s=at_s))

    def peer_changed(self, *, lost: bool) -> None:
        self.soon(lambda: v.PeerLost() if lost else v.PeerBack(), 1.0)

    def feed(self, event: v.Event) -> None:
        if self.session is None:
            return
        self.world.log(f"{self.name}: {_short(event)}")
        before = self.session.state
        commands = self.session.handle(event, self.world.now_s)
        if self.session.state is not before:
            self.world.log(f"{self.name}: {before} -> {self.session.state}")
        self.perform(commands)

    def receive(self, message: m.SessionMessage) -> None:
        if not self.up:
            return
        new = self.session is None and not self.world.journals[self.name]
        if new and isinstance(message, m.Prepare):
            self.begin_destination(message)
            return
        if self.session is not None:
            self.feed(v.Received(message=message))
            return
        entry = next(iter(self.world.journals[self.name].values()), None)
        answer = answer_without_session(self.role, entry, message)
        if answer is not None:
            self.send(answer)

    def begin_source(self, request: MigrationRequest) -> None:
        self.session = SourceSession(
            migration_id="m1",
            spec=SPEC,
            source=SOURCE,
            destination=DESTINATION,
            token=1,
            request=request,
            created_at_s=self.world.now_s,
        )
        self.feed(v.Begin())

    def begin_destination(self, prepare: m.Prepare) -> None:
        self.session = DestinationSession(
            migration_id="m1",
            spec=prepare.spec,
            source=SOURCE,
            destination=DESTINATION,
            token=prepare.token,
            request=prepare.request,
            created_at_s=self.world.now_s,
        )
        self.feed(v.Begin())

    # --- commands out ---

    def perform(self, commands: list[v.Command]) -> None:
        for command in commands:
            if self.world.chance(self.world.faults.crash_per_command):
                self.crash(f"before {_short(command)}")
                return
            if isinstance(command, v.Journal):
                if self.world.chance(self.world.faults.command_failure):
                    self.soon(lambda: v.CommandFailed(command="Journal", error="disk full"))
                    return
                self.write_journal(resuming=command.resuming)
            else:
                self.perform_one(command)

    def write_journal(self, *, resuming: bool = False) -> None:
        assert self.session is not None
        entry = entry_of(self.session, boot_id="boot", resuming=resuming)
        self.world.journals[self.name][entry.migration_id] = entry

    def perform_one(self, command: v.Command) -> None:
        world = self.world
        match command:
            case v.Send():
                self.send(command.message)
            case v.StartTimer():
                self._timer_serial += 1
                serial = self.timers[command.name] = self._timer_serial
                incarnation = self.incarnation

                def fire(name: v.TimerName = command.name) -> None:
                    if self.incarnation == incarnation and self.timers.get(name) == serial:
                        del self.timers[name]
                        self.feed(v.TimerFired(name=name))

                world.after(command.seconds, fire)
            case v.StopTimer():
                self.timers.pop(command.name, None)
            case v.Finish():
                self.write_journal()
                self.session = None
                self.timers.clear()
                world.log(f"{self.name}: finished {command.state} ({command.error})")
            case v.PrepareSwitchover() | v.Announce():
                pass
            case _:
                self.slowly(command)

    def slowly(self, command: v.Command) -> None:
        """Commands whose effect comes later, also if the agent has died by then."""
        failing = self.world.chance(self.world.faults.command_failure)
        incarnation = self.incarnation

        def act() -> None:
            name = type(command).__name__
            alive = self.up and self.incarnation == incarnation
            if failing and not isinstance(command, v.StopEngine):
                if self.world.random.random() < 0.5:
                    self.effect(command, alive)  # It happened; only its answer was lost.
                if alive:
                    self.soon(lambda: v.CommandFailed(command=name, error="simulated"))
                return
            for event in self.effect(command, alive):
                self.soon(partial(_same, event))

        # One lane a driver, as in the runner: a later command never overtakes an earlier one.
        lane = "record" if isinstance(command, _RECORD) else "guest"
        lane = "engine" if isinstance(command, _ENGINE) else lane
        due_s = self.world.now_s + 0.0002 + self.world.delay(0.005)
        due_s = self._lanes[lane] = max(due_s, self._lanes.get(lane, 0.0))
        self.world.after(due_s - self.world.now_s, act)

    def effect(self, command: v.Command, alive: bool) -> list[v.Event]:
        from tests.simulation.effects import effect

        return effect(self, command, alive)

    def send(self, message: m.SessionMessage) -> None:
        world = self.world
        copies = 1 + world.chance(world.faults.duplicate)
        for _ in range(copies):
            if world.chance(world.faults.loss) or not self.other.up or world_cut(world):
                world.log(f"{self.name}: lost {_short(message)}")
                continue
            world.after(world.delay(world.faults.delay_s_max), lambda: self.other.receive(message))

    def pass_report(self, number: int, kind: object, pages: int) -> PassReport:
        return PassReport(
            number=number,
            kind=kind,  # type: ignore[arg-type]
            seconds=0.01,
            pages=pages,
            bytes_sent=pages * 4096,
            pending_pages=len(self.pending) * self.world.random.choice((1, 1, 200)),
        )


def _same(event: v.Event) -> v.Event:
    return event


def world_cut(world: World) -> bool:
    return bool(getattr(world, "cut", False)) and not world.healed


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 160 else text[:157] + "..."


__all__ = ["DESTINATION", "PAGES", "SOURCE", "AbortOutcome", "MigrationState", "Node"]
