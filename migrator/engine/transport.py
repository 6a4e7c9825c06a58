"""A connection between two engines: plain TCP, or TLS 1.3 over it, with the same few methods.

    plain    socket.socket
    TLS      SecureSocket: reads and writes in records of 16 KiB, encrypted in user space
             (Python's lock is released meanwhile), straight from and into guest memory

Both ends check the other's certificate against the cluster's authority and the node's name in
it against the node that the migration is with. The handshake belongs to connecting: streams are
connected while the guest runs, so it is never part of a blackout. A side that wants TLS
and one that doesn't tell each other so, before anything else is said.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final, cast

from migrator.engine.control import POLL_IN, POLL_OUT, Waiter, poll
from migrator.errors import ConfigError, EngineError, words
from migrator.tls import (
    TlsFiles,
    client_context,
    peer_node,
    server_context,
    verification_words,
)

_DIRECT_BYTES_MIN: Final = 64 * 1024
"""From here on memory is encrypted where it lies; less is joined to fill whole records."""
_GATHER_BYTES: Final = 256 * 1024
_WRITE_BYTES_MAX: Final = 1024 * 1024
"""Written at once: what progress and a bandwidth cap see as one step."""
_SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h
_RECORD_BYTES: Final = 16 * 1024
_RECORD_OVERHEAD_BYTES: Final = 22
"""Header, content type and tag of a TLS 1.3 record (RFC 8446, 5.2)."""
_TLS_ONLY: Final = "its pages travel with TLS, ours without: tls.mode and the keys must agree"
_NO_TLS: Final = "its pages travel without TLS, ours with it: tls.mode and the keys must agree"
_CLIENT_HELLO: Final = b"\x16"
"""The first byte of a TLS connection; a plain one begins with the "F" of a frame's magic."""

_ReadableBuffer = bytes | bytearray | memoryview


class _Contexts:
    """What secures a connection: this node's files as they are when it is made.

    A certificate is renewed, and the old one ends, while a migration goes on; a page stream that
    breaks after that needs the new one, and in post-copy a guest waits for it. What can't be read
    any more is used as it was.
    """

    def __init__(self, make: Callable[[TlsFiles], ssl.SSLContext], files: TlsFiles) -> None:
        self._make, self._files = make, files
        self._last: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        """For one connection. From any thread. ConfigError if the files never could be used."""
        try:
            self._last = self._make(self._files)
        except ConfigError:
            if self._last is None:
                raise
        return self._last


class TlsPeer(_Contexts):
    """What secures the connections that are dialled, and the node that must be at their end."""

    def __init__(self, files: TlsFiles, node: str) -> None:
        super().__init__(client_context, files)
        self.node = node


def tls_peer(files: TlsFiles | None, node: str) -> TlsPeer | None:
    """None: connections to `node` are plain."""
    return None if files is None else TlsPeer(files, node)


class TlsRefusedError(Exception):
    """The other end isn't who it must be, or doesn't want us, or speaks plain. For good."""


