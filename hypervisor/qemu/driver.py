"""The QEMU driver: domains as detached QEMU processes, found again after the agent's restart.

The driver joins the parts: launcher (processes), guest (one process that we look after), resuming
(its vCPUs), switchover (device state), memory (the page engine's view), host (capabilities).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import ClassVar

from hypervisor.qemu import (
    held_taps,
    launcher,
    leftovers,
    logs,
    paused_by,
    records,
    resuming,
    switchover,
)
from hypervisor.qemu.command_line import QemuLaunch
from hypervisor.qemu.config import (
    MONITORS,
    Accelerator,
    QemuConfig,
    prepare_directories,
)
from hypervisor.qemu.cpu_features import lacking_in_guest
from hypervisor.qemu.early_pages import EarlyPages
from hypervisor.qemu.guest import Guest
from hypervisor.qemu.host import HostProbe
from hypervisor.qemu.launcher import Launched
from hypervisor.qemu.memory import memory_in_use_bytes, open_memory
from hypervisor.qemu.native import QemuNative
from hypervisor.qemu.offload import offload, offload_or_undone, offload_to_disk
from hypervisor.qemu.process import QemuProcess
from hypervisor.qemu.qmp import QmpDisconnected
from migrator.errors import HypervisorError, NotFoundError
from migrator.model import (
    DomainName,
    DomainSpec,
    DomainState,
    DomainStatus,
    FencingToken,
    HypervisorCapabilities,
)
from migrator.native_port import NativeMigration
from migrator.ports import (
    AbortOutcome,
    DomainEvent,
    GuestMemory,
    HypervisorDriver,
    Launch,
    MemoryRegion,
)

log = logging.getLogger(__name__)

LAUNCH_TIMEOUT_S = 30.0
"""From spawning QEMU to its first answer: it opens its disks in between."""
KILL_TIMEOUT_S = 30.0
"""From SIGKILL to the end: a process in an uninterruptible I/O is in no hurry."""
ADOPT_TIMEOUT_S = 1.0
"""For a monitor's greeting, and for the first answer, of a QEMU that is adopted. One that waits for
a missing page of its guest (post-copy) gives neither before the agent that adopts it has made an
engine that fills it in."""
TERMINATE_TIMEOUT_S = 5.0
"""From SIGTERM to the end: QEMU flushes its disks."""
INSPECT_TIMEOUT_S = 2.0
"""All that one is asked; other agents wait longer (`STATUS_TIMEOUT_S`), for all of a node's."""
EXIT_NOTICE_TIMEOUT_S = 0.2
"""From a process's last word on its monitor to its end."""
POWER_BUTTON_PERIOD_S = 5.0
"""A guest that is still booting ignores the power button: it is pressed again."""


