"""One incoming connection, as the destination has it: a thread that lets it in and serves it.

    accepted ─► hello ─► refused, with the reason
                  └────► PAGES: frames into guest memory, each acknowledged, until BYE or a break
                  └────► DEVICE: handed over to the relay
                  └────► FAULTS, BULK: handed over to the filler

A page stream that replaces an earlier one of the same index is welcomed only after the earlier
one's thread has ended: bytes that were still on their way in it are older, and must not land on
newer ones.

What goes wrong with guest memory is EngineError where it happens, and the end of this engine; any
OSError that gets as far as here is the connection's, and ends that: its source connects anew.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from typing import Final, Protocol

import msgspec

from migrator import ranges, wire
from migrator.engine import codecs, frames, kernel
from migrator.engine.frames import FrameKind, RegionShape, StreamHello, StreamKind, StreamWelcome
from migrator.engine.intake import ConnectionEndedError, Intake
from migrator.engine.landing import Landing, unwritable
from migrator.engine.memory import MappedRegion
from migrator.engine.prefault import Prefaulter
from migrator.engine.stream import tune
from migrator.engine.transport import (
    SecureSocket,
    StreamSocket,
    TlsRefusedError,
    is_alive,
    limit_waits,
    secure_incoming,
)
from migrator.errors import RemoteProtocolError, words
from migrator.ranges import Ranges

_HELLO_TIMEOUT_S: Final = 5.0
_FROM_SOURCE: Final = frames.SEQUENCED | {FrameKind.EXPECT, FrameKind.BYE}
_hello_decoder: Final = msgspec.msgpack.Decoder(StreamHello)


class Memory:
    """Where pages land: the regions, and what prefaults those made of huge pages."""

    def __init__(self, regions: list[MappedRegion]) -> None:
        self.regions = regions
        self.shapes = [RegionShape(r.size_bytes, r.page_size_bytes) for r in regions]
        self.prefaulter = Prefaulter(regions)


class Host(Protocol):
    """What a connection asks of its engine. Called from the connection's thread."""

    @property
    def tls(self) -> ssl.SSLContext | None:
        """Of the connection that comes next. None: connections are plain."""

    def refusal_of(self, hello: StreamHello, peer: str | None) -> str:
        """Why it isn't let in; "" if it is. `peer`: the node that its certificate names."""

    def admit(self, connection: Connection) -> None:
        """Take the place of an earlier stream. EngineError if that one doesn't end."""

    def ended(self, connection: Connection, reason: str) -> None:
        """An admitted page stream ended: "" if it was meant."""

    def device_stream(self, sock: StreamSocket) -> None:
        """A device stream was let in; the socket's ownership passes."""

    def post_copy_stream(self, kind: StreamKind, sock: StreamSocket) -> None:
        """A FAULTS or BULK stream was let in; the socket's ownership passes."""

    def missing(self, region: int, content: Ranges) -> None:
        """These pages won't be sent before the guest runs."""

    def arm(self) -> None:
        """All that are missing were told: wait for faults. EngineError."""

    def fault(self, error: BaseException) -> None:
        """This side can't go on."""