class SecureSocket:
    """A TLS connection with the methods of `socket.socket` that streams use.

    One thread may read while another writes. Blocking calls are bounded by `limit_waits` and
    then raise BlockingIOError, as a socket with SO_RCVTIMEO does. An end of file that TLS didn't
    announce reads as an end of file: the streams' own frames say which ends are meant.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        """`sock`: non-blocking, its handshake done. RemoteProtocolError: the peer has no name."""
        self._sock = sock
        self.peer = peer_node(sock)
        """The node that the other end's certificate names."""
        self._blocking = False
        self._limit_s: float | None = None
        self._lock: contextlib.AbstractContextManager[object] = threading.Lock()
        """OpenSSL's state is one for both directions."""
        self._writing = threading.Lock()
        self._unsent: _ReadableBuffer | None = None
        """OpenSSL wants what it couldn't send at once to be offered again."""
        self._polls: dict[int, select.poll] = {}
        for events in (POLL_IN, POLL_OUT):
            self._polls[events] = select.poll()
            self._polls[events].register(sock, events)

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def buffered(self) -> bool:
        """Something can be read that poll(2) doesn't know of."""
        return self._sock.pending() > 0

    def setblocking(self, blocking: bool) -> None:
        self._blocking = blocking

    def limit_waits(self, seconds: float, *, one_thread: bool) -> None:
        """`one_thread`: nobody else reads or writes, so that OpenSSL may wait by itself. That
        spares an exception and a poll for most records.
        """
        self._limit_s = seconds or None
        self._sock.settimeout(self._limit_s if one_thread else 0.0)
        self._lock = contextlib.nullcontext() if one_thread else threading.Lock()

    def getsockopt(self, level: int, name: int, size: int) -> bytes:
        return self._sock.getsockopt(level, name, size)

    def setsockopt(self, level: int, name: int, value: int) -> None:
        self._sock.setsockopt(level, name, value)

    def shutdown(self, how: int) -> None:
        """As for a socket, from any thread: no call ever falls back to the plain connection."""
        socket.socket.shutdown(self._sock, how)

    def close(self) -> None:
        self._sock.close()

    def alive(self) -> bool:
        """Whether the other end hasn't closed, as far as the kernel knows."""
        return _alive(self._sock)

    # --- out ---

    def send(self, data: _ReadableBuffer) -> int:
        return self.sendmsg([data])

    def sendall(self, data: _ReadableBuffer) -> None:
        view = memoryview(data)
        while view:
            view = view[self.sendmsg([view]) :]

    def sendmsg(
        self, buffers: Iterable[_ReadableBuffer], ancillary: Iterable[object] = (), flags: int = 0
    ) -> int:
        """Send some of the buffers' content; how much. After BlockingIOError the same buffers have
        to be offered again: a part of them may be encrypted already.
        """
        with self._writing:
            if self._unsent is None:
                self._unsent = _next_write(buffers)
            while True:
                try:
                    with self._lock:
                        count = self._sock.write(self._unsent)
                    break
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                    wanted = POLL_IN if isinstance(error, ssl.SSLWantReadError) else POLL_OUT
                    if not self._ready(wanted):
                        raise BlockingIOError("nothing can be sent now") from None
                except TimeoutError:
                    raise BlockingIOError("nothing could be sent in time") from None
                except ValueError as error:
                    raise _closed() from error
            self._unsent = None
        return count

    # --- in ---

    def recv(self, count: int, flags: int = 0) -> bytes:
        data = bytearray(count)
        return bytes(data[: self.recv_into(data)])

    def recv_into(self, buffer: bytearray | memoryview, count: int = 0, flags: int = 0) -> int:
        """At least a byte; with MSG_WAITALL all of `buffer`, or what came before a silence."""
        view = memoryview(buffer)
        size, got, whole = len(view), 0, bool(flags & socket.MSG_WAITALL)
        read = cast(Callable[[int, memoryview], int], self._sock.read)  # With a buffer it counts.
        while got < size:
            try:
                with self._lock:
                    while got < size:
                        received = read(size - got, view[got:])
                        got += received
                        if not received or not whole:
                            return got
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                wanted = POLL_IN if isinstance(error, ssl.SSLWantReadError) else POLL_OUT
                if not self._ready(wanted):
                    break
            except TimeoutError:
                break
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return got
            except ValueError as error:
                raise _closed() from error
        if not got:
            raise BlockingIOError("nothing came")
        return got

    def recvmsg_into(
        self, buffers: Iterable[bytearray | memoryview], ancillary: int = 0, flags: int = 0
    ) -> tuple[int, list[object], int, object]:
        """As a socket's; only the count means anything."""
        got = 0
        for buffer in buffers:
            try:
                count = self.recv_into(buffer, 0, flags)
            except BlockingIOError:
                if got:
                    break
                raise
            got += count
            if count < len(buffer):
                break
        return got, [], 0, None

    def _ready(self, events: int) -> bool:
        """Wait until the socket is ready. False: that isn't waited for, or it took too long."""
        timeout_ms = None if self._limit_s is None else int(self._limit_s * 1e3)
        return self._blocking and bool(self._polls[events].poll(timeout_ms))


StreamSocket = socket.socket | SecureSocket


def _closed() -> OSError:
    """What a plain socket says of a use after `close`; an SSLSocket raises ValueError."""
    return OSError(errno.EBADF, "the connection was closed here")


def _next_write(buffers: Iterable[_ReadableBuffer]) -> _ReadableBuffer:
    """What to encrypt next: a part of a long buffer as it is, or short ones joined."""
    joined: list[_ReadableBuffer] = []
    size = 0
    for buffer in buffers:
        if len(buffer) >= _DIRECT_BYTES_MIN:
            if not joined:
                return memoryview(buffer)[:_WRITE_BYTES_MAX]
            break
        joined.append(buffer)
        size += len(buffer)
        if size >= _GATHER_BYTES:
            break
    return joined[0] if len(joined) == 1 else b"".join(joined)


