"""One QEMU process that we look after: its record, process, monitor, and what we know of it.

    process exits ──▶ _finish: monitor closed, record removed, EXITED, `gone` set
    monitor breaks ─▶ _reconnect: first monitor, then the spare one, until it works or the exit
    QMP event ──────▶ _on_event: what we know is updated, a DomainEvent goes out

What we know comes from events and is refreshed by queries after each (re)connection, so that the
blackout's path (`resume`, switchover) needs no query.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import msgspec

from hypervisor.qemu import io_errors, records
from hypervisor.qemu.config import MONITORS, monitor_path
from hypervisor.qemu.offload import offload_to_disk
from hypervisor.qemu.process import QemuProcess
from hypervisor.qemu.qmp import Monitor, QmpEvent, QmpNotSent
from hypervisor.qemu.records import ProcessRecord
from hypervisor.qemu.status import MigrationStatus, domain_state
from hypervisor.qemu.urgency import Urgency
from migrator.errors import HypervisorError, words
from migrator.model import DomainName, DomainState
from migrator.ports import DomainEvent, DomainEventKind

log = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 5.0
"""Commands that QEMU answers from its main loop, which disk I/O may hold up for a while."""
CONNECT_TIMEOUT_S = 10.0
PAUSE_TIMEOUT_S = 30.0
"""`stop` waits for the disks' I/O, which a lost storage server holds up."""
RECORD_AGAIN_S = 5.0
"""Between tries to write a record on a disk that takes none."""
DISK_S = 1.0
"""That the end of a guest waits for the state directory's disk, which may hang."""
_RECONNECT_PAUSES_S = (0.1, 0.5, 1.0, 2.0, 5.0)


