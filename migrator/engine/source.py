"""The source's engine: tracks what the guest writes, and sends what it is told to.

One thread does everything that is on the way of a final pass: it hears `RunPass`, scans, sends,
and awaits the acknowledgement, without handing over to another thread. Helper threads send long
passes over several streams, and relay the device channel.
"""

from __future__ import annotations

import collections
import time
from pathlib import Path

import msgspec

from migrator import ranges
from migrator.engine import codecs, frames, kernel, speed
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.between_passes import BetweenPasses
from migrator.engine.channel import ChannelHealth, connect_patiently
from migrator.engine.control import (
    POLL_IN,
    Control,
    Pollable,
    Signal,
    StoppedError,
    ThreadFaults,
    poll,
)
from migrator.engine.delivery import Delivery, delivered
from migrator.engine.dirty_log import DirtyLog, LogClaim
from migrator.engine.frames import StreamHello, StreamKind
from migrator.engine.idle_cores import IdleCores
from migrator.engine.known import KnownPages
from migrator.engine.memory import map_regions
from migrator.engine.packing_policy import PackingPolicy
from migrator.engine.page_server import PageServer
from migrator.engine.passes import run_deliveries
from migrator.engine.planner import PassPlanner
from migrator.engine.relay import SourceRelay
from migrator.engine.sampling import content_shares, pending_packed_share, sample_dirty
from migrator.engine.stream import Endpoint, PageStream
from migrator.engine.transport import check_local_address, tls_peer
from migrator.engine_messages import (
    Configure,
    Configured,
    Connect,
    Connected,
    DeviceChannelOpen,
    EndPass,
    OpenDeviceChannel,
    PassDone,
    Ping,
    Pong,
    Report,
    RunPass,
    SampleDirty,
    SetBandwidth,
    Stop,
    Stopped,
    ToEngine,
)
from migrator.errors import WrongStateError
from migrator.model import PAGE_SIZE_BYTES, PassKind, PassReport


