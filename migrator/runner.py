"""The runner: performs a session's commands by the real drivers, and feeds it what comes of it.

    events ──► session.handle ──► commands ──► lanes ──► drivers
       ▲                                         │
       └─────────────────────────────────────────┘

Commands begin in the order in which they were given. `Journal` holds up those behind it until it
is written, or has failed, which a disk that hangs does, too. The others go to lanes: within a lane
(guest, record, engine) one at a time, the lanes side by side. AbortSwitchover and DestroyGuest
don't wait for what the guest's lane is at: they end it first. Sends, timers and passes take effect
at once.

One runner serves one side of one migration. It owns its engine, its timers and its tasks; `close`
ends them all, and leaves the guest and the record as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

import msgspec

from migrator.engine_driver import EngineDriver, EngineSettings
from migrator.errors import (
    FerryError,
    HypervisorError,
    NotFoundError,
    NotResumedError,
    RefusedError,
)
from migrator.hold_points import hold
from migrator.journal import MigrationJournal
from migrator.journal_entry import entry_of
from migrator.lane import Lane
from migrator.model import ENDED, DomainName, DomainState, FencingToken, MigrationState, Role
from migrator.native_driver import NativeDriver
from migrator.own_threads import STATE_DIRECTORY, in_own_thread
from migrator.ports import (
    AbortOutcome,
    DomainEvent,
    DomainEventKind,
    HypervisorDriver,
    OwnershipStore,
)
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from migrator.session.messages import SessionMessage
from migrator.session.source import SourceSession
from migrator.site import Session as Session
from migrator.site import Site as Site
from migrator.steady_clock import SteadyClock

log = logging.getLogger(__name__)

STEP_S: Final = 30.0
"""No single command takes longer; then it failed with an unknown outcome."""
NOTE_S: Final = 1.0
"""That a guest which stands still waits for a note: one that isn't durable, precedes a resume, or
says so (`standing`)."""
FINISH_GAP_S: Final = 10.0
"""The longest pause between tries to journal a migration's end (a full disk, say)."""
_CLOSE_S: Final = 3.0