class QemuDriver(HypervisorDriver):
    """One node's QEMU. `state_directory` is ours alone, on a local disk."""

    name: ClassVar[str] = "qemu"

    def __init__(
        self,
        state_directory: Path,
        binary: str = "qemu-system-x86_64",
        accelerator: Accelerator = "auto",
    ) -> None:
        self.config = QemuConfig(
            state_directory=state_directory.absolute(), binary=binary, accelerator=accelerator
        )
        self._probe = HostProbe(self.config)
        self._guests: dict[str, Guest] = {}
        self._launching: set[str] = set()
        self._crashed: dict[DomainName, Path] = {}
        self._unreadable: dict[DomainName, str] = {}
        """Domains that may run here, and whose records can't be read: that in words."""
        self._removals: dict[DomainName, asyncio.Task[None]] = {}
        """Of the folders of guests that ended while the disk hung."""
        self._subscribers: list[Callable[[DomainEvent], None]] = []
        self._lock: int | None = None
        self._native = QemuNative(self._guest)
        self._early_pages = EarlyPages()
        self._trimmer = logs.Trimmer()

    # --- the driver's life -----------------------------------------------------------------

    async def open(self) -> Sequence[DomainName]:
        """Adopt what runs. HypervisorError if another driver has the directory open."""
        if self._lock is not None:
            raise HypervisorError("the QEMU driver is open already")
        self._lock = await offload_to_disk(lambda: prepare_directories(self.config), undo=os.close)
        try:
            directories = await offload_to_disk(
                lambda: records.list_directories(self.config.run_directory)
            )
            async with asyncio.TaskGroup() as group:
                for directory in directories:
                    group.create_task(self._adopt(directory))
        except BaseException:
            await self.close()
            raise
        return sorted(guest.name for guest in self._guests.values())

    async def close(self) -> None:
        """Let go of every domain without disturbing it. Idempotent."""
        guests = list(self._guests.values())
        self._guests.clear()
        self._crashed.clear()
        self._unreadable.clear()
        for guest in guests:
            await guest.let_go()
        self._early_pages.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _adopt(self, directory: Path) -> None:
        record = await offload_to_disk(lambda: records.read_record(directory))
        if record is None:
            if why := await leftovers.see(directory):
                log.error("%s", why)
                self._unreadable[DomainName(directory.name)] = why
            return
        process = await offload(lambda: QemuProcess.hold(record.process), undo=_let_go)
        if process is None:
            if await offload_to_disk(lambda: records.crashed(directory, record)):
                self._crashed[DomainName(record.spec.name)] = directory
            else:
                await offload_to_disk(lambda: records.remove_directory(directory))
            return
        guest = self._take(Launched(directory, process, record))
        try:
            await guest.connect(timeout_s=MONITORS * ADOPT_TIMEOUT_S, answer_s=ADOPT_TIMEOUT_S)
            if not guest.record.has_run and guest.run_state_seen == "prelaunch":
                await self._end(guest, "its start was cut short")
        except HypervisorError as error:
            log.warning("%s runs, but its monitor doesn't answer: %s", guest.name, error)
            guest.reconnect_later()

    def _refuse_unreadable(self, domain: DomainName) -> None:
        if domain in self._unreadable:
            raise HypervisorError(self._unreadable[domain])

    def _take(self, launched: Launched) -> Guest:
        guest = Guest(
            launched.directory, launched.record, launched.process, self._emit, self._forget
        )
        self._guests[guest.name] = guest
        return guest

    def _forget(self, guest: Guest) -> None:
        if self._guests.get(guest.name) is guest:
            del self._guests[guest.name]
            if guest.removal is not None and not guest.removal.done():
                self._removals[guest.name] = guest.removal
            if guest.crash_stays:
                self._crashed[guest.name] = guest.directory

    def _emit(self, event: DomainEvent) -> None:
        for callback in list(self._subscribers):
            try:
                callback(event)
            except Exception:
                log.exception("a subscriber failed on %s", event)

    def subscribe(self, callback: Callable[[DomainEvent], None]) -> Callable[[], None]:
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):
                self._subscribers.remove(callback)

        return unsubscribe

    def crashed(self) -> Collection[DomainName]:
        return tuple(self._crashed)

    async def capabilities(self) -> HypervisorCapabilities:
        return (await self._probe.facts()).capabilities

    async def cpu_lacks(
        self, model: str, domain: DomainName | None = None
    ) -> Collection[str] | None:
        if domain is not None:
            return await lacking_in_guest(self._guest(domain).execute)
        return (await self._probe.facts()).cpus.lacking(model)

    # --- a domain's life -------------------------------------------------------------------

    async def start(self, launch: Launch) -> None:
        await self._launch(launch, incoming=False)

    async def start_incoming(self, launch: Launch) -> None:
        await self._launch(launch, incoming=True)

    async def _launch(self, launch: Launch, *, incoming: bool) -> None:
        name = launch.spec.name
        if self._lock is None:
            raise HypervisorError("the QEMU driver is not open")
        self._refuse_unreadable(DomainName(name))
        if name in self._guests or name in self._launching:
            raise HypervisorError(f"{name} is here already; nothing was started")
        self._launching.add(name)
        self._crashed.pop(DomainName(name), None)  # Its folder is made anew.
        try:
            await self._launch_and_run(launch, incoming=incoming)
        finally:
            self._launching.discard(name)
            self._early_pages.drop(name)

    async def _launch_and_run(self, launch: Launch, *, incoming: bool) -> None:
        name, config = launch.spec.name, self.config
        if (removal := self._removals.get(DomainName(name))) is not None:
            await leftovers.see_removed(name, removal, timeout_s=LAUNCH_TIMEOUT_S)
            self._removals.pop(DomainName(name), None)
        facts = await self._probe.facts()
        qemu_log = config.qemu_log(name)
        said = await offload_to_disk(lambda: logs.make_ready(config.console_log(name), qemu_log))
        request = QemuLaunch(
            launch=launch,
            binary=facts.binary,
            accelerator=facts.accelerator,
            console_log=config.console_log(name),
            incoming=incoming,
            host_devices=await offload_to_disk(
                lambda: launcher.host_devices(launch), where=f"the disks of {name}"
            ),
        )
        directory = config.domain_directory(name)
        memory = self._early_pages.of(name)
        launched = await offload_or_undone(
            lambda: launcher.launch_process(request, directory, qemu_log, memory),
            Launched.kill,
            f"the start of {name}",
        )
        guest = self._take(launched)
        guest.said = lambda: logs.since(qemu_log, said)
        try:
            await guest.connect(timeout_s=LAUNCH_TIMEOUT_S)
            guest.said = None
            if memory is not None:
                await self._early_pages.see_untouched(guest)
            if not incoming:
                await resuming.cont(guest)
                await guest.record_saved()
        except BaseException as error:
            await asyncio.shield(self._end(guest, "its start failed"))
            if isinstance(error, HypervisorError):
                words = await offload_to_disk(lambda: logs.since(qemu_log, said))
                raise HypervisorError(f"{name} didn't start: {words or error}") from error
            raise

    async def stop(self, domain: DomainName, *, timeout_s: float) -> bool:
        """Ask the guest to power off; by force after `timeout_s`, or at once if it can't hear."""
        guest = self._guest(domain)
        status = await self.inspect(domain)
        if status.state in (DomainState.RUNNING, DomainState.UNKNOWN):  # Silent now: it may hear.
            deadline = asyncio.get_running_loop().time() + timeout_s
            while (left := deadline - asyncio.get_running_loop().time()) > 0:
                with contextlib.suppress(HypervisorError):
                    await guest.execute("system_powerdown")
                if await guest.process.wait(timeout_s=min(left, POWER_BUTTON_PERIOD_S)):
                    await self._wait_gone(guest)
                    return True
            guest.end_reason = "powered off by force"
            guest.process.signal(signal.SIGTERM)
            await guest.process.wait(timeout_s=TERMINATE_TIMEOUT_S)
        await self._end(guest, "powered off by force")
        return False

    async def destroy(self, domain: DomainName) -> None:
        """SIGKILL, like pulling the plug: a QEMU that lost its right to write flushes nothing."""
        self._refuse_unreadable(domain)
        if (guest := self._guests.get(domain)) is not None:
            await self._end(guest, "destroyed")

    async def forget_crash(self, domain: DomainName) -> None:
        if (left := self._crashed.pop(domain, None)) is not None:
            await offload_to_disk(lambda: records.remove_directory(left))

    async def _end(self, guest: Guest, reason: str) -> None:
        if not guest.process.exited:  # Else it ended by itself, and that is what is reported.
            guest.end_reason = guest.end_reason or reason
        taps = await offload(lambda: held_taps.hold(guest), undo=held_taps.close_aside)
        try:
            await guest.expect_end()
            guest.process.signal(signal.SIGKILL)
            await guest.urgency.calm()
            await self._wait_gone(guest)
        finally:
            held_taps.close_aside(taps)

    async def _wait_gone(self, guest: Guest) -> None:
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                await guest.gone.wait()
        except TimeoutError as error:
            raise HypervisorError(
                f"{guest.name}: QEMU (pid {guest.process.pid}) is still there"
                f" {KILL_TIMEOUT_S:g} s after SIGKILL"
            ) from error

    async def pause(self, domain: DomainName) -> None:
        await self._guest(domain).pause()

    async def resume(self, domain: DomainName) -> float:
        return await resuming.cont(self._guest(domain))

    async def reset(self, domain: DomainName) -> None:
        """Press the reset button. A crashed guest runs again; a paused one stays paused."""
        guest = self._guest(domain)
        crashed = (await self.inspect(domain)).state is DomainState.CRASHED
        await guest.reset()
        if crashed:
            await resuming.cont(guest)

    # --- what is known ---------------------------------------------------------------------

    def _guest(self, domain: DomainName) -> Guest:
        self._refuse_unreadable(domain)
        guest = self._guests.get(domain)
        if guest is None:
            raise NotFoundError(f"domain {domain} has no QEMU process here")
        return guest

    async def _ended(self, domain: DomainName, guest: Guest | None) -> DomainStatus:
        """STOPPED, once its end has been reported: what follows depends on how it ended."""
        if guest is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(guest.gone.wait(), INSPECT_TIMEOUT_S)
        return DomainStatus(name=domain, state=DomainState.STOPPED)

    async def inspect(self, domain: DomainName) -> DomainStatus:
        """A silent QEMU is UNKNOWN, with the reason; it raises nothing. So is an unreadable one."""
        if (why := self._unreadable.get(domain)) is not None:
            return DomainStatus(name=domain, state=DomainState.UNKNOWN, reason=why)
        guest = self._guests.get(domain)
        reason: str | None
        self._trimmer.soon(self.config.console_log(domain), self.config.qemu_log(domain))
        if guest is None or guest.process.exited:
            return await self._ended(domain, guest)
        in_use = await offload(lambda: memory_in_use_bytes(guest.process.pid, guest.record.ram_fd))
        try:
            state, reason = await paused_by.asked(guest, timeout_s=INSPECT_TIMEOUT_S)
        except HypervisorError as error:
            if isinstance(error, QmpDisconnected):  # It may be ending: the pidfd says so next.
                await guest.process.wait(timeout_s=EXIT_NOTICE_TIMEOUT_S)
            if guest.process.exited:
                return await self._ended(domain, guest)
            state, reason = DomainState.UNKNOWN, str(error)
        return DomainStatus(
            name=domain,
            state=state,
            pid=guest.process.pid,
            reason=reason,
            memory_in_use_bytes=in_use,
        )

    async def list_domains(self) -> Sequence[DomainStatus]:
        names = sorted({*self._guests, *self._unreadable})
        return await asyncio.gather(*(self.inspect(DomainName(name)) for name in names))

    def console_log(self, domain: DomainName) -> Path:
        return self.config.console_log(domain)

    async def launched(self, domain: DomainName) -> DomainSpec | None:
        guest = self._guests.get(domain)
        return None if guest is None else guest.record.spec

    async def launched_all(self) -> Sequence[DomainSpec]:
        return [guest.record.spec for guest in self._guests.values()]

    async def launched_token(self, domain: DomainName) -> FencingToken | None:
        guest = self._guests.get(domain)
        return None if guest is None else FencingToken(guest.record.token)

    # --- what the page engine needs --------------------------------------------------------

    async def memory(self, domain: DomainName) -> GuestMemory:
        guest = self._guest(domain)
        process, record = guest.process, guest.record
        return await offload(
            lambda: open_memory(
                process.pid, process.pidfd, ram_fd=record.ram_fd, uffd_fd=record.uffd_fd
            ),
            undo=GuestMemory.close,
        )

    async def make_memory_ahead(self, spec: DomainSpec) -> bool:
        return self._early_pages.make(spec)

    async def drop_memory_ahead(self, domain: DomainName) -> None:
        if domain not in self._launching:
            self._early_pages.drop(domain)

    async def arriving_memory(self, domain: DomainName) -> Sequence[MemoryRegion]:
        return await self._early_pages.regions(domain, self._guest)

    async def prepare_switchover(self, domain: DomainName) -> None:
        await switchover.prepare(self._guest(domain))

    async def begin_switchover(self, domain: DomainName, device_channel: Path) -> None:
        await switchover.begin(self._guest(domain), device_channel)

    async def continue_switchover(self, domain: DomainName) -> None:
        await switchover.proceed(self._guest(domain))

    async def abort_switchover(self, domain: DomainName) -> AbortOutcome:
        self._refuse_unreadable(domain)
        guest = self._guests.get(domain)
        return AbortOutcome.GONE if guest is None else await switchover.abort(guest)

    async def receive_device_state(self, domain: DomainName, device_channel: Path) -> None:
        await switchover.receive(self._guest(domain), device_channel)

    @property
    def native(self) -> NativeMigration:
        return self._native


def _let_go(process: QemuProcess | None) -> None:
    if process is not None:
        process.release()
