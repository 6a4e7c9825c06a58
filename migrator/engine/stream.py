"""One page stream, as the source has it: a connection that sends frames and counts their acks.

    connect ─► send ... send ─► await_acknowledged ─► send ...
       ▲         │ StreamBrokenError                          close
       └─────────┴── take_unacknowledged, to be sent again

Single-threaded: whoever delivers on a stream owns it. Its socket never blocks; waiting is the
waiter's. Pages leave without a copy in user space: long ranges by sendfile from the memory file,
short ones by a vectored send from our mapping of it. With TLS all go from the mapping, encrypted
where they lie.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from migrator import ranges, wire
from migrator.engine import frames
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.codecs import Codec, usable
from migrator.engine.control import POLL_IN, POLL_OUT, Waiter
from migrator.engine.frames import FrameKind, StreamHello, StreamWelcome
from migrator.engine.link import LinkGauge, tcp_figures
from migrator.engine.memory import MappedRegion
from migrator.engine.transport import (
    SecureSocket,
    StreamSocket,
    TlsPeer,
    TlsRefusedError,
    refusal_of,
    secure_outgoing,
    wire_bytes,
)
from migrator.errors import EngineError, RemoteProtocolError, words
from migrator.ranges import Ranges

SENDFILE_BYTES_MIN: Final = 64 * 1024
"""From here on sendfile's fixed cost is below that of copying."""
CAP_SLACK_S: Final = 0.01
"""Half of what a bandwidth cap saves up."""
TOLD_BYTES_MAX: Final = 1024**3
"""To give so much memory back takes the destination 0.15 s; a frame without an end to it would take
longer than a stream may be silent."""
_VECTOR_MAX: Final = 1024  # IOV_MAX

_welcome_decoder: Final = msgspec.msgpack.Decoder(StreamWelcome)


class StreamBrokenError(Exception):
    """The connection is gone, silent, or was refused by the network. It may be tried again."""


class StreamRefusedError(EngineError):
    """The other side answered, and doesn't want us: trying again can't help."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where the destination's engine listens, and how patient we are with it."""

    host: str
    port: int
    bind_address: str = ""
    silence_s: float = 5.0
    tls: TlsPeer | None = None
    """None: plain."""


class Piece(msgspec.Struct):
    """Ranges of one region that travel the same way. `content` shrinks as it is sent."""

    region: int
    content: Ranges
    kind: FrameKind = FrameKind.PAGES
    """PAGES or ZERO."""
    through_file: bool = False
    """Read by pread, for reading a hole through the mapping would populate it (huge pages)."""
    cold: bool = False
    """Huge pages, where the destination likely has no memory yet."""
    hole: bool = False
    """ZERO because the guest has no memory there: not counted as pages."""


class Sent(msgspec.Struct, frozen=True):
    """A frame that is on its way: its pages, or None for a barrier."""

    sequence: int
    piece: Piece | None