class Runner:
    """See the module. `on_change` is called after each event; `on_finish` once, at the end."""

    def __init__(
        self,
        session: Session,
        *,
        hypervisor: HypervisorDriver,
        ownership: OwnershipStore,
        journal: MigrationJournal,
        site: Site,
        engine: EngineSettings,
        boot_id: str,
        on_change: Callable[[Runner], None],
        on_finish: Callable[[Runner], None],
    ) -> None:
        self.session = session
        self.domain = DomainName(session.domain)
        source = session.role is Role.SOURCE
        self.peer = session.destination if source else session.source
        self._peer_role = Role.DESTINATION if source else Role.SOURCE
        self._hypervisor = hypervisor
        self._ownership = ownership
        self._journal = journal
        self._site = site
        self._boot_id = boot_id
        self._on_change = on_change
        self._on_finish = on_finish
        self._clock = SteadyClock()
        self._commands: deque[tuple[int, v.Command]] = deque()
        self._batch = 0
        self._journalling: asyncio.Task[None] | None = None
        self._timers: dict[v.TimerName, asyncio.TimerHandle] = {}
        self._guest_lane = Lane(f"migration-{session.migration_id}-guest")
        self._record_lane = Lane(f"migration-{session.migration_id}-record")
        self._sends = Lane(f"migration-{session.migration_id}-send")
        self._aside: set[asyncio.Task[None]] = set()
        self._leave: asyncio.Task[None] | None = None
        self._end_journalled = asyncio.Event()
        self._closed = False
        self.device_channel = engine.run_directory / f"{session.migration_id}.dev"
        native = NativeDriver.wanted(session, engine, hypervisor, self.feed)
        self._engine = native or EngineDriver(
            session,
            settings=engine,
            hypervisor=hypervisor,
            device_channel=self.device_channel,
            feed=self.feed,
        )
        self._switchover = native or hypervisor
        self._unsubscribe = hypervisor.subscribe(self._on_domain_event)

    # --- events in ---

    def feed(self, event: v.Event) -> None:
        """Give the session an event; its commands begin before this returns."""
        if self._closed:
            return
        before = self.session.state
        if isinstance(event, v.GuestReported | v.DisksDeactivated):
            event = msgspec.structs.replace(event, at_s=self._clock.heard(event.at_s))
        elif isinstance(event, v.GuestResumed):  # Maybe long ago, before this agent began.
            event = msgspec.structs.replace(event, at_s=self._clock.of(event.at_s))
        commands = self.session.handle(event, self._clock.now_s)
        if self.session.state is not before:
            why = f": {self.session.error}" if self.session.error else ""
            log.info(
                "migration %s of %s: %s: %s -> %s (%s)%s",
                *(self.session.migration_id, self.domain, self.session.role),
                *(before, self.session.state, type(event).__name__, why),
            )
        self._batch += 1
        self._commands.extend((self._batch, command) for command in commands)
        self._pump()
        self._on_change(self)

    async def journalled(self, most_s: float) -> None:
        """Return when the next agent will know what the session was told, or after `most_s`: a disk
        may hang, or be full, and then the session goes on all the same.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                while self._journalling is not None and not self._closed:
                    await asyncio.wait((self._journalling,))
                if self.session.state in ENDED:
                    await self._end_journalled.wait()

    def limit_bandwidth(self, bandwidth_bytes_per_s: int | None) -> None:
        """Change the page streams' cap; None lifts it. In force within a frame."""
        session = self.session
        session.request = msgspec.structs.replace(
            session.request, bandwidth_bytes_per_s=bandwidth_bytes_per_s
        )
        self._engine.limit_bandwidth(bandwidth_bytes_per_s)
        if session.state is MigrationState.POSTCOPY:  # Before that a note follows in any case.
            self._note()
        self._on_change(self)

    @property
    def unheard_s(self) -> float | None:
        """See `MigrationProgress.unheard_s`."""
        unheard_s = self._engine.unheard_s
        if unheard_s is None and isinstance(self.session, SourceSession):
            unheard_s = self.session.standing_s(self._clock.now_s)
        return unheard_s

    def _note(self) -> None:
        """Journal what no event has told the session: the next agent's engine goes by it."""
        self._batch += 1
        self._commands.append((self._batch, v.Journal(state=self.session.state, durable=False)))
        self._pump()

    def _on_domain_event(self, event: DomainEvent) -> None:
        if event.domain != self.domain:
            return
        report = v.GuestReported(kind=event.kind, at_s=event.at_s, detail=event.detail)
        failure = event.kind in (DomainEventKind.EXITED, DomainEventKind.MIGRATION_FAILED)
        if failure and self._engine.ending:
            self._do_aside(self._after_engine(report))
        else:
            self.feed(report)

    async def _after_engine(self, report: v.GuestReported) -> None:
        """A hypervisor fails when its engine ends, and may say so first: the cause comes first."""
        await self._engine.end_told()
        self.feed(report)

    async def close(self) -> None:
        """End everything that is the runner's own; guest, record and journal stay as they are."""
        if self._closed:
            return
        self._closed = True
        self._end_journalled.set()
        self._unsubscribe()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._stop_asking()
        if self._journalling is not None:
            self._journalling.cancel()
        await self._sends.close()
        await self._guest_lane.close()
        await self._record_lane.close()
        await self._engine.close()
        if self._aside:
            _, late = await asyncio.wait(self._aside, timeout=_CLOSE_S)
            for task in late:
                task.cancel()
        with contextlib.suppress(OSError):
            async with asyncio.timeout(_CLOSE_S):
                await in_own_thread(
                    STATE_DIRECTORY, lambda: self.device_channel.unlink(missing_ok=True)
                )

    # --- commands out ---

    def _pump(self) -> None:
        while self._commands and self._journalling is None and not self._closed:
            batch, command = self._commands.popleft()
            if isinstance(command, v.Journal):
                self._journalling = asyncio.create_task(self._write_journal(batch, command))
                return
            self._perform(command)

    async def _write_journal(self, batch: int, command: v.Journal) -> None:
        entry = entry_of(self.session, boot_id=self._boot_id, resuming=command.resuming)
        hurried = command.resuming or command.standing or not command.durable
        most_s = NOTE_S if hurried else STEP_S
        failure: str | None = None
        try:
            async with asyncio.timeout(most_s):
                await self._journal.write(entry, durable=command.durable)
        except FerryError as error:
            failure = str(error)
        except TimeoutError:
            failure = f"{self._journal.folder} hangs: nothing was journalled within {most_s:g} s"
        self._journalling = None
        if failure is not None:
            dropped: list[v.Command] = []  # What it was to announce must not happen.
            while self._commands and self._commands[0][0] == batch:
                dropped.append(self._commands.popleft()[1])
            self.feed(v.CommandFailed(command="Journal", error=failure, dropped=tuple(dropped)))
        self._pump()

    def _perform(self, command: v.Command) -> None:
        match command:
            case v.Send():
                self._sends.put(self._send(command.message))
            case v.StartTimer():
                self._start_timer(command)
            case v.StopTimer():
                timer = self._timers.pop(command.name, None)
                if timer is not None:
                    timer.cancel()
            case _ if isinstance(command, v.EngineCommand):
                self._engine.perform(command)
            case v.SwapRecord() | v.ReadRecord():
                self._record_lane.put(self._step(command, partial(self._on_record, command)))
            case v.PrepareIncoming():
                self._engine.warm_up()
                self._record_lane.put(self._look_at_record())
                self._guest_lane.put(self._step(command, partial(self._on_guest, command)))
            case v.AskLeave() if isinstance(self.session, SourceSession):
                self._leave = self._do_aside(self._ask_leave(self.session, command.part))
            case v.AbortSwitchover() | v.DestroyGuest():
                self._stop_asking()
                self._guest_lane.clear()
                self._guest_lane.put(self._step(command, partial(self._on_guest, command)))
            case v.Announce():
                self._do_aside(self._step(command, partial(self._site.announce, self.session)))
            case v.Finish():
                self._do_aside(self._finish())
            case _:
                self._guest_lane.put(self._step(command, partial(self._on_guest, command)))

    def _do_aside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)
        return task

    async def _ask_leave(self, session: SourceSession, part: v.LeavePart) -> None:
        """Not a step: hooks may take minutes. The session's own timers bound it."""
        try:
            await hold(session.role, "AskLeave")
            self.feed(v.LeaveGiven(detail=await self._site.leave(session, part)))
        except FerryError as error:
            self.feed(v.LeaveRefused(reason=str(error)))

    def _stop_asking(self) -> None:
        if self._leave is not None:
            self._leave.cancel()

    async def _step(
        self, command: v.Command, work: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """Perform one command; its failure is an event."""
        name = type(command).__name__
        try:
            async with asyncio.timeout(STEP_S):
                await hold(self.session.role, name)
                await work()
        except RefusedError as error:
            self.feed(v.CommandFailed(command=name, error=str(error), reasons=error.reasons))
        except NotResumedError as error:
            self.feed(v.CommandFailed(command=name, error=str(error), without_effect=True))
        except FerryError as error:
            log.warning("migration %s: %s: %s", self.session.migration_id, name, error)
            self.feed(v.CommandFailed(command=name, error=str(error)))
        except TimeoutError:
            self.feed(v.CommandFailed(command=name, error=f"not done within {STEP_S:g} s"))
        except Exception as error:  # A driver's bug must not leave the session waiting for ever.
            log.exception("migration %s: %s", self.session.migration_id, name)
            self.feed(v.CommandFailed(command=name, error=f"{type(error).__name__}: {error}"))

    async def _send(self, message: SessionMessage) -> None:
        await hold(self.session.role, type(message).__name__)
        try:
            await self._site.send(self.peer, self.session.migration_id, self._peer_role, message)
        except FerryError as error:  # The session repeats what matters.
            log.info("migration %s: a message was lost: %s", self.session.migration_id, error)

    def _start_timer(self, command: v.StartTimer) -> None:
        old = self._timers.pop(command.name, None)
        if old is not None:
            old.cancel()

        def fire() -> None:
            self._timers.pop(command.name, None)
            self.feed(v.TimerFired(name=command.name))

        loop = asyncio.get_running_loop()
        self._timers[command.name] = loop.call_later(command.seconds, fire)

    async def _look_at_record(self) -> None:
        """So that the store has seen the record by the time that it must change hands."""
        with contextlib.suppress(FerryError):
            await self._ownership.read(self.domain)

    async def _on_record(self, command: v.SwapRecord | v.ReadRecord) -> None:
        try:
            if isinstance(command, v.SwapRecord):
                won = await self._ownership.compare_and_set(command.expected, command.new)
                self.feed(v.RecordSwapped(won=won))
            else:
                record = await self._ownership.read(self.domain)
                self.feed(v.RecordRead(known=True, record=record))
        except FerryError as error:
            log.warning("migration %s: the record: %s", self.session.migration_id, error)
            if isinstance(command, v.SwapRecord):
                self.feed(v.RecordSwapped(won=None))
            else:
                self.feed(v.RecordRead(known=False))

    async def _on_guest(self, command: v.Command) -> None:
        driver, domain = self._hypervisor, self.domain
        match command:
            case v.PrepareIncoming() if isinstance(self.session, DestinationSession):
                await self._site.prepare_incoming(
                    self.session, self.device_channel, self._begin_early
                )
                await self._engine.arrived()
                self.feed(v.IncomingReady())
            case v.PrepareSwitchover():
                await self._switchover.prepare_switchover(domain)
                await self._site.prepare_departure(self.session)
            case v.BeginSwitchover():
                await self._site.depart(self.session)
                await self._switchover.begin_switchover(domain, self.device_channel)
            case v.ContinueSwitchover():
                await driver.continue_switchover(domain)
            case v.AbortSwitchover():
                outcome = await driver.abort_switchover(domain)
                if outcome is AbortOutcome.RESUMED:  # The end finds the guest free of its engine.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_CLOSE_S):
                            await self._engine.drained()
                self.feed(v.SwitchoverAborted(outcome=outcome))
            case v.Fence():
                took = await self._site.fence(self.session, FencingToken(command.token))
                self.feed(v.Fenced(token=command.token, detail=took))
            case v.ResumeGuest():
                self.feed(v.GuestResumed(at_s=await self._resume()))
            case v.DestroyGuest():
                await self._site.destroy(self.session)
                self.feed(v.GuestDestroyed())
                await self._site.release(self.session)
            case v.InspectGuest():
                status = await driver.inspect(domain)
                if status.state is DomainState.UNKNOWN:
                    raise HypervisorError(f"{domain} doesn't say what it does: {status.reason}")
                self.feed(v.GuestInspected(condition=_CONDITIONS[status.state]))

    def _begin_early(self) -> None:
        """The hypervisor isn't up yet, and may fail to be: then PrepareIncoming has failed."""
        self._engine.begin_early()
        self.feed(v.IncomingReady(early=True))

    async def _resume(self) -> float:
        try:
            return await self._hypervisor.resume(self.domain)
        except NotFoundError as error:  # Its process was gone before: nothing was sent to it.
            raise NotResumedError(f"{self.domain} was not resumed: {error}") from error

    async def _finish(self) -> None:
        """The last word: journalled, so that it can be said after a restart too.

        Tried until it succeeds or the agent ends: before that, nobody else may have the domain.
        """
        await self._guest_lane.drained(STEP_S)  # A restart before it has to give back the rest.
        entry = entry_of(self.session, boot_id=self._boot_id)
        gap_s = 1.0
        while not self._closed:
            try:
                await self._journal.write(entry)
                self._end_journalled.set()
                break
            except FerryError as error:
                log.error("migration %s: its end isn't journalled: %s", entry.migration_id, error)
                await asyncio.sleep(gap_s)
                gap_s = min(gap_s * 2.0, FINISH_GAP_S)
        await self._engine.drained()
        await self._sends.drained(_CLOSE_S)
        self._on_finish(self)


_CONDITIONS: Final = {
    DomainState.RUNNING: v.GuestCondition.RUNNING,
    DomainState.PRE_SWITCHOVER: v.GuestCondition.SWITCHING,
    DomainState.POSTMIGRATE: v.GuestCondition.SENT,
    DomainState.INCOMING: v.GuestCondition.INCOMING,
    DomainState.LOADED: v.GuestCondition.LOADED,
    DomainState.STOPPED: v.GuestCondition.GONE,
    DomainState.STARTING: v.GuestCondition.STOPPED_OTHERWISE,
    DomainState.PAUSED: v.GuestCondition.STOPPED_OTHERWISE,
    DomainState.IO_ERROR: v.GuestCondition.STOPPED_OTHERWISE,
    DomainState.CRASHED: v.GuestCondition.STOPPED_OTHERWISE,
}
