"""Drives a hypervisor's own migration for a session, with the same messages as the page engine.

    session                          native driver                 hypervisor
      │ StartEngine (destination) ───────► receive ────────────────────►│
      │◄──────────── EngineListening(host, port) ──────────────────────┤
      │ ConnectEngine (source) ──────────► prepare                      │
      │◄──────────── EngineConnected                                    │
      │ RunPass(FIRST) ──────────────────► begin ══════════════════════►│ iterates by itself
      │◄──────────── PassFinished ◄─────── PASS_BEGAN(2) ───────────────┤
      │ RunPass(DIRTY): the one that is under way                       │
      │◄──────────── PassFinished ◄─────── PASS_BEGAN(3) ───────────────┤
      │ BeginSwitchover ─────────────────► switch_over ────────────────►│
      │◄──────────── PAUSED, PRE_SWITCHOVER ────────────────────────────┤
      │ RunPass(FINAL): nothing to do; the last pages go with the device state
      │ ContinueSwitchover ────────────────────────────────────────────►│

A hypervisor doesn't wait for the session between two passes; one that ends before the session has
asked for it is told when it does. Where next to nothing is left, the hypervisor may stop the guest
before it was told to: the pass under way is over then, and so is each that is asked for later, as
leave to switch over took its time. The switchover's events are told again once it was begun. That
it is the switchover, PRE_SWITCHOVER alone says: a disk's error pauses a guest, too.

It has no post-copy: see `NO_POST_COPY`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from migrator.engine_driver import EngineSettings
from migrator.engine_watch import UNHEARD_S
from migrator.errors import FerryError, HypervisorError
from migrator.model import PAGE_SIZE_BYTES, DomainName, EngineKind, PassKind, PassReport, Role
from migrator.native_port import NativeFigures, NativeMigration, NativeSettings
from migrator.own_threads import STATE_DIRECTORY, in_own_thread
from migrator.ports import DomainEvent, DomainEventKind, HypervisorDriver
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from migrator.session.source import SourceSession
from migrator.steady_clock import SteadyClock
from migrator.turns import Turns

log = logging.getLogger(__name__)

NO_POST_COPY: Final = (
    "the native engine has no post-copy: once the hypervisor's own has begun, a link or a process "
    "that fails leaves neither side with the whole memory, and cancelling it would resume the "
    "source beside a destination that runs"
)
REPORT_S: Final = 0.5
"""Between two looks at how far a pass is: the hypervisor has no event for that."""
STOP_S: Final = 2.0
WORD_S: Final = 1.0
"""That a pre-copy which has failed waits for the destination's word: it may know why, and the guest
runs on meanwhile."""


class NativeDriver:
    """See the module. `feed` takes events; every task is owned here and ended by `close`."""

    def __init__(
        self,
        session: SourceSession | DestinationSession,
        *,
        settings: EngineSettings,
        hypervisor: HypervisorDriver,
        feed: Callable[[v.Event], None],
    ) -> None:
        self._session = session
        self._domain = DomainName(session.domain)
        self._hypervisor = hypervisor
        self._feed = feed
        self._settings = settings
        self._target: tuple[str, int] | None = None
        self._pass: v.RunPass | None = None
        """Which the session waits for."""
        self._begun = False
        self._sent = NativeFigures()
        """As of the end of the last pass that was told."""
        self._clock = SteadyClock()
        self._pass_began_at_s = 0.0
        self._ended_at_s: list[float] = []
        """The ends of passes that were not told yet."""
        self._paused: DomainEvent | None = None
        self._switching: DomainEvent | None = None
        """What the hypervisor said of a switchover, to be told again once one was begun."""
        self._beginning: asyncio.Task[None] | None = None
        self._limit_due = False
        """The hypervisor hasn't taken the cap that it was given last."""
        self._stopped = False
        self._told_at: float | None = None
        """When the hypervisor said last how far it is."""
        self._reporter: asyncio.Task[None] | None = None
        self._turns = Turns(f"migration-{session.migration_id}-native", self._lost, STOP_S)
        self._unsubscribe = hypervisor.subscribe(self._on_domain_event)

    @classmethod
    def wanted(
        cls,
        session: SourceSession | DestinationSession,
        settings: EngineSettings,
        hypervisor: HypervisorDriver,
        feed: Callable[[v.Event], None],
    ) -> NativeDriver | None:
        """One for a session whose request names this engine; None for the others."""
        if session.request.engine is not EngineKind.NATIVE:
            return None
        return cls(session, settings=settings, hypervisor=hypervisor, feed=feed)

    @property
    def _native(self) -> NativeMigration:
        native = self._hypervisor.native
        if native is None:
            raise HypervisorError(f"{self._hypervisor.name} has no migration that Ferry can drive")
        return native

    async def _native_settings(self, channels: int) -> NativeSettings:
        """ConfigError if the node's TLS files can't be used."""
        settings, session = self._settings, self._session
        return NativeSettings(
            bind_address=settings.bind_address,
            destination=session.destination,
            channels=channels,
            bandwidth_bytes_per_s=session.request.bandwidth_bytes_per_s,
            tls=await in_own_thread(STATE_DIRECTORY, settings.tls),
        )

    # --- what the runner asks of an engine ---

    def perform(self, command: v.EngineCommand) -> None:
        """Begin a command; what is asked of the hypervisor goes in order, in the background."""
        match command:
            case v.StartEngine() if self._session.role is Role.DESTINATION:
                self._turns.put("receive", self._receive())
            case v.ConnectEngine():
                self._target = (command.host, command.port)
                self._turns.put("prepare", self._prepare(max(command.secret[:1], default=1)))
            case v.RunPass(kind=PassKind.FIRST):
                self._pass = command
                self._beginning = self._turns.put("begin", self._begin())
            case v.RunPass(kind=PassKind.DIRTY):
                self._pass = command
                if self._switching is not None:  # The guest stands still: there won't be another.
                    self._ended_at_s.append(self._clock.now_s)
                self._tell_later()
            case v.RunPass(kind=PassKind.FINAL):
                report = PassReport(
                    number=command.number, kind=command.kind, seconds=0.0, pages=0, bytes_sent=0
                )
                asyncio.get_running_loop().call_soon(self._feed, v.PassFinished(report=report))
            case v.RunPass() | v.PullPages():
                self._lost(NO_POST_COPY)
            case v.StopEngine():
                self._stop()
            case _:
                pass

    def warm_up(self) -> None:
        """Nothing to warm up: the hypervisor is the engine."""

    def begin_early(self) -> None:
        """There is nothing that could begin before the hypervisor."""

    async def arrived(self) -> None:
        """`StartEngine` follows."""

    def limit_bandwidth(self, bandwidth_bytes_per_s: int | None) -> None:
        """The request has it already."""
        if self._target is not None and not self._stopped:
            self._limit_due = False
            self._turns.put("limit", self._limit())

    @property
    def ending(self) -> bool:
        """There is no process of its own."""
        return False

    async def end_told(self) -> None:
        """At once."""

    @property
    def unheard_s(self) -> float | None:
        """See `MigrationProgress.unheard_s`."""
        if self._told_at is None or self._stopped:
            return None
        silent_s = time.monotonic() - self._told_at
        return silent_s if silent_s > UNHEARD_S else None

    async def drained(self) -> None:
        """Wait until every command begun has ended; bounded by the hypervisor's own bounds."""
        await self._turns.drained()

    async def close(self) -> None:
        self._stop()
        await self._turns.close()

    # --- in the hypervisor's place for a switchover ---

    async def prepare_switchover(self, domain: DomainName) -> None:
        """All is prepared before the first pass."""

    async def begin_switchover(self, domain: DomainName, device_channel: Path) -> None:
        self._pass = None
        if self._switching is None:
            await self._native.switch_over(domain)
        for event in (self._paused, self._switching):
            if event is not None:
                self._feed(v.GuestReported(kind=event.kind, at_s=event.at_s, detail=event.detail))

    # --- in order, in the background ---

    def _lost(self, reason: str) -> None:
        if not self._stopped:
            self._feed(v.EngineLost(reason=reason))

    def _stop(self) -> None:
        self._stopped = True
        self._unsubscribe()
        self._stop_reporting()
        if self._beginning is not None:
            self._beginning.cancel()  # What it has asked the hypervisor for, an abort ends.

    async def _receive(self) -> None:
        # Both ends must have as many connections: the secret's place, which is free, tells it.
        channels = self._settings.streams
        settings = await self._native_settings(channels)
        host, port = await self._native.receive(self._domain, settings)
        self._feed(v.EngineListening(host=host, port=port, secret=bytes([channels])))

    async def _prepare(self, channels: int) -> None:
        await self._native.prepare(self._domain, await self._native_settings(channels))
        status = await self._hypervisor.inspect(self._domain)
        pages = (status.memory_in_use_bytes or 0) // PAGE_SIZE_BYTES
        self._feed(v.EngineConnected(pages_in_use=pages, round_trip_ms=0.0))

    async def _begin(self) -> None:
        assert self._target is not None
        self._pass_began_at_s = self._clock.now_s
        self._begun = True
        await self._native.begin(self._domain, *self._target)
        if not self._stopped:
            self._reporter = self._turns.beside(self._report())

    async def _limit(self) -> None:
        """The newest cap. What the hypervisor doesn't take costs no migration."""
        tried, self._limit_due = self._limit_due, False
        cap = self._session.request.bandwidth_bytes_per_s
        try:
            await self._native.limit_bandwidth(self._domain, cap)
        except FerryError as error:
            self._limit_due = True
            if not tried:
                log.warning(
                    "migration %s: its cap isn't changed yet, and is tried again: %s",
                    *(self._session.migration_id, error),
                )

    # --- what the hypervisor says ---

    def _on_domain_event(self, event: DomainEvent) -> None:
        if event.domain != self._domain or not self._begun:
            return
        match event.kind:
            case DomainEventKind.PASS_BEGAN if event.detail != "1" and self._switching is None:
                self._pass_ended(event)
            case DomainEventKind.PAUSED:
                self._paused = event
            case DomainEventKind.RESUMED:
                self._paused = self._switching = None
            case DomainEventKind.PRE_SWITCHOVER:
                self._switching = event
                self._pass_ended(event)
            case DomainEventKind.DEVICE_STATE_SENT:
                self._stop_reporting()
                self._turns.beside(self._tell_the_end())
            case DomainEventKind.MIGRATION_FAILED:
                self._stop_reporting()
                self._turns.beside(self._tell_failure(event))
            case DomainEventKind.EXITED:
                self._stop_reporting()
            case _:
                pass

    def _pass_ended(self, event: DomainEvent) -> None:
        self._ended_at_s.append(self._clock.heard(event.at_s))
        self._tell_later()

    def _tell_later(self) -> None:
        """Tell the pass that the session waits for, if it is over."""
        if self._ended_at_s and self._pass is not None and not self._stopped:
            self._turns.put("figures", self._tell_pass())

    async def _tell_pass(self) -> None:
        if self._pass is None or not self._ended_at_s:
            return  # Told already, together with one before.
        figures = await self._native.figures(self._domain)
        command = self._pass
        if command is None or not self._ended_at_s or self._stopped:
            return
        ended_at_s = self._ended_at_s[-1]
        self._ended_at_s.clear()
        self._pass = None
        before, self._sent = self._sent, figures
        # A guest that stands still dirties nothing: what is left goes with its device state.
        left = 0 if self._switching is not None else figures.remaining_bytes
        report = PassReport(
            number=command.number,
            kind=command.kind,
            seconds=max(ended_at_s - self._pass_began_at_s, 0.0),
            pages=max(figures.pages - before.pages, 0),
            bytes_sent=max(figures.bytes_sent - before.bytes_sent, 0),
            zero_pages=max(figures.zero_pages - before.zero_pages, 0),
            pending_pages=left // PAGE_SIZE_BYTES,
            payload_bytes=max(figures.pages - before.pages, 0) * PAGE_SIZE_BYTES,
        )
        self._pass_began_at_s = ended_at_s
        self._feed(v.PassFinished(report=report))

    async def _report(self) -> None:
        """Until the migration is over: how far it is."""
        last, last_at_s = NativeFigures(), time.monotonic()
        while not self._stopped:
            await asyncio.sleep(REPORT_S)
            try:
                figures = await self._native.figures(self._domain)
            except FerryError:
                continue  # What ended it is told by its event.
            now = time.monotonic()
            rate = max(figures.bytes_sent - last.bytes_sent, 0) / (now - last_at_s)
            last, last_at_s = figures, now
            self._tell_figures(figures, rate)
            if self._limit_due:
                await self._limit()

    def _stop_reporting(self) -> None:
        if self._reporter is not None:
            self._reporter.cancel()

    async def _tell_failure(self, event: DomainEvent) -> None:
        """Of a switchover the session hears itself; a failed pre-copy is an engine lost."""
        try:
            why = (await self._native.figures(self._domain)).error
        except FerryError:
            why = ""  # Its event says it all, then.
        await asyncio.sleep(WORD_S)
        self._lost(f"the hypervisor gave its migration up: {why or event.detail}")

    async def _tell_the_end(self) -> None:
        """The last pages are known only now. The handoff doesn't wait for this."""
        try:
            figures = await self._native.figures(self._domain)
        except FerryError:
            return
        self._tell_figures(figures, 0.0)

    def _tell_figures(self, figures: NativeFigures, rate: float) -> None:
        self._told_at = time.monotonic()
        self._feed(
            v.EngineReported(
                bytes_sent=figures.bytes_sent,
                remaining_bytes=figures.remaining_bytes,
                throughput_bytes_per_s=rate,
            )
        )
