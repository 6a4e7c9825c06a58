"""Drives one side's engine process for a session: spawns it, configures it, and tells what it says.

Commands that need the engine wait in order for it to be there. The engine that dies is an
EngineLost event, unless it was told to stop; so is one that hangs while its guest waits for pages.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from migrator import engine_messages as m
from migrator import shortage
from migrator.engine.client import EngineProcess
from migrator.engine.spares import EngineSpares
from migrator.engine_events import told_by
from migrator.engine_watch import ASKED_MAX, EngineWatch, excused_s
from migrator.errors import FerryError, HypervisorError
from migrator.left_tracking import clear_tracking
from migrator.link_rates import LinkRates
from migrator.model import DomainName, Role
from migrator.own_threads import STATE_DIRECTORY, in_own_thread
from migrator.policy import TOLD, page_streams
from migrator.ports import HypervisorDriver, MemoryRegion, Struct, close_regions
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from migrator.session.source import SourceSession
from migrator.tls import TlsFiles
from migrator.turns import Turns

log = logging.getLogger(__name__)
STOP_S: Final = 2.0
_Files = tuple[tuple[int, int], ...]  # Device and inode of each of a guest's regions.


class EngineSettings(Struct, frozen=True, kw_only=True):
    """What a node's configuration says of its engines."""

    run_directory: Path
    """For unix sockets: a short path, ours alone."""
    spares: EngineSpares
    bind_address: str
    streams: int = 0
    """0: as many as link and cores are good for."""
    link_bytes_per_s: Callable[[], float | None] = lambda: None
    """What the migration interface says of itself; None: nothing to go by. Asked in a thread."""
    rates: LinkRates = msgspec.field(default_factory=LinkRates)
    """What was seen of it since the agent's start, by destination."""
    tls: Callable[[], TlsFiles | None] = lambda: None
    """Asked for each engine, in a thread. ConfigError if the node's files are no good."""