class Guest:
    """A live process. Made by the driver in the event loop; ends by `gone` or by `let_go`."""

    def __init__(
        self,
        directory: Path,
        record: ProcessRecord,
        process: QemuProcess,
        emit: Callable[[DomainEvent], None],
        on_gone: Callable[[Guest], None],
    ) -> None:
        self.directory = directory
        self.record = record
        self.process = process
        self.urgency = Urgency(process.pid)
        self.gone = asyncio.Event()
        self.said: Callable[[], str] | None = None
        """While it starts: what tells why it fails."""
        self.crash_stays = False
        """Until somebody has dealt with it, be it the next agent: so does its folder."""
        self.told_to_end = False
        """QEMU said that it was told to end, by the guest, a signal or a monitor."""
        self.end_reason: str | None = None
        """Why we end the process, for the EXITED event; set by the driver."""
        self.loaded = False
        """A destination whose device state is in place."""
        self.run_state_seen = ""
        """QEMU's run state when we last refreshed."""
        self.migration = MigrationStatus.NONE
        self.prepared = False
        self.awaits_pause = False
        """A switchover was begun and its PAUSED has not gone out yet."""
        self.io_error: str | None = None
        self.resumes = 0
        """How often QEMU has said RESUME."""
        self.resumed_at_s = 0.0
        """On QEMU's clock, at the last one; 0: none was heard."""
        self._resets = 0
        self.executed = 0
        """Commands sent so far."""
        self._emit_event = emit
        self._on_gone = on_gone
        self._monitor: Monitor | None = None
        self._connecting = asyncio.Lock()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._saving: asyncio.Task[None] | None = None
        self._unsaved = ""
        """Why the record on disk doesn't say yet that it has run."""
        self.removal: asyncio.Task[None] | None = None
        """Of its folder, once it has ended; done by then, unless the disk hangs."""
        process.watch(self._on_exit)

    @property
    def name(self) -> DomainName:
        return DomainName(self.record.spec.name)

    @property
    def incoming(self) -> bool:
        """A destination whose vCPUs have never run."""
        return self.record.incoming and not self.record.has_run

    # --- the monitor -----------------------------------------------------------------------

    async def connect(
        self, *, timeout_s: float = CONNECT_TIMEOUT_S, answer_s: float = COMMAND_TIMEOUT_S
    ) -> None:
        """Connect to a free monitor, and learn the guest's state. Idempotent.

        HypervisorError also if it doesn't answer within `answer_s`; it stays connected then.
        """
        async with self._connecting:
            if self.process.exited:  # Its successor may listen there by now.
                raise QmpNotSent(f"{self.name}: QEMU has ended")
            if self._monitor is not None and self._monitor.connected:
                if not self.run_state_seen:
                    await self._catch_up(answer_s)
                return
            failure: HypervisorError | None = None
            for index in range(MONITORS):
                monitor = Monitor(self.name, self._on_event, self._on_lost)
                try:
                    await monitor.connect(
                        monitor_path(self.directory, index), timeout_s=timeout_s / MONITORS
                    )
                except HypervisorError as error:
                    failure = error
                    await monitor.close()
                else:
                    self._monitor = monitor
                    break
            else:
                assert failure is not None
                raise failure
        await self._catch_up(answer_s)

    async def _catch_up(self, answer_s: float) -> None:
        """Learn what was told while nobody listened. A disk's error has to be acted upon."""
        if await self.refresh(timeout_s=answer_s) == "io-error":
            self._emit(DomainEventKind.IO_ERROR, time.time(), self.io_error or "")

    async def refresh(self, *, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Ask QEMU for what the events would have told. Returns its run state."""
        run_state = await self.run_state(timeout_s=timeout_s)
        self.run_state_seen = run_state
        answer = await self.execute("query-migrate", timeout_s=timeout_s)
        status = answer.get("status", "none") if isinstance(answer, Mapping) else "none"
        self.migration = MigrationStatus.parse(status)
        self.loaded = self.incoming and run_state != "inmigrate"
        if run_state == "running":
            self._runs()
        self._wake()
        return run_state

    async def run_state(self, *, timeout_s: float) -> str:
        """QEMU's run state, from `query-status`."""
        answer = await self.execute("query-status", timeout_s=timeout_s)
        return str(answer.get("status", "")) if isinstance(answer, Mapping) else ""

    def domain_state(self, run_state: str) -> tuple[DomainState, str | None]:
        """Our state for QEMU's `run_state`, by what else we know; and why."""
        return domain_state(
            run_state, self.migration, incoming=self.incoming, has_run=self.record.has_run
        )

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> object:
        """Run a QMP command. HypervisorError (see qmp.py); says so if the process is gone."""
        if self.process.exited:
            raise QmpNotSent(f"{self.name}: QEMU has ended")
        if self._monitor is None:
            raise QmpNotSent(f"{self.name}: not connected to its monitor")
        self.executed += 1
        return await self._monitor.execute(command, arguments, timeout_s=timeout_s)

    async def yank_migration(self) -> None:
        """Cut the migration's socket, also while QEMU's main loop hangs in it. Never raises."""
        if self._monitor is not None:
            with contextlib.suppress(HypervisorError):
                await self._monitor.execute_out_of_band(
                    "yank", {"instances": [{"type": "migration"}]}, timeout_s=1.0
                )

    def _on_lost(self) -> None:
        self._wake()
        self.reconnect_later()

    def reconnect_later(self) -> None:
        """Keep trying to connect, in the background, for as long as the process lives."""
        self.spawn_task(self._reconnect(), "reconnect")

    async def _reconnect(self) -> None:
        attempt = 0
        while not self.process.exited:  # Bounded by the process's life and by `let_go`.
            await asyncio.sleep(_RECONNECT_PAUSES_S[min(attempt, len(_RECONNECT_PAUSES_S) - 1)])
            attempt += 1
            try:
                await self.connect()
            except HypervisorError as error:
                if attempt == 1 and not self.process.exited and self.end_reason is None:
                    log.warning("%s: lost the connection to its monitor: %s", self.name, error)
            else:
                return

    # --- events ----------------------------------------------------------------------------

    def _on_event(self, event: QmpEvent) -> None:
        match event.name:
            case "STOP":
                self.awaits_pause = False
                self._emit(DomainEventKind.PAUSED, event.at_s)
            case "RESUME":
                self._on_resume(event.at_s)
            case "MIGRATION":
                self._on_migration(MigrationStatus.parse(event.data.get("status")), event.at_s)
            case "MIGRATION_PASS":
                number = str(event.data.get("pass", ""))
                self._emit(DomainEventKind.PASS_BEGAN, event.at_s, number)
            case "BLOCK_IO_ERROR":
                self.io_error = io_errors.describe_event(event.data, self.record.spec)
                self._emit(DomainEventKind.IO_ERROR, event.at_s, self.io_error)
            case "GUEST_PANICKED":
                self._emit(DomainEventKind.PANICKED, event.at_s, "the guest panicked")
            case "RESET":
                self._resets += 1
            case "SHUTDOWN":
                self.told_to_end = True
                if event.data.get("guest") is True:
                    self.end_reason = self.end_reason or "powered off by the guest"
        self._wake()

    def _on_resume(self, at_s: float) -> None:
        self.io_error = None
        self.resumed_at_s = at_s
        self.resumes += 1
        self._runs()
        self._emit(DomainEventKind.RESUMED, at_s)

    def _runs(self) -> None:
        self._has_run()
        if self.urgency.possible:
            self.spawn_task(self.urgency.calm_soon(), "calm")

    def _on_migration(self, status: MigrationStatus, at_s: float) -> None:
        self.migration = status
        match status:
            case MigrationStatus.PRE_SWITCHOVER:
                if self.awaits_pause:  # It was paused already: QEMU had nothing to stop.
                    self.awaits_pause = False
                    self._emit(DomainEventKind.PAUSED, at_s)
                self._emit(DomainEventKind.PRE_SWITCHOVER, at_s)
            case MigrationStatus.COMPLETED if self.incoming:
                self.loaded = True
                self._emit(DomainEventKind.DEVICE_STATE_LOADED, at_s)
                self.spawn_task(self.urgency.loaded(), "loaded")
            case MigrationStatus.COMPLETED:
                self._emit(DomainEventKind.DEVICE_STATE_SENT, at_s)
            case MigrationStatus.FAILED | MigrationStatus.CANCELLED:
                self._emit(DomainEventKind.MIGRATION_FAILED, at_s, str(status))

    def _emit(
        self, kind: DomainEventKind, at_s: float, detail: str = "", *, crashed: bool = False
    ) -> None:
        self._emit_event(
            DomainEvent(domain=self.name, kind=kind, at_s=at_s, detail=detail, crashed=crashed)
        )

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_until(self, predicate: Callable[[], bool], *, timeout_s: float) -> bool:
        """Whether `predicate` (of what we know) comes true in time. False if QEMU ends first."""
        try:
            async with asyncio.timeout(timeout_s):
                while not predicate():
                    if self.process.exited:
                        return False
                    await self._changed.wait()
        except TimeoutError:
            return predicate()
        return True

    # --- running ---------------------------------------------------------------------------

    async def reset(self) -> None:
        """Reset the machine; returns when it is done. HypervisorError if that isn't heard."""
        before = self._resets
        await self.execute("system_reset")
        if not await self.wait_until(lambda: self._resets > before, timeout_s=COMMAND_TIMEOUT_S):
            raise HypervisorError(f"{self.name}: QEMU didn't report the reset")

    def _has_run(self) -> None:
        """From now on a domain like any other, however it was started; so says the record."""
        if self.record.has_run:
            return
        if self.incoming:  # What QEMU said of the migration was about its other half.
            self.loaded = False
            self.migration = MigrationStatus.NONE
        self.record = msgspec.structs.replace(self.record, has_run=True)
        self._saving = asyncio.create_task(self._save_record(), name=f"{self.name}-save-record")

    async def record_saved(self) -> None:
        """Wait until the record on disk is as ours."""
        if self._saving is not None:
            await asyncio.wait([self._saving])

    async def pause(self) -> None:
        """HypervisorError, too, while its record doesn't say that it has run: the next agent would
        take it, paused, for a copy that never ran."""
        if self._saving is not None:
            await asyncio.wait({self._saving}, timeout=DISK_S)
        if self._unsaved:
            raise HypervisorError(
                f"{self.name} was not paused: that it runs can't be recorded in {self.directory}: "
                f"{self._unsaved}"
            )
        await self.execute("stop", timeout_s=PAUSE_TIMEOUT_S)

    async def _save_record(self) -> None:
        record = self.record
        try:
            await offload_to_disk(lambda: records.write_record(self.directory, record))
            self._unsaved = ""
        except OSError as error:
            # Harmless while this agent lives, and where the next one finds that it runs.
            if not self._unsaved:
                log.warning("%s: can't record yet that it has run: %s", self.name, error)
            self._unsaved = str(error)
            self.spawn_task(self._save_record_later(), "save-record-later")

    async def _save_record_later(self) -> None:
        await asyncio.sleep(RECORD_AGAIN_S)
        if not self.process.exited:
            await self._save_record()

    # --- the end ---------------------------------------------------------------------------

    def _on_exit(self) -> None:
        self._wake()
        self.spawn_task(self._finish(), "finish")

    async def expect_end(self) -> None:
        """It is about to be killed: note that, for an agent that finds it ended. Never fails: no
        disk that is full, takes no writes or hangs keeps alive what has to end.
        """
        try:
            async with asyncio.timeout(DISK_S):
                await offload_to_disk(lambda: records.expect_end(self.directory))
        except OSError as error:  # A TimeoutError is one.
            why = words(error) if error.errno else f"no answer in {DISK_S:g} s"
            log.error("%s: that its end is wanted can't be noted: %s", self.name, why)

    async def _finish(self) -> None:
        """Also with a disk that hangs, within DISK_S: others wait for what became of the guest."""
        loop = asyncio.get_running_loop()
        by_s = loop.time() + DISK_S
        if self._saving is not None:
            await asyncio.wait({self._saving}, timeout=DISK_S)
        detail = await self._exit_detail(by_s)
        if self._monitor is not None:
            await self._monitor.hear_out()
            await self._monitor.close()
        # A destination's copy may be the domain before it runs; whether it is, the record tells.
        crashed = self.end_reason is None and not self.told_to_end
        crashed = crashed and (self.record.has_run or self.record.incoming)
        if crashed and self.process.found_ending:  # What it was told before, its note knows.
            crashed = await self._noted_crash(by_s)
        self.crash_stays = crashed and self.record.has_run
        async with self._connecting:
            if not self.crash_stays:
                self.removal = asyncio.create_task(self._remove_folder())
                await asyncio.wait({self.removal}, timeout=max(0.0, by_s - loop.time()))
        self._on_gone(self)
        self.process.release()
        self.gone.set()
        self._emit(DomainEventKind.EXITED, time.time(), detail, crashed=crashed)

    async def _noted_crash(self, by_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(by_s):
                return await offload_to_disk(lambda: records.crashed(self.directory, self.record))
        return False

    async def _remove_folder(self) -> None:
        await offload_to_disk(lambda: records.remove_directory(self.directory))

    async def _exit_detail(self, by_s: float) -> str:
        said = ""
        if self.said is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(by_s):
                    said = await offload_to_disk(self.said)
        how = self.process.how_it_ended
        return (self.end_reason or f"QEMU {how}") + (f": {said}" if said else "")

    async def let_go(self) -> None:
        """Stop looking after it; the process lives on, undisturbed. Idempotent."""
        await self.record_saved()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._monitor is not None:
            await self._monitor.close()
        self.process.release()

    def spawn_task(self, work: Coroutine[None, None, None], what: str) -> None:
        """Run something in the background that ends with us."""
        self.keep(asyncio.create_task(work, name=f"{self.name}-{what}"))

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Let what somebody else has begun end with us."""
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s: in the background: %s", self.name, error)
