"""Two sessions joined directly, like h11's ConnectionPair: no network, no time but what is asked.

Commands are answered at once by the kindest of worlds; `fail` and `silence` make it less kind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec

from migrator.journal_entry import JournalEntry, entry_of, restore
from migrator.model import (
    DiskSpec,
    DomainSpec,
    MigrationRequest,
    MigrationState,
    NodeName,
    OwnershipRecord,
    OwnershipState,
    PassKind,
    PassReport,
    Role,
)
from migrator.ports import AbortOutcome, DomainEventKind
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from migrator.session.messages import Prepare
from migrator.session.source import SourceSession

SPEC = DomainSpec(name="vm", memory_bytes=64 * 1024**2, disks=(DiskSpec(volume="vm.raw"),))
STEP_S = 0.001
_K = DomainEventKind
_S = MigrationState
SOURCE, DESTINATION = Role.SOURCE, Role.DESTINATION
COMPLETED = (_S.COMPLETED, _S.COMPLETED)
FAILED = (_S.FAILED, _S.CANCELLED)
"""Both states, as `SessionPair.run` returns them."""
GONE = v.GuestInspected(condition=v.GuestCondition.GONE)
Session = SourceSession | DestinationSession


class SessionPair:
    """`given` holds every command in its order, as (role, command)."""

    def __init__(
        self,
        request: MigrationRequest | None = None,
        *,
        pending: Callable[[int], int] = lambda number: 10,
        listening: v.EngineListening | None = None,
        token: int = 1,
    ) -> None:
        """`pending(number)`: how many pages the pass of that number leaves behind.

        `listening`: what the destination's engine says of itself.
        """
        self.listening = listening or v.EngineListening(
            host="10.0.0.2", port=7000, secret=b"s" * 32
        )
        self.request = request or MigrationRequest(destination="n2")
        self.pending = pending
        self.told: Callable[[int], int] = lambda number: 1000
        """How many pages the pass of that number sends, or tells of."""
        self.now_s = 1000.0
        self.record = OwnershipRecord(
            domain="vm", token=token, owner="n1", state=OwnershipState.RUNNING
        )
        self.source = SourceSession(
            migration_id="m1",
            spec=SPEC,
            source=NodeName("n1"),
            destination=NodeName("n2"),
            token=token,
            request=self.request,
            created_at_s=self.now_s,
        )
        self.destination = DestinationSession(
            migration_id="m1",
            spec=SPEC,
            source=NodeName("n1"),
            destination=NodeName("n2"),
            token=token,
            request=self.request,
            created_at_s=self.now_s,
        )
        self.given: list[tuple[Role, v.Command]] = []
        self.timers: dict[tuple[Role, v.TimerName], float] = {}
        self.failing: dict[type[object], v.CommandFailed] = {}
        self.silent: set[type[object]] = set()
        self.sent = False
        self.resumed_on: list[Role] = []
        self._events: deque[tuple[Session, v.Event]] = deque()
        self._dropped: tuple[v.Command, ...] = ()
        """What a Journal that fails takes along. Whoever lets one fail silences that, too."""
        self.push(self.source, v.Begin())

    # --- what tests do ---

    def push(self, session: Session, event: v.Event) -> None:
        self._events.append((session, event))

    def fail(self, command: type[object], *reasons: str) -> None:
        """Answer that kind of command with CommandFailed, from now on."""
        self.failing[command] = v.CommandFailed(
            command=command.__name__, error="broken", reasons=reasons
        )

    def silence(self, *commands: type[object]) -> None:
        """Don't answer those kinds of commands; a message type is lost."""
        self.silent.update(commands)

    def run(self, *, timers: int = 0) -> tuple[MigrationState, MigrationState]:
        """Until all is quiet, and `timers` timers have fired after that. Both states."""
        while True:
            while self._events:
                self._step()
            if not timers or not self.timers:
                return self.source.state, self.destination.state
            timers -= 1
            (role, name), at_s = min(self.timers.items(), key=lambda each: each[1])
            del self.timers[role, name]
            self.now_s = max(self.now_s, at_s)
            self.push(self.of(role), v.TimerFired(name=name))

    def run_until_state(self, state: MigrationState) -> None:
        """Until the source has come to `state`; what it asked for there isn't performed yet."""
        while self.source.state is not state:
            assert self._events, f"quiet in {self.source.state} before {state}"
            self._step()

    def restart(
        self, role: Role, *, entry: JournalEntry | None = None, boot_id: str = "boot"
    ) -> None:
        """That side's agent: it goes on from its journal (`entry`: where that isn't the newest).

        What was under way is forgotten on both sides, and so are all timers, and what was given.
        """
        session = restore(entry or entry_of(self.of(role), boot_id="boot"), boot_id=boot_id)
        if isinstance(session, SourceSession):
            self.source = session
        else:
            self.destination = session
        self._events.clear()
        self.timers.clear()
        self.given.clear()
        self.push(session, v.Recover())

    def of(self, role: Role) -> Session:
        return self.source if role is Role.SOURCE else self.destination

    def commands(self, role: Role) -> list[str]:
        """Names of the commands given, timers and messages left out."""
        out = (v.StartTimer, v.StopTimer, v.Send)
        return [
            type(each).__name__
            for who, each in self.given
            if who is role and not isinstance(each, out)
        ]

    def messages(self, role: Role) -> list[str]:
        return [
            type(each.message).__name__
            for who, each in self.given
            if who is role and isinstance(each, v.Send)
        ]

    # --- the kindest of worlds ---

    def _step(self) -> None:
        session, event = self._events.popleft()
        self.now_s += STEP_S
        commands = session.handle(event, self.now_s)
        for index, command in enumerate(commands):
            self.given.append((session.role, command))
            self._dropped = tuple(commands[index + 1 :])
            self._perform(session, command)

    def _perform(self, session: Session, command: v.Command) -> None:
        if type(command) in self.silent:
            return
        if type(command) in self.failing:
            failed = self.failing[type(command)]
            if isinstance(command, v.Journal):
                failed = msgspec.structs.replace(failed, dropped=self._dropped)
            self.push(session, failed)
            return
        match command:
            case v.Send(message=message) if type(message) not in self.silent:
                if (
                    isinstance(message, Prepare)
                    and self.destination.state is MigrationState.CREATED
                ):
                    self.push(self.destination, v.Begin())
                else:
                    other = Role.DESTINATION if session.role is Role.SOURCE else Role.SOURCE
                    self.push(self.of(other), v.Received(message=message))
            case v.StartTimer():
                self.timers[session.role, command.name] = self.now_s + command.seconds
            case v.StopTimer():
                self.timers.pop((session.role, command.name), None)
            case _:
                for event in self._answers(session, command):
                    self.push(session, event)

    def _guest(self, kind: DomainEventKind) -> v.GuestReported:
        return v.GuestReported(kind=kind, at_s=self.now_s)

    def _answers(self, session: Session, command: v.Command) -> list[v.Event]:
        match command:
            case v.PrepareIncoming():
                return [v.IncomingReady()]
            case v.StartEngine() if session.role is Role.DESTINATION:
                return [self.listening]
            case v.ConnectEngine():
                return [v.EngineConnected(pages_in_use=1000, round_trip_ms=0.1)]
            case v.RunPass():
                return [v.PassFinished(report=self._report(command))]
            case v.AskLeave():
                return [v.LeaveGiven()]
            case v.BeginSwitchover():
                return [self._guest(_K.PAUSED), self._guest(_K.PRE_SWITCHOVER)]
            case v.ContinueSwitchover():
                self.sent = True
                self.push(self.destination, self._guest(_K.DEVICE_STATE_LOADED))
                return [self._guest(_K.DEVICE_STATE_SENT)]
            case v.AbortSwitchover():
                outcome = AbortOutcome.SENT if self.sent else AbortOutcome.RESUMED
                return [v.SwitchoverAborted(outcome=outcome)]
            case v.SwapRecord():
                won = self.record == command.expected
                self.record = command.new if won else self.record
                return [v.RecordSwapped(won=won)]
            case v.ReadRecord():
                return [v.RecordRead(known=True, record=self.record)]
            case v.Fence():
                return [v.Fenced(token=command.token)]
            case v.ResumeGuest():
                self.resumed_on.append(session.role)
                return [v.GuestResumed(at_s=self.now_s)]
            case v.DestroyGuest():
                return [v.GuestDestroyed()]
            case v.InspectGuest():
                return [v.GuestInspected(condition=self._condition(session.role))]
            case _:
                return []

    def _condition(self, role: Role) -> v.GuestCondition:
        if role in self.resumed_on or (role is Role.SOURCE and not self.sent):
            return v.GuestCondition.RUNNING
        return v.GuestCondition.SENT if role is Role.SOURCE else v.GuestCondition.LOADED

    def _report(self, command: v.RunPass) -> PassReport:
        final = command.kind in (PassKind.FINAL, PassKind.MISSING)
        return PassReport(
            number=command.number,
            kind=command.kind,
            seconds=0.01,
            pages=self.told(command.number),
            bytes_sent=4096 * self.told(command.number),
            pending_pages=0 if final else self.pending(command.number),
        )