def tune(sock: socket.socket, silence_s: float) -> None:
    """No delay for small frames, and an error from the kernel when the peer is silent.

    Buffer sizes are the kernel's: its autotuning reaches further than SO_SNDBUF may.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(silence_s)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(silence_s / 3)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))


def open_stream(endpoint: Endpoint, hello: StreamHello, waiter: Waiter) -> StreamSocket:
    """Connect and be let in; a non-blocking socket. StreamBrokenError, StreamRefusedError."""
    return open_welcomed(endpoint, hello, waiter)[0]


def open_welcomed(
    endpoint: Endpoint, hello: StreamHello, waiter: Waiter
) -> tuple[StreamSocket, StreamWelcome]:
    """As `open_stream`, with what the destination says of itself."""
    sock: StreamSocket | None = None
    try:
        sock = _dial(endpoint, waiter)
        if endpoint.tls is not None:
            plain, sock = sock, None
            sock = secure_outgoing(plain, endpoint.tls, waiter, endpoint.silence_s)
        sock.send(wire.encode_frame(wire.FrameKind.HELLO, hello))
        welcome = _await_welcome(sock, endpoint, waiter)
    except (TlsRefusedError, ssl.SSLError) as error:
        if sock is not None:
            sock.close()
        if isinstance(error, ssl.SSLError) and endpoint.tls is not None:
            meant = refusal_of(error, endpoint.tls.node)
            if not isinstance(meant, TlsRefusedError):
                raise StreamBrokenError(str(meant)) from error
            error = meant
        raise StreamRefusedError(f"the destination refused a stream: {error}") from error
    except OSError as error:
        if sock is not None:
            sock.close()
        raise StreamBrokenError(
            f"connecting to {endpoint.host}:{endpoint.port}: {words(error)}"
        ) from error
    except BaseException:
        if sock is not None:
            sock.close()
        raise
    return sock, welcome


def _dial(endpoint: Endpoint, waiter: Waiter) -> socket.socket:
    """A connected, non-blocking socket. StreamBrokenError, OSError."""
    sock: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM
        )[0]
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        tune(sock, endpoint.silence_s)
        if endpoint.bind_address:
            sock.bind((endpoint.bind_address, 0))
        with contextlib.suppress(BlockingIOError):
            sock.connect(address)
        if not waiter.wait(sock, POLL_OUT, endpoint.silence_s):
            raise StreamBrokenError(f"no answer from {endpoint.host}:{endpoint.port}")
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))
    except BaseException:
        if sock is not None:
            sock.close()
        raise
    return sock


def _await_welcome(sock: StreamSocket, endpoint: Endpoint, waiter: Waiter) -> StreamWelcome:
    """Exactly one frame is read: a destination in post-copy asks for pages right behind it."""
    deadline = time.monotonic() + endpoint.silence_s
    kind, length = wire.parse_header(_receive(sock, wire.HEADER_BYTES, deadline, waiter))
    body = _receive(sock, length, deadline, waiter)
    welcome = wire.Frame(kind, body).decode(_welcome_decoder)
    if welcome.refusal:
        raise StreamRefusedError(f"the destination refused a stream: {welcome.refusal}")
    return welcome


def _receive(sock: StreamSocket, count: int, deadline: float, waiter: Waiter) -> bytes:
    """`count` bytes. Read first, then wait: poll(2) doesn't know what TLS has decrypted already."""
    data = b""
    while len(data) < count:
        try:
            part = sock.recv(count - len(data))
        except BlockingIOError:
            left = deadline - time.monotonic()
            if left <= 0 or not waiter.wait(sock, POLL_IN, left):
                raise StreamBrokenError("the engine there didn't answer the hello") from None
            continue
        if not part:
            raise StreamBrokenError("the destination's engine closed the stream at the hello")
        data += part
    return data


def _broken(error: OSError) -> Exception:
    if error.errno == errno.EFAULT:
        return EngineError("the guest's memory can't be read")
    return StreamBrokenError(words(error))


def _told_at_once(content: Ranges) -> Iterator[Ranges]:
    """Frames' worth of ranges that the destination punches out, acknowledging each."""
    while len(content):
        part, content = ranges.take(content, TOLD_BYTES_MAX, frames.FRAME_RANGES_MAX)
        yield part