class SourceEngine:
    """Use: construct, `run`, and in any case `close`."""

    def __init__(
        self,
        configure: Configure,
        descriptors: list[int],
        control: Control,
        idle_cores: IdleCores,
    ) -> None:
        uffd, pagemap, *files = descriptors
        self._configure = configure
        self._secret = configure.secret
        self._control = control
        self._regions = map_regions(configure, files)
        self._log = DirtyLog(uffd, pagemap, configure.regions, LogClaim(files[0]))
        self._planner = PassPlanner(self._regions, self._log, kernel.PagemapScanner(pagemap))
        self._bucket = TokenBucket(configure.bandwidth_bytes_per_s, time.monotonic())
        self._idle_cores = idle_cores
        self._packing = PackingPolicy(
            idle_cores, sharers=lambda: self._bucket.sharers, used=idle_cores.used
        )
        self._known = KnownPages(self._regions)
        self._streams: list[PageStream] = []
        self._health = ChannelHealth(control.send)
        self._between = BetweenPasses(self._health, configure.reconnect_s, self)
        self._relay: SourceRelay | None = None
        self._server: PageServer | None = None
        self._served_before = 0  # Bytes, to an engine of the destination that died.
        self._endpoint: Endpoint | None = None
        self._tls = tls_peer(configure.tls, configure.peer)
        self._faults = ThreadFaults()
        self._served = Signal()
        """The destination has every page."""
        self._deferred: collections.deque[ToEngine] = collections.deque(control.pipelined)
        self._pass: RunPass | None = None
        self._pass_to_end = 0
        self._deliveries: list[Delivery] = []
        self._speed = speed.Speed()

    # --- the main loop ---

    def run(self) -> None:
        """Until told to stop (StoppedError), or until something can't be helped (any other)."""
        if not self._configure.post_copy:
            self._log.register()
        extents = self._planner.extents()
        in_use = sum(ranges.page_count(found, PAGE_SIZE_BYTES) for found in extents)
        self._control.send(Configured(pages_in_use=in_use))
        while True:
            while self._deferred:
                self._handle(self._deferred.popleft())
            signals = (self._faults.signal, self._served)
            watched = {each.fileno(): POLL_IN for each in (self._control, *signals)}
            for stream in self._streams:
                if stream.sock is not None:
                    watched[stream.sock.fileno()] = POLL_IN
            happened = poll(watched, speed.WINDOW_S if self._serving else 60.0)
            self._report()
            if self._control.fileno() in happened:
                self._hear()
            if self._faults.signal.fileno() in happened:
                self._faults.raise_first()
            if self._served.fileno() in happened:
                self._served.clear()
                self._report(last=True)
            for stream in self._streams:
                if stream.sock is not None and stream.sock.fileno() in happened:
                    self._between.look_at(stream)

    def close(self) -> None:
        """Unregister first, so that the guest is rid of us, then close. Never fails."""
        self._log.unregister()
        if self._server is not None:
            self._server.close()
        if self._relay is not None:
            self._relay.close()
        for stream in self._streams:
            stream.bye()
            stream.close()

    def stopped(self) -> Stopped:
        """The last words."""
        return Stopped(bytes_sent=self._bytes_sent())

    # --- Waiter: how this thread waits ---

    def wait(self, source: Pollable | None, events: int, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            watched = {self._control.fileno(): POLL_IN}
            if source is not None:
                watched[source.fileno()] = events
            happened = poll(watched, min(left, speed.WINDOW_S))
            if self._control.fileno() in happened:
                self._hear()
            self._report()
            if source is not None and source.fileno() in happened:
                return True
            if time.monotonic() >= deadline:
                return False

    def tick(self) -> None:
        self._hear()
        self._report()

    def _hear(self) -> None:
        """What can't wait is done at once; the rest when the pass is over."""
        for message in self._control.receive():
            match message:
                case SetBandwidth() | EndPass() | Ping() | Stop():
                    self._handle(message)
                case _:
                    self._deferred.append(message)

    # --- messages ---

    def _handle(self, message: ToEngine) -> None:
        match message:
            case RunPass():
                self._run_pass(message)
            case EndPass():
                self._pass_to_end = message.number
                self._end_pass()
            case SetBandwidth():
                self._bucket.set_rate(message.bandwidth_bytes_per_s, time.monotonic())
            case OpenDeviceChannel():
                self._open_device_channel(Path(message.path))
            case Connect():
                self._connect(message)
            case SampleDirty():
                self._sample_dirty(message)
            case Ping():
                self._control.send(Pong())
            case Stop():
                raise StoppedError("the agent said so")
            case Configure():
                raise WrongStateError("Configure", "configured", "new")

    def _connect(self, message: Connect) -> None:
        serving = self._serving
        if (self._streams or self._server is not None) and not serving:
            raise WrongStateError("Connect", "connected", "configured")
        if self._server is not None:
            self._server.close()
            self._served_before += self._server.bytes_sent
        else:
            check_local_address(self._configure.bind_address)
        self._secret = message.secret or self._secret
        configure = self._configure
        self._endpoint = Endpoint(
            host=message.host,
            port=message.port,
            bind_address=configure.bind_address,
            silence_s=configure.silence_s,
            tls=self._tls,  # The same for each successor at the other end: what it had still does.
        )
        self._server = PageServer(
            self._endpoint,
            self._hello,
            self._regions,
            self._bucket,
            self._health,
            self._packing,
            reconnect_s=configure.reconnect_s,
            fault=self._faults.report,
        )
        if configure.post_copy or serving:
            # This thread goes on listening: the destination's engine may have another successor.
            connected = Connected(streams=0, round_trip_ms=0.0)
            self._server.start(lambda: self._control.send(connected), self._served.set)
            return
        streams = max(1, min(configure.streams, frames.STREAMS_MAX))
        for index in range(streams):
            stream = PageStream(
                self._endpoint, self._hello(StreamKind.PAGES, index, streams), self._bucket
            )
            if configure.expected_bytes_per_s is not None:
                stream.link.expected_bytes_per_s = configure.expected_bytes_per_s / streams
            connect_patiently(stream, configure.reconnect_s, self)
            self._streams.append(stream)
        hello = self._hello(StreamKind.DEVICE)
        self._relay = SourceRelay(self._endpoint, hello, configure.reconnect_s, self._control)
        self._relay.prepare(self)
        round_trip_ms = self._between.round_trip_ms(self._streams[0])
        self._control.send(Connected(streams=streams, round_trip_ms=round_trip_ms))

    def _hello(self, kind: StreamKind, index: int = 0, streams: int = 1) -> StreamHello:
        return StreamHello(
            version=frames.STREAM_VERSION,
            migration_id=self._configure.migration_id,
            secret=self._secret,
            kind=kind,
            index=index,
            streams=streams,
        )

    def _open_device_channel(self, path: Path) -> None:
        if self._relay is None:
            raise WrongStateError("OpenDeviceChannel", "configured", "connected")
        self._relay.prepare(self)
        self._relay.listen(path)
        self._control.send(DeviceChannelOpen(path=str(path)))

    def _sample_dirty(self, message: SampleDirty) -> None:
        if self._streams:
            raise WrongStateError("SampleDirty", "connected", "configured")
        extents = self._planner.extents()
        sampled = sample_dirty(self._log, self._regions, message.seconds, self)
        zero_share, packed_share = content_shares(self._regions, extents)
        self._control.send(
            msgspec.structs.replace(
                sampled,
                zero_share=zero_share,
                packed_share=packed_share,
                memory_in_use_bytes=sum(ranges.byte_count(found) for found in extents),
            )
        )

    # --- passes ---

    def _run_pass(self, message: RunPass) -> None:
        """Send what the pass's kind says; `PassDone` when all of it is acknowledged."""
        if not self._streams:
            raise WrongStateError("RunPass", "configured", "connected")
        if message.kind in (PassKind.STALE, PassKind.MISSING):
            self._tell_missing(message)
            return
        began = time.monotonic()
        if message.kind is PassKind.FIRST:
            self._idle_cores.begin()
        elif message.kind is not PassKind.FINAL:
            self._idle_cores.look()
        bytes_before = self._bytes_sent()
        pieces = self._planner.pieces(message.kind, len(self._streams))
        scan_seconds = time.monotonic() - began if message.kind is PassKind.FINAL else 0.0
        began_copy = time.monotonic()
        self._pass = message
        self._speed.begin(began_copy, bytes_before, flowing=True)
        for stream in self._streams:
            stream.capped = message.kind is not PassKind.FINAL
        self._deliveries = [
            Delivery(
                stream,
                part,
                self._regions,
                self._bucket,
                self._packing,
                skip_zeroes=message.kind is not PassKind.FINAL,
                known=self._known,
                written=self._log.written_pages() if message.kind is PassKind.FIRST else None,
            )
            for stream, part in zip(self._streams, pieces, strict=True)
        ]
        self._end_pass()  # It may have been said by now.
        try:
            run_deliveries(self._deliveries, self._health, self._configure.reconnect_s, self)
        finally:
            self._pass = None
        seconds = time.monotonic() - began_copy
        if message.kind is not PassKind.FINAL:
            began_scan = time.monotonic()
            self._log.scan()
            scan_seconds = time.monotonic() - began_scan
        cut = [part for each in self._deliveries for part in each.cut]
        for region, content in cut:
            self._log.restore(region, content)
        deferred = (part for each in self._deliveries for part in each.deferred)
        self._planner.not_sent([*deferred, *cut])
        report = msgspec.structs.replace(
            delivered(message.number, message.kind, self._deliveries),
            seconds=seconds,
            bytes_sent=self._bytes_sent() - bytes_before,
            pending_pages=self._log.pending_pages(),
            dirtied_s=self._log.scanned_s,
            scan_seconds=scan_seconds,
        )
        if message.kind is not PassKind.FINAL and report.compressors:
            share = pending_packed_share(
                self._regions, self._log.pending(), codecs.named(report.compressors[0])
            )
            report = msgspec.structs.replace(report, pending_packed_share=share)
        rates = [stream.link.bytes_per_s for stream in self._streams]
        known = [rate for rate in rates if rate is not None]
        link = sum(known) if len(known) == len(rates) else None
        self._control.send(PassDone(report=report, link_bytes_per_s=link))

    def _end_pass(self) -> None:
        """If it is the one that shall end. A final pass has to send all."""
        now = self._pass
        if now is None or now.number != self._pass_to_end or now.kind is PassKind.FINAL:
            return
        for delivery in self._deliveries:
            delivery.end()

    def _tell_missing(self, message: RunPass) -> None:
        """STALE: drop what is pending, maybe again. MISSING: the last of it, and it is armed.

        Each is acknowledged: then the pages are holes there, and whoever touches them waits.
        """
        assert self._server is not None
        final = message.kind is PassKind.MISSING
        if not final:
            self._server.connect(self)
        began = time.monotonic()
        found, holes = self._planner.missing(last=final)
        scanned = time.monotonic()
        pages = sum(ranges.page_count(content, PAGE_SIZE_BYTES) for content in found)
        stream = self._streams[0]
        before = stream.bytes_sent
        if final:
            self._server.start(on_over=self._served.set)
        self._between.tell_missing(stream, self._regions, found, holes, arms=final)
        if not final:
            self._log.scan()
        self._control.send(
            PassDone(
                report=PassReport(
                    number=message.number,
                    kind=message.kind,
                    seconds=time.monotonic() - scanned,
                    pages=pages,
                    bytes_sent=stream.bytes_sent - before,
                    pending_pages=pages if final else self._planner.untold_pages(),
                    scan_seconds=scanned - began,
                )
            )
        )
        if final:
            self._end_page_streams()
            self._speed.begin(time.monotonic(), self._bytes_sent(), flowing=False)

    def _end_page_streams(self) -> None:
        """All that they could carry has been told. Where one breaks, nobody shall mind."""
        for stream in self._streams:
            stream.bye()
            stream.close()

    # --- reports ---

    @property
    def _serving(self) -> bool:
        """Post-copy: the destination asks for pages."""
        return self._server is not None and self._server.started

    def _bytes_sent(self) -> int:
        served = self._served_before + (self._server.bytes_sent if self._server is not None else 0)
        return served + sum(stream.bytes_sent for stream in self._streams)

    def _left_bytes(self) -> int:
        if self._server is not None and self._serving:
            return self._server.left_pages * PAGE_SIZE_BYTES
        return sum(delivery.left_bytes for delivery in self._deliveries)

    def _report(self, *, last: bool = False) -> None:
        """A `Report` when one is due. `last`: now, for no more is to be sent."""
        now = time.monotonic()
        if self._pass is None and not self._serving:
            return
        if not (last or self._speed.is_due(now)):
            return
        sent = self._bytes_sent()
        if self._pass is None and not last and self._speed.stands(sent):
            self._speed.begin(now, sent, flowing=False)
            return
        self._control.send(
            Report(
                number=0 if self._pass is None else self._pass.number,
                bytes_sent=sent,
                remaining_bytes=self._left_bytes(),
                throughput_bytes_per_s=None if last else self._speed.measure(now, sent),
            )
        )
