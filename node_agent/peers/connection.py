"""One TCP connection of the agents' protocol: framing, greeting, keepalive, and its end.

    GREETING ── the other's HELLO fits ──► OPEN ── lost, silent, closed ──► CLOSED
        │                                    │                                ▲
        └──── bad frame, wrong version, ─────┴──► REFUSING ── it closes, or ──┘
              nobody we know, no HELLO in 5 s     1 s passes

What the messages mean is its owner's business (`Link` on the dialing side, `Inbound` on the
listening side). Whoever sends what we don't accept is told why (NOTICE ferry.refused) and then
cut off; REFUSING reads and drops what still comes, or the reset would overtake the reason.

Everything runs in callbacks of the event loop: no task, no queue; two timers, cancelled at the end.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import enum
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from migrator.errors import PeerError, RemoteProtocolError
from migrator.model import NodeName
from migrator.tls import peer_node
from migrator.wire import Frame, FrameDecoder, FrameKind, encode_frame
from node_agent.peers import messages
from node_agent.peers.messages import Hello, Notice, Request, Response, Side

_PING: Final = messages.PING.encode()
UNREAD_LIMIT_BYTES: Final = 64 * 1024 * 1024
"""A peer that lets this much pile up unread is cut off."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The protocol's times (s). Tests shorten them."""

    hello_s: float = 5.0
    ping_every_s: float = 1.0
    silence_s: float = 3.0
    """A peer that sent nothing for so long is lost."""
    linger_s: float = 1.0
    """How long a refused peer may take to read why."""
    dial_s: float = 5.0
    backoff_first_s: float = 0.05
    backoff_longest_s: float = 1.0


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """The certificate that the other side showed; its chain was checked by TLS."""

    node: NodeName
    serial: str
    """Hexadecimal."""


class State(enum.Enum):
    INVALID = 0
    GREETING = 1
    OPEN = 2
    REFUSING = 3
    CLOSED = 4


class Owner(abc.ABC):
    """Hears from one connection. May raise RemoteProtocolError: the peer is refused with it."""

    def made(self, connection: Connection) -> None:
        """The socket is connected; `lost` will follow."""
        return

    @abc.abstractmethod
    def greeted(self, connection: Connection, hello: Hello) -> None:
        """The other side's HELLO, of our version. The connection is OPEN when this returns."""

    @abc.abstractmethod
    def received(self, connection: Connection, frame: Frame) -> None:
        """A REQUEST, RESPONSE or NOTICE that isn't the connection's own business."""

    @abc.abstractmethod
    def lost(self, connection: Connection, reason: str) -> None:
        """It is over; called exactly once, whether it was ever OPEN or not."""