class PageStream:
    """See the module. `bytes_sent` counts what the kernel took, headers included."""

    def __init__(self, endpoint: Endpoint, hello: StreamHello, bucket: TokenBucket) -> None:
        self._endpoint = endpoint
        self._hello = hello
        self._bucket = bucket
        self._sock: StreamSocket | None = None
        self._sequence = 0
        self._unacknowledged: collections.deque[Sent] = collections.deque()
        self._incoming = bytearray()
        self._mid_frame = False
        self.bytes_sent = 0
        self.carries = False
        """Something came back over this connection."""
        self.link = LinkGauge()
        self.codecs: tuple[Codec, ...] = ()
        """What the destination can undo, known once it is connected."""
        self.capped = True
        """Whether the bandwidth cap holds. Not in a final pass: the guest stands still."""

    @property
    def index(self) -> int:
        return self._hello.index

    @property
    def sock(self) -> StreamSocket | None:
        return self._sock

    def connect(self, waiter: Waiter) -> None:
        """A new connection; the old one is closed. StreamBrokenError, StreamRefusedError."""
        self.close()
        self._sock, welcome = open_welcomed(self._endpoint, self._hello, waiter)
        self.codecs = usable(welcome.codecs)
        self._sequence = 0
        self.carries = False
        self.link.restart()
        self._mid_frame = False
        self._incoming.clear()

    def close(self) -> None:
        """Idempotent. What isn't acknowledged stays known."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def take_unacknowledged(self) -> list[Sent]:
        """The frames that may not have arrived, oldest first. They are forgotten here."""
        found = list(self._unacknowledged)
        self._unacknowledged.clear()
        return found

    def expect(self, region: MappedRegion, content: Ranges, waiter: Waiter) -> None:
        """Announce ranges that will come soon. StreamBrokenError."""
        for at in range(0, len(content), frames.FRAME_RANGES_MAX):
            part = content[at : at + frames.FRAME_RANGES_MAX]
            data = frames.encode(FrameKind.EXPECT, region=region.index, content=part)
            self._mid_frame = True
            self._send_vector([data], waiter)
            self._mid_frame = False

    def send(self, piece: Piece, region: MappedRegion, waiter: Waiter) -> None:
        """One frame. StreamBrokenError: it is among the unacknowledged."""
        self._sequence += 1
        self._unacknowledged.append(Sent(self._sequence, piece))
        before = self.bytes_sent
        self._mid_frame = True
        vector: list[bytes | memoryview] = [
            frames.encode(
                piece.kind, sequence=self._sequence, region=piece.region, content=piece.content
            )
        ]
        if piece.kind is FrameKind.PAGES:
            by_file = region.can_sendfile and not isinstance(self._sock, SecureSocket)
            for start, end in piece.content.tolist():
                if by_file and end - start >= SENDFILE_BYTES_MIN:
                    if vector:
                        self._send_vector(vector, waiter, more=True)
                        vector = []
                    self._send_file(region.fd, start, end, waiter)
                elif piece.through_file:
                    vector.append(os.pread(region.fd, end - start, start))
                else:
                    vector.append(region.view[start:end])
        if vector:
            self._send_vector(vector, waiter, more=False)
        self._mid_frame = False
        self._settle(self.bytes_sent - before, waiter)

    def send_copy(
        self, piece: Piece, payload: memoryview, codec: Codec | None, waiter: Waiter
    ) -> None:
        """One frame of pages whose content is in `payload`, packed or as it is. As `send`."""
        self._sequence += 1
        self._unacknowledged.append(Sent(self._sequence, piece))
        before = self.bytes_sent
        self._mid_frame = True
        head = frames.encode(
            FrameKind.PAGES if codec is None else codec.kind,
            sequence=self._sequence,
            region=piece.region,
            content=piece.content,
            packed_bytes=len(payload),
        )
        self._send_vector([head, payload], waiter)
        self._mid_frame = False
        self._settle(self.bytes_sent - before, waiter)

    def gauge(self) -> float | None:
        """The link's rate in bytes a second, or the cap's; None: neither holds this stream up."""
        if self._sock is not None:
            self.link.note(time.monotonic(), tcp_figures(self._sock))
        cap = self._bucket.bytes_per_s if self.capped else None
        mine = None if cap is None else cap / self._bucket.sharers
        known = [rate for rate in (self.link.bytes_per_s, mine) if rate is not None]
        return min(known, default=None)

    @property
    def in_hand_s(self) -> float:
        """For how long nothing need be sent without losing any of the link, or of the cap."""
        queued_s = self.link.queued_s
        return max(queued_s, CAP_SLACK_S) if self.capped and self._bucket.bytes_per_s else queued_s

    def barrier(self, waiter: Waiter) -> None:
        """A frame that only asks for its acknowledgement."""
        self._sequence += 1
        self._unacknowledged.append(Sent(self._sequence, None))
        self._send_vector([frames.encode(FrameKind.BARRIER, sequence=self._sequence)], waiter)

    def tell(
        self, kind: FrameKind, region: MappedRegion | None, content: Ranges | None, waiter: Waiter
    ) -> None:
        """Frames without a payload: ZERO or MISSING for ranges, ARM. StreamBrokenError."""
        index = 0 if region is None else region.index
        parts: Iterable[Ranges | None] = [None] if content is None else _told_at_once(content)
        for part in parts:
            self._sequence += 1
            self._unacknowledged.append(Sent(self._sequence, None))
            data = frames.encode(kind, sequence=self._sequence, region=index, content=part)
            self._send_vector([data], waiter)
            self.collect_acks()  # The destination waits where it can't acknowledge any more.

    def bye(self) -> None:
        """Say that the end is meant, unless a frame is half sent. Never fails."""
        if self._sock is not None and not self._mid_frame:
            with contextlib.suppress(OSError):
                self._sock.send(frames.encode(FrameKind.BYE))

    def await_acknowledged(self, waiter: Waiter) -> None:
        """Until everything that was sent is in place. StreamBrokenError after a silence."""
        while self._unacknowledged:
            if not self.collect_acks() and not waiter.wait(
                self._connected(), POLL_IN, self._endpoint.silence_s
            ):
                raise StreamBrokenError(f"no acknowledgement within {self._endpoint.silence_s:g} s")

    def collect_acks(self) -> bool:
        """Take the acks that have arrived, without waiting. Whether any bytes came."""
        try:
            data = self._connected().recv(65536)
        except BlockingIOError:
            return False
        except OSError as error:
            raise StreamBrokenError(words(error)) from error
        if not data:
            raise StreamBrokenError("the destination closed the stream")
        self.carries = True
        self._incoming += data
        whole = len(self._incoming) - len(self._incoming) % frames.HEADER_BYTES
        for at in range(0, whole, frames.HEADER_BYTES):
            header = frames.parse_header(self._incoming[at : at + frames.HEADER_BYTES])
            if header.kind is not FrameKind.ACK or header.sequence > self._sequence:
                raise RemoteProtocolError(f"the destination acknowledged by {header}")
            while self._unacknowledged and self._unacknowledged[0].sequence <= header.sequence:
                self._unacknowledged.popleft()
        del self._incoming[:whole]
        return True

    def _connected(self) -> StreamSocket:
        if self._sock is None:
            raise StreamBrokenError("the stream isn't connected")
        return self._sock

    def _settle(self, count: int, waiter: Waiter) -> None:
        """Pay for `count` bytes; wait as long as the bandwidth cap says."""
        if not self.capped:
            return
        self._bucket.spend(count, time.monotonic())
        while (wait_s := self._bucket.wait_s(time.monotonic())) > 0:
            waiter.wait(None, 0, min(wait_s, 0.1))  # The cap may be lifted meanwhile.

    def _send_vector(
        self, vector: list[bytes | memoryview], waiter: Waiter, *, more: bool = False
    ) -> None:
        sock = self._connected()
        flags = socket.MSG_MORE if more else 0
        done = 0
        while done < len(vector):
            try:
                count = sock.sendmsg(vector[done : done + _VECTOR_MAX], (), flags)
            except BlockingIOError:
                self._await_writable(sock, waiter)
                continue
            except OSError as error:
                raise _broken(error) from error
            self.bytes_sent += wire_bytes(sock, count)
            while done < len(vector) and count >= len(vector[done]):
                count -= len(vector[done])
                done += 1
            if count:
                vector[done] = memoryview(vector[done])[count:]

    def _send_file(self, fd: int, start: int, end: int, waiter: Waiter) -> None:
        sock = self._connected()
        while start < end:
            try:
                count = os.sendfile(sock.fileno(), fd, start, end - start)
            except BlockingIOError:
                self._await_writable(sock, waiter)
                continue
            except OSError as error:
                raise _broken(error) from error
            if count == 0:
                raise EngineError("a memory region's file is shorter than the region")
            self.bytes_sent += count
            start += count

    def _await_writable(self, sock: StreamSocket, waiter: Waiter) -> None:
        if not waiter.wait(sock, POLL_OUT, self._endpoint.silence_s):
            raise StreamBrokenError(
                f"the destination took nothing for {self._endpoint.silence_s:g} s"
            )