class Connection:
    """Owns its socket and thread. `revoke` ends both; join by `join`."""

    def __init__(self, sock: socket.socket, memory: Memory, host: Host, silence_s: float) -> None:
        self._accepted = sock
        self._sock: StreamSocket = sock
        self._intake = Intake(sock, silence_s)
        self._handed_over = False
        self._memory = memory
        self._host = host
        self._silence_s = silence_s
        self._revoked = False
        self._sequence = 0
        self._packed = bytearray()
        self.index = -1
        self.admitted = False
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """While nothing was sent but its hello: whether its other end hasn't closed it."""
        return is_alive(self._sock)

    def revoke(self) -> None:
        """Nothing is written to guest memory any more once the thread has ended."""
        self._revoked = True
        if not self._handed_over:
            self._intake.revoke()

    def join(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        reason = ""
        try:
            hello = self._let_in()
            if hello is None:
                return
            if hello.kind is not StreamKind.PAGES:
                self._hand_over(hello.kind)
                return
            self._serve()
        except (ConnectionEndedError, RemoteProtocolError) as error:
            reason = str(error)
        except OSError as error:
            reason = words(error)
        except BaseException as error:
            self._host.fault(error)
            reason = str(error)
        finally:
            if not self._handed_over:
                self._sock.close()
            if self.admitted:
                self._host.ended(self, "" if self._revoked else reason)

    # --- hello ---

    def _let_in(self) -> StreamHello | None:
        """The hello, answered. None: it was refused, and the answer says why."""
        tune(self._accepted, self._silence_s)
        try:
            self._sock = secure_incoming(self._accepted, self._host.tls, _HELLO_TIMEOUT_S)
        except TlsRefusedError as error:
            self._answer(str(error))
            return None
        limit_waits(self._sock, _HELLO_TIMEOUT_S)
        self._intake = Intake(self._sock, self._silence_s)
        if self._revoked:
            self._intake.revoke()
        try:
            hello = self._read_hello()
            peer = self._sock.peer if isinstance(self._sock, SecureSocket) else None
            refusal = self._host.refusal_of(hello, peer)
        except RemoteProtocolError as error:
            self._answer(f"the hello is malformed: {error}")
            raise
        if not refusal and hello.kind is StreamKind.PAGES:
            self.index = hello.index
            self._host.admit(self)
            self.admitted = True
        self._answer(refusal)
        limit_waits(self._sock, self._silence_s, one_thread=True)
        return None if refusal else hello

    def _answer(self, refusal: str) -> None:
        known = codecs.FAMILIES
        welcome = StreamWelcome(refusal=refusal, codecs=known, pull_codecs=known)
        self._sock.sendall(wire.encode_frame(wire.FrameKind.HELLO, welcome))

    def _read_hello(self) -> StreamHello:
        """Exactly one frame is read: page frames may follow it at once."""
        deadline = time.monotonic() + _HELLO_TIMEOUT_S
        header = bytearray(wire.HEADER_BYTES)
        self._intake.fill(memoryview(header), deadline=deadline)
        kind, length = wire.parse_header(bytes(header))
        if kind is not wire.FrameKind.HELLO:
            raise RemoteProtocolError(f"a stream began with a {kind.name} frame")
        body = bytearray(length)
        self._intake.fill(memoryview(body), deadline=deadline)
        return wire.Frame(kind, bytes(body)).decode(_hello_decoder)

    def _hand_over(self, kind: StreamKind) -> None:
        if not is_alive(self._sock):
            return  # Its other end may have come again, and that stream be in use by now.
        limit_waits(self._sock, 0)
        self._handed_over = True
        if kind is StreamKind.DEVICE:
            self._host.device_stream(self._sock)
        else:
            self._host.post_copy_stream(kind, self._sock)

    # --- page frames ---

    def _serve(self) -> None:
        """Until BYE. ConnectionEndedError, RemoteProtocolError: the stream is closed."""
        landing = Landing(self._intake)
        try:
            self._serve_into(landing)
        finally:
            landing.close()

    def _serve_into(self, landing: Landing) -> None:
        header_view = memoryview(bytearray(frames.HEADER_BYTES))
        self._packed = bytearray(frames.PACKED_BYTES_MAX)
        ranges_view = memoryview(bytearray(frames.FRAME_RANGES_MAX * frames.RANGE_BYTES))
        while True:
            self._intake.fill(header_view, idle=True)
            header = frames.parse_header(header_view)
            if header.kind is FrameKind.BYE:
                return
            if header.kind not in _FROM_SOURCE:
                raise RemoteProtocolError(f"a source sends no {header.kind.name}")
            if header.kind in frames.SEQUENCED:
                self._sequence += 1
                if header.sequence != self._sequence:
                    raise RemoteProtocolError(
                        f"frame {header.sequence} came instead of {self._sequence}"
                    )
            if header.count:
                encoded = ranges_view[: header.count * frames.RANGE_BYTES]
                self._intake.fill(encoded)
                content = frames.parse_ranges(header, encoded, self._memory.shapes)
                self._apply(header, content, landing)
            if header.kind is FrameKind.ARM:
                self._host.arm()
            if header.kind in frames.SEQUENCED:
                self._sock.sendall(frames.encode(FrameKind.ACK, sequence=self._sequence))

    def _apply(self, header: frames.Header, content: Ranges, landing: Landing) -> None:
        region = self._memory.regions[header.region]
        match header.kind:
            case FrameKind.EXPECT:
                if not region.can_pwrite:
                    self._memory.prefaulter.expect(header.region, content)
            case FrameKind.MISSING:
                self._host.missing(header.region, content)
            case FrameKind.PAGES:
                landing.receive(region, content)
            case FrameKind.PACKED | FrameKind.ZSTD:
                payload = self._unpack(header, ranges.byte_count(content))
                landing.write(region, content, payload)
            case _:
                self._clear(region, content)

    def _clear(self, region: MappedRegion, content: Ranges) -> None:
        """Zeros are holes. EngineError."""
        try:
            for start, end in content.tolist():
                if kernel.has_data(region.fd, start, end):
                    kernel.punch_hole(region.fd, start, end)
        except OSError as error:
            raise unwritable(region, error) from error

    def _unpack(self, header: frames.Header, size: int) -> memoryview:
        """RemoteProtocolError: it isn't what was announced, and no guest memory was touched."""
        packed = memoryview(self._packed)[: header.payload_bytes]
        self._intake.fill(packed)
        return codecs.decompress(header.kind, packed, size)