class Connection(asyncio.Protocol):
    """One end of one connection. See the module."""

    def __init__(self, side: Side, owner: Owner, hello: Hello, timing: Timing) -> None:
        self._side = side
        self._owner = owner
        self._hello = hello
        self._timing = timing
        self._decoder = FrameDecoder()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._received_at_s = 0.0
        self._pinged_at_s: float | None = None
        self._reason = "closed by the other side"
        self.state = State.GREETING
        self.round_trip_ms: float | None = None
        self.certificate: PeerCertificate | None = None
        """None without TLS."""
        self.address: str = ""
        """The other side's host, for the log."""

    @property
    def unsent_bytes(self) -> int:
        """Written, but not yet taken by the kernel."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def send(self, kind: FrameKind, message: msgspec.Struct) -> None:
        """Hand a frame to the socket. LocalProtocolError above the cap, PeerError if not OPEN.

        Nothing was sent in both cases. A peer that doesn't read is cut off.
        """
        data = encode_frame(kind, message)
        if self.state is not State.OPEN:
            raise PeerError(f"the connection is over ({self._reason}); nothing was sent")
        self._write(data)

    def refuse(self, reason: str) -> None:
        """Say why, then cut off. Nothing that comes after is looked at."""
        if self.state in (State.REFUSING, State.CLOSED) or self._transport is None:
            return
        self.state = State.REFUSING
        self._reason = reason
        params = messages.pack(messages.RefusedParams(reason=reason[:1000]))
        self._write(encode_frame(FrameKind.NOTICE, Notice(method=messages.REFUSED, params=params)))
        if self._transport.can_write_eof():
            with contextlib.suppress(OSError):
                self._transport.write_eof()
        self._set_timer(self._timing.linger_s, self._transport.abort)

    def abort(self, reason: str) -> None:
        """Cut off at once. `lost` follows. Idempotent."""
        if self.state is State.CLOSED:
            return
        if self.state is not State.REFUSING:
            self._reason = reason
        if self._transport is not None:
            self._transport.abort()

    # --- called by the event loop -----------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        raw = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        name = transport.get_extra_info("peername")
        self.address = str(name[0]) if name else ""
        self._owner.made(self)
        self._received_at_s = self._loop.time()
        hello_s = self._timing.hello_s
        self._set_timer(hello_s, lambda: self.refuse(f"no HELLO within {hello_s:g} s"))
        secured = transport.get_extra_info("ssl_object")
        if secured is not None:
            try:
                self.certificate = _certificate(secured)
            except RemoteProtocolError as error:
                self.refuse(str(error))
                return
        if self._side is Side.DIALING:
            self._write(encode_frame(FrameKind.HELLO, self._hello))

    def data_received(self, data: bytes) -> None:
        self._received_at_s = self._loop.time()
        try:
            frames = self._decoder.feed(data)
            for frame in frames:
                self._take(frame)
            if frames:  # A bad frame behind good ones shows at the next call.
                self._decoder.feed(b"")
        except RemoteProtocolError as error:
            self.refuse(str(error))

    def eof_received(self) -> bool:
        return False  # Close.

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None and self.state is not State.REFUSING:
            self._reason = str(error)
        if self.state is State.GREETING and self._side is Side.DIALING and self.certificate:
            # TLS 1.3: our handshake is over before the other side has looked at our certificate.
            self._reason += (
                ", before it greeted; if it doesn't accept our certificate, its log says"
            )
        self.state = State.CLOSED
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        self._owner.lost(self, self._reason)

    # --- inside -----------------------------------------------------------------------------

    def _take(self, frame: Frame) -> None:
        if self.state in (State.REFUSING, State.CLOSED):
            return
        if frame.kind is FrameKind.NOTICE and self._side is Side.DIALING:
            self._refused_by(frame)
        elif self.state is State.GREETING:
            self._greet(frame)
        elif frame.kind in (FrameKind.REQUEST, FrameKind.RESPONSE, FrameKind.NOTICE):
            if not self._keepalive(frame):
                self._owner.received(self, frame)
        else:
            raise RemoteProtocolError(f"an unexpected {frame.kind.name.lower()} frame")

    def _greet(self, frame: Frame) -> None:
        if frame.kind is not FrameKind.HELLO:
            raise RemoteProtocolError(
                f"the first frame must be a hello, not a {frame.kind.name.lower()}"
            )
        hello = messages.open_frame(frame, messages.hello_decoder)
        if hello.version != messages.PROTOCOL_VERSION:
            raise RemoteProtocolError(
                f"{hello.node} (agent {hello.agent_version}) speaks version {hello.version} of the "
                f"agents' protocol, {self._hello.node} (agent {self._hello.agent_version}) version "
                f"{messages.PROTOCOL_VERSION}"
            )
        self._owner.greeted(self, hello)
        self.state = State.OPEN
        if self._side is Side.LISTENING:
            self._write(encode_frame(FrameKind.HELLO, self._hello))
        self._tick(self._loop.time())

    def _refused_by(self, frame: Frame) -> None:
        notice = messages.open_frame(frame, messages.notice_decoder)
        if notice.method != messages.REFUSED:
            raise RemoteProtocolError("a notice came from the listening side")
        refused = messages.unpack(notice.params, messages.RefusedParams, "a refusal")
        self.abort(f"it refused: {refused.reason}")

    def _tick(self, due_s: float) -> None:
        """Keepalive. A tick that comes late is our own loop's fault: then nobody is judged."""
        now_s = self._loop.time()
        silent_s = now_s - self._received_at_s
        late = now_s - due_s > self._timing.ping_every_s / 2
        if silent_s > self._timing.silence_s and not late:
            self.abort(f"silent for {silent_s:.1f} s")
            return
        if self._side is Side.DIALING and self._pinged_at_s is None:
            self._pinged_at_s = now_s
            ping = Request(
                id=messages.PING_ID,
                method=messages.PING,
                params=b"",
                timeout_s=self._timing.silence_s,
            )
            self._write(encode_frame(FrameKind.REQUEST, ping))
        next_s = now_s + self._timing.ping_every_s
        self._set_timer(self._timing.ping_every_s, lambda: self._tick(next_s))

    def _keepalive(self, frame: Frame) -> bool:
        """Whether it was a ping or its answer, and so is done with."""
        if frame.kind is FrameKind.REQUEST:
            return self._answer_ping(frame)
        return frame.kind is FrameKind.RESPONSE and self._take_pong(frame)

    def _answer_ping(self, frame: Frame) -> bool:
        # Cheap test first: decoding is the owner's work for all others.
        if len(frame.body) > 128 or _PING not in frame.body:
            return False
        request = messages.open_frame(frame, messages.request_decoder)
        if request.method != messages.PING or self._side is not Side.LISTENING:
            return False
        self._write(encode_frame(FrameKind.RESPONSE, Response(id=request.id)))
        return True

    def _take_pong(self, frame: Frame) -> bool:
        if self._pinged_at_s is None or len(frame.body) > 64:
            return False
        if messages.open_frame(frame, messages.response_decoder).id != messages.PING_ID:
            return False
        self.round_trip_ms = (self._loop.time() - self._pinged_at_s) * 1000
        self._pinged_at_s = None
        return True

    def _write(self, data: bytes) -> None:
        if self._transport is None:
            return
        self._transport.write(data)
        if self.unsent_bytes > UNREAD_LIMIT_BYTES:
            self.abort(f"it left {self.unsent_bytes} bytes unread")

    def _set_timer(self, delay_s: float, callback: Callable[[], object]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, callback)


def _certificate(secured: Any) -> PeerCertificate:
    """RemoteProtocolError if it names no node, or several."""
    details = secured.getpeercert() or {}
    return PeerCertificate(
        node=peer_node(secured), serial=str(details.get("serialNumber", "")).upper()
    )