def wire_bytes(sock: StreamSocket, count: int) -> int:
    """What `count` bytes that were sent took of the network, TCP's own headers apart."""
    if isinstance(sock, SecureSocket):
        return count + -(-count // _RECORD_BYTES) * _RECORD_OVERHEAD_BYTES
    return count


def limit_waits(sock: StreamSocket, seconds: float, *, one_thread: bool = False) -> None:
    """Make `sock` blocking, each wait bounded; 0: unbounded. `one_thread`: that alone uses it."""
    if isinstance(sock, SecureSocket):
        sock.setblocking(True)
        sock.limit_waits(seconds, one_thread=one_thread)
        return
    whole = int(seconds)
    limit = struct.pack("@ll", whole, int((seconds - whole) * 1e6))
    sock.setblocking(True)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def limit_send_buffer(sock: StreamSocket, size_bytes: int) -> None:
    """What may be sent and not yet acknowledged, about; the kernel's own tuning ends with it.

    Without CAP_NET_ADMIN at most net.core.wmem_max.
    """
    asked = size_bytes // 2  # The kernel doubles it (socket(7)).
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, asked)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, asked)


def is_buffered(sock: StreamSocket) -> bool:
    """Whether a read would find something though poll(2) says no."""
    return isinstance(sock, SecureSocket) and sock.buffered


def is_alive(sock: StreamSocket) -> bool:
    """Whether the other end of an idle stream hasn't closed it."""
    return sock.alive() if isinstance(sock, SecureSocket) else _alive(sock)


def _alive(sock: socket.socket) -> bool:
    descriptor = sock.fileno()
    if descriptor < 0:
        return False
    if not poll({descriptor: POLL_IN}, 0.0):
        return True  # Unread: a socket that has a timeout would wait for as long.
    try:
        # The base class's: what is on the wire, encrypted or not.
        found = socket.socket.recv(sock, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return found != b""


def check_local_address(address: str) -> None:
    """EngineError if the migration address isn't this machine's: no other is used instead.

    "": any will do.
    """
    if not address:
        return
    try:
        family, kind, protocol, _, name = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.bind(name)
    except OSError as error:
        raise EngineError(
            f"this node's migration address {address} can't be used: {words(error)}; "
            "pages don't leave from another one"
        ) from error


# --- handshakes ---


def secure_outgoing(
    sock: socket.socket, peer: TlsPeer, waiter: Waiter, timeout_s: float
) -> SecureSocket:
    """TLS as the end that dialled, over a connected, non-blocking socket, whose ownership passes.

    TlsRefusedError; OSError (the connection broke, or was silent); what the waiter raises.
    """
    secured = peer.context().wrap_socket(
        sock, server_hostname=peer.node, do_handshake_on_connect=False
    )
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            try:
                secured.do_handshake()
                return SecureSocket(secured)
            except ssl.SSLWantReadError:
                events = POLL_IN
            except ssl.SSLWantWriteError:
                events = POLL_OUT
            if not waiter.wait(secured, events, max(0.0, deadline - time.monotonic())):
                raise TimeoutError("no answer in the TLS handshake")
    except ssl.SSLError as error:
        secured.close()
        raise refusal_of(error, peer.node) from error
    except BaseException:
        secured.close()
        raise


def refusal_of(error: ssl.SSLError, node: str) -> Exception:
    """What an error of TLS means to the end that dialled: TlsRefusedError, or a broken link."""
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return ConnectionResetError("the destination's engine closed the connection")
    if isinstance(error, ssl.SSLCertVerificationError):
        return TlsRefusedError(f"the certificate of node {node}: {verification_words(error)}")
    reason = error.reason or str(error)
    if reason == "WRONG_VERSION_NUMBER":
        return TlsRefusedError(f"node {node}: {_NO_TLS}")
    return TlsRefusedError(f"TLS with node {node}: {reason.lower().replace('_', ' ')}")


class ListenerTls(_Contexts):
    """What secures a listener's connections."""

    def __init__(self, files: TlsFiles) -> None:
        """ConfigError if the files can't be used."""
        super().__init__(_without_tickets, files)
        self.context()


def _without_tickets(files: TlsFiles) -> ssl.SSLContext:
    """Nothing is resumed; a ticket would lie before the first frame."""
    context = server_context(files)
    context.num_tickets = 0
    return context


def secure_incoming(
    sock: socket.socket, context: ssl.SSLContext | None, timeout_s: float
) -> StreamSocket:
    """What a connection that was accepted turns into: plain if `context` is None. Blocking.

    TlsRefusedError: one end is plain and the other isn't; `sock` is the caller's still, for a
    refusal in clear text, which makes either dialling end understand. RemoteProtocolError: it
    names no node. OSError: it broke, was silent, or its certificate is no good.
    """
    limit_waits(sock, timeout_s)
    first = sock.recv(1, socket.MSG_PEEK)
    if context is None:
        if first == _CLIENT_HELLO:
            raise TlsRefusedError(_NO_TLS)
        return sock
    if first and first != _CLIENT_HELLO:
        raise TlsRefusedError(_TLS_ONLY)
    sock.settimeout(timeout_s)
    secured = context.wrap_socket(sock, server_side=True)
    try:
        secured.setblocking(False)
        return SecureSocket(secured)
    except BaseException:
        secured.close()
        raise