class EngineDriver:
    """See the module. `feed` takes events; every task is owned here and ended by `close`."""

    def __init__(
        self,
        session: SourceSession | DestinationSession,
        *,
        settings: EngineSettings,
        hypervisor: HypervisorDriver,
        device_channel: Path,
        feed: Callable[[v.Event], None],
    ) -> None:
        self._session = session
        self._domain = DomainName(session.domain)
        self._hypervisor = hypervisor
        self._settings = settings
        self._device_channel = device_channel
        self._feed = feed
        self._secret = secrets.token_bytes(32)
        self._process: EngineProcess | None = None
        self._stopping = False
        self._generation = 0
        """Counts engines: what a dead one had still to say is dropped."""
        self._post_copy = False
        self._early: _Files | None = None
        """What a destination's engine got before its hypervisor was up; None: it waits for that."""
        self._configured_process: EngineProcess | None = None
        self._pages_in_use = 0
        self._round_trip_ms = 0.0
        self._may_be_tracked = isinstance(session, SourceSession) and session.restored
        """By what a killed engine has left registered; the last agent's may have been killed."""
        self._watch = EngineWatch(self._ask, self._hangs)
        """From the moment that the guest's pages are told as missing: it will need the engine."""
        self._hangs_noted = False
        self._has_spoken: EngineProcess | None = None
        """Until then its imports may take as long as a host lets them, within `excused_s`."""
        self._in_pass = False
        self._guest_bytes = 0
        self._quiet_since_s = 0.0
        """Since its configuration, the begin of a pass, or its last word."""
        self._asked = 0
        """Since its last word."""
        self._words = 0
        """Of all engines."""
        self._turns = Turns(f"migration-{session.migration_id}-engine", self._lost, STOP_S)

    def perform(self, command: v.EngineCommand) -> None:
        """Begin a command. A pass begins at once; the others in order, in the background."""
        match command:
            case v.RunPass():
                if command.kind in TOLD:  # No report of it comes meanwhile: it is asked instead.
                    self._watch.begin()
                self._watch.pass_runs(command.kind not in TOLD)
                self._in_pass, self._quiet_since_s = True, time.monotonic()
                self._send(m.RunPass(number=command.number, kind=command.kind))
            case v.EndPass():
                self._send(m.EndPass(number=command.number))
            case v.PullPages():
                self._send(m.PullAll())
            case v.StopEngine():
                self._stopping = True
                self._turns.put("stop", self._end())
            case v.StartEngine():
                if command.post_copy:
                    self._generation += 1
                    self._stopping = False
                self._turns.put("start", self._start(command.post_copy))
            case v.ConnectEngine():
                self._turns.put("connect", self._connect_source(command))

    def limit_bandwidth(self, bandwidth_bytes_per_s: int | None) -> None:
        """At once where the engine is configured; otherwise its configuration will say it."""
        if self._configured:
            self._send(m.SetBandwidth(bandwidth_bytes_per_s=bandwidth_bytes_per_s))

    def begin_early(self) -> None:
        """Destination: `StartEngine` comes while the hypervisor starts; `arrived` will follow."""
        self._early = ()

    async def arrived(self) -> None:
        """The hypervisor is up: returns when an engine that began early has been told the rest."""
        if self._early is not None:
            await asyncio.wait([self._turns.put("start", self._attach())])

    @property
    def ending(self) -> bool:
        """Its process has hung up, unasked, and `EngineLost` is still to come."""
        return not self._stopping and self._process is not None and self._process.hung_up

    async def end_told(self) -> None:
        """Return when it has come; bounded."""
        if self._process is not None:
            await self._process.end_told()

    @property
    def unheard_s(self) -> float | None:
        """See `MigrationProgress.unheard_s`."""
        return self._watch.unheard_s

    async def drained(self) -> None:
        """Wait until every command begun has ended; bounded by the commands' own bounds."""
        await self._turns.drained()

    async def close(self) -> None:
        """Stop the engine, by force if need be."""
        self._stopping = True
        await self._watch.close()
        await self._turns.close()
        await self._stop()

    # --- in order, in the background ---

    def _lost(self, reason: str) -> None:
        if not self._stopping:
            self._feed(v.EngineLost(reason=reason))

    def warm_up(self) -> None:
        """Spawn the engine ahead: its imports take as long as a hypervisor's start."""
        self._turns.put("start", self._spawn())

    async def _spawn(self) -> None:
        if self._stopping or self._process is not None:
            return
        settings = self._settings
        generation = self._generation

        def on_message(message: m.FromEngine) -> None:
            self._on_message(message, generation)

        def on_exit(status: int) -> None:
            self._on_exit(status, generation)

        spare = await settings.spares.take()
        if spare is not None:
            spare.attach(on_message, on_exit)
            self._process = spare
        else:
            self._process = await EngineProcess.spawn(
                log_path=settings.spares.log_path, on_message=on_message, on_exit=on_exit
            )

    async def _start(self, post_copy: bool) -> None:
        self._post_copy = post_copy
        self._watch.pass_runs(False)  # Its predecessor's is over.
        self._in_pass = False
        if post_copy:
            self._watch.begin()
        if post_copy and self._process is not None:
            # Its predecessor knows nothing that the memory and the other side don't.
            process, self._process = self._process, None
            process.kill()
            await process.stop(STOP_S)
        await self._spawn()
        if self._stopping:
            return
        if self._session.role is Role.DESTINATION and self._early is not None and not post_copy:
            await self._configure_early()
        elif self._session.role is Role.DESTINATION:
            await self._configure(self._secret)
        elif not post_copy:
            # While the destination starts its hypervisor. The secret comes with `Connect`.
            await self._configure(b"")

    async def _connect_source(self, command: v.ConnectEngine) -> None:
        if self._stopping:
            return
        if not self._configured:
            await self._configure(command.secret)
        self._send(m.Connect(host=command.host, port=command.port, secret=command.secret))

    async def _configure_early(self) -> None:
        """With what there is. Where that can't be had, `arrived` configures it."""
        settings = await self._configuration(self._secret)
        try:
            regions = await self._hypervisor.arriving_memory(self._domain)
        except FerryError as error:  # It isn't there any more: whoever started it tells why.
            log.info("migration %s: %s", self._session.migration_id, error)
            return
        try:
            self._early = _files_of(regions)
            early = msgspec.structs.replace(settings, regions=m.layout_of(regions))
            self._send_configuration(early, [region.fd for region in regions])
        finally:
            close_regions(regions)

    async def _attach(self) -> None:
        if self._stopping or self._process is None:
            return
        if not self._configured:
            self._early = None
            await self._configure(self._secret)
            return
        memory = await self._hypervisor.memory(self._domain)
        try:
            if _files_of(memory.regions) != self._early:  # It would run without its pages.
                raise HypervisorError(f"{self._domain} has other memory than its pages went to")
            self._process.send(m.Attach(regions=m.layout_of(memory.regions)), fds=[memory.uffd])
        finally:
            memory.close()
        self._send(m.OpenDeviceChannel(path=str(self._device_channel)))

    async def _configure(self, secret: bytes) -> None:
        settings = await self._configuration(secret)
        memory = await self._hypervisor.memory(self._domain)
        try:
            layout = m.layout_of(memory.regions)
            whole = msgspec.structs.replace(settings, pid=memory.pid, regions=layout)
            self._send_configuration(whole, memory.fds)
        finally:
            memory.close()

    async def _configuration(self, secret: bytes) -> m.Configure:
        """Without the memory's part."""
        session, settings = self._session, self._settings
        source = session.role is Role.SOURCE
        tls = await in_own_thread(STATE_DIRECTORY, settings.tls)
        link = await asyncio.to_thread(settings.link_bytes_per_s)
        cores = os.cpu_count() or 1
        return m.Configure(
            role=session.role,
            migration_id=session.migration_id,
            secret=secret,
            pid=0,
            regions=(),
            streams=settings.streams or page_streams(cores, link, tls=tls is not None),
            bind_address=settings.bind_address,
            post_copy=self._post_copy,
            tls=tls,
            peer=session.destination if source else session.source,
            expected_bytes_per_s=settings.rates.to(session.destination) if source else None,
        )

    def _send_configuration(self, message: m.Configure, fds: Sequence[int]) -> None:
        if self._process is not None:
            cap = self._session.request.bandwidth_bytes_per_s  # It may have changed just now.
            message = msgspec.structs.replace(message, bandwidth_bytes_per_s=cap)
            self._process.send(message, fds=fds)
            self._configured_process = self._process
            self._guest_bytes = sum(region.size_bytes for region in message.regions)
            self._quiet_since_s, self._asked = time.monotonic(), 0

    async def _end(self) -> None:
        """No engine is left, and a guest that stays is rid of its tracking."""
        await self._stop()
        if self._may_be_tracked:
            self._may_be_tracked = False
            await clear_tracking(self._hypervisor.memory, self._domain)

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            try:
                if not await process.stop(STOP_S):
                    self._was_killed()
            except BaseException:
                process.kill()  # Nobody knows it any more.
                raise

    def _was_killed(self) -> None:
        self._may_be_tracked = self._session.role is Role.SOURCE

    @property
    def _configured(self) -> bool:
        """The engine that there is now is. Its first message has to be its configuration."""
        return self._process is not None and self._process is self._configured_process

    def _send(self, message: m.ToEngine) -> None:
        if self._process is None or not self._configured:
            return
        try:
            self._process.send(message)
        except FerryError as error:
            self._feed(v.EngineLost(reason=str(error)))

    # --- whether it answers ---

    def _ask(self) -> bool:
        if self._stopping or not self._configured:
            return False  # Who is told nothing has nothing to say.
        spoke = self._process is self._has_spoken
        quiet_s = time.monotonic() - self._quiet_since_s
        if spoke and not self._hangs_noted and self._asked < ASKED_MAX:
            # By their number: an agent that stood still itself has asked nothing meanwhile.
            self._asked += 1
            self._send(m.Ping())
        return quiet_s >= excused_s(self._guest_bytes, spoke=spoke, in_pass=self._in_pass)

    async def _hangs(self, seconds: float) -> None:
        """Another one takes its place, unless it may be all that has the guest's pages."""
        generation, words = self._generation, self._words
        reason = f"it has said nothing for {seconds:g} s"
        alone = not await self._memory_is_there()
        if self._stopping or (generation, words) != (self._generation, self._words):
            return  # It has answered meanwhile, too: what stalled was the host.
        log.error("migration %s: its engine: %s", self._session.migration_id, reason)
        if not alone:
            self._stopping = True
            self._feed(v.EngineLost(reason=reason))
        elif not self._hangs_noted:
            self._hangs_noted = True
            self._feed(v.ChannelNoted(broken=True, detail=f"the engine: {reason}"))

    async def _memory_is_there(self) -> bool:
        """Without the engine: the guest's hypervisor has it, too."""
        try:
            async with asyncio.timeout(STOP_S):
                (await self._hypervisor.memory(self._domain)).close()
        except (FerryError, OSError, TimeoutError):
            return False
        return True

    # --- what the engine says ---

    def _on_message(self, message: m.FromEngine, generation: int) -> None:
        if generation != self._generation:
            return
        self._note_life()
        if isinstance(message, m.Stopped) and self._session.role is Role.SOURCE:
            self._feed(v.EngineStopped(bytes_sent=message.bytes_sent))
        if self._stopping:
            return
        self._go_on(message)
        if (event := told_by(message)) is not None:
            self._feed(event)

    def _note_life(self) -> None:
        self._has_spoken = self._process
        self._words += 1
        self._quiet_since_s, self._asked = time.monotonic(), 0
        self._watch.heard()
        if self._hangs_noted:
            self._hangs_noted = False
            self._feed(v.ChannelNoted(broken=False, detail="the engine answers again"))

    def _go_on(self, message: m.FromEngine) -> None:
        """What this driver does by it, or adds to it: its next step with the engine."""
        match message:
            case m.Listening():
                if not self._post_copy and self._early is None:
                    self._send(m.OpenDeviceChannel(path=str(self._device_channel)))
                self._feed(
                    v.EngineListening(
                        host=message.host,
                        port=message.port,
                        secret=self._secret,
                        no_post_copy=message.no_post_copy,
                    )
                )
            case m.Configured():
                self._pages_in_use = message.pages_in_use
            case m.Connected() if message.streams == 0:  # For the pages of a post-copy alone.
                self._connected(round_trip_ms=0.0)
            case m.Connected():
                self._round_trip_ms = message.round_trip_ms
                self._send(m.OpenDeviceChannel(path=str(self._device_channel)))
            case m.DeviceChannelOpen() if self._session.role is Role.SOURCE:
                self._connected(round_trip_ms=self._round_trip_ms)
            case m.PassDone():
                self._watch.pass_runs(False)
                self._in_pass = False
                node, sent = self._session.destination, message.report.bytes_sent
                self._settings.rates.note(node, message.link_bytes_per_s, sent)
            case m.PostCopyArmed():
                self._watch.begin()
            case m.EngineFailed():
                self._stopping = True  # Its exit follows and says nothing new.
            case _:
                pass

    def _connected(self, round_trip_ms: float) -> None:
        self._feed(v.EngineConnected(pages_in_use=self._pages_in_use, round_trip_ms=round_trip_ms))

    def _on_exit(self, status: int, generation: int) -> None:
        if status < 0:
            self._was_killed()
        if not self._stopping and generation == self._generation:
            self._stopping = True
            how = shortage.killed_by(-status) if status < 0 else f"ended with status {status}"
            self._feed(v.EngineLost(reason=f"it {how}"))


def _files_of(regions: Sequence[MemoryRegion]) -> _Files:
    found = (os.fstat(region.fd) for region in regions)
    return tuple((each.st_dev, each.st_ino) for each in found)
