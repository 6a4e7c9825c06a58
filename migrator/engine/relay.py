"""The device channel: the hypervisors' own migration stream, carried between the engines.

    QEMU ══ unix ══► source's engine ══ TCP ══► destination's engine ══ unix ══► QEMU
         ◄══════════                 ◄═════════                      ◄══════════

On TCP the bytes are in chunks, so that an end that was meant (a hypervisor shut down its side)
differs from an engine that died: then the hypervisor's socket is closed at once, which makes a
source give up its migration and resume.

    byte   0      1          5
           ┌──────┬──────────┬───────┐     kind 1 DATA, 2 END (no more data from this side),
           │ kind │ length   │ data  │     3 GONE (the hypervisor closed its socket)
           └──────┴──────────┴───────┘     kind 0 is invalid; length: little endian, <= 256 KiB
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from migrator.engine.control import (
    POLL_IN,
    AgentGoneError,
    ChannelLostError,
    Control,
    HelperWaiter,
    Signal,
    StoppedError,
    Waiter,
    poll,
)
from migrator.engine.frames import StreamHello
from migrator.engine.stream import Endpoint, StreamBrokenError, open_stream
from migrator.engine.transport import StreamSocket, is_alive, limit_waits
from migrator.engine_messages import DisksDeactivated
from migrator.errors import EngineError, RemoteProtocolError

_DATA, _END, _GONE = 1, 2, 3
_HEADER: Final = struct.Struct("<BI")
_CHUNK_BYTES: Final = 256 * 1024
_JOIN_S: Final = 1.0
_ENDING_BYTES: Final = 6
_FOOTER, _EOF = 0x7E, 0x00


class DisksGap:
    """How long QEMU takes to let go of the guest's disks, as its stream tells. Pure.

    It does so behind the last device's footer (0x7e and a number of four bytes) and before the
    stream's end (a zero byte; a description of the stream is left out by our machines). What it
    writes leaves in pieces of 32 KiB: so the gap before the last piece is that time, and what the
    devices in that piece took.
    """

    def __init__(self, now_s: float) -> None:
        self._before_s = now_s
        self._ending = b""

    def saw(self, piece: bytes | memoryview, at_s: float) -> float | None:
        """The seconds, if that is the last piece."""
        gap_s, self._before_s = at_s - self._before_s, at_s
        self._ending = ending = (self._ending + piece[-_ENDING_BYTES:])[-_ENDING_BYTES:]
        last = len(ending) == _ENDING_BYTES and (ending[0], ending[-1]) == (_FOOTER, _EOF)
        return gap_s if last else None


class Pumps:
    """Two threads that carry bytes both ways until both sides have ended, or one broke.

    Owns both sockets. `close` at any time, from any thread; idempotent.
    """

    def __init__(
        self,
        hypervisor: socket.socket,
        peer: StreamSocket,
        *,
        at_source: bool,
        begun: Callable[[], None],
        deactivated: Callable[[float, float], None] | None = None,
    ) -> None:
        """Called from helper threads: `begun` before the first byte of the source's hypervisor is
        passed on; `deactivated` with how long the disks took (`DisksGap`), and when they were let
        go, by the monotonic clock.
        """
        self._begun = begun
        self._deactivated = deactivated
        hypervisor.setblocking(True)
        limit_waits(peer, 0)
        self._hypervisor = hypervisor
        self._peer = peer
        self._at_source = at_source
        self._threads = [
            threading.Thread(target=self._guarded, args=(pump,), daemon=True)
            for pump in (self._outward, self._inward)
        ]

    def run(self) -> None:
        """Returns when the channel is over. The sockets are closed then."""
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        self._hypervisor.close()
        self._peer.close()

    def close(self) -> None:
        for end in (self._hypervisor, self._peer):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _guarded(self, pump: Callable[[], None]) -> None:
        try:
            pump()
        except (OSError, RemoteProtocolError, EOFError):
            self.close()

    def _outward(self) -> None:
        """Hypervisor to peer."""
        buffer = bytearray(_HEADER.size + _CHUNK_BYTES)
        view = memoryview(buffer)
        gap = DisksGap(time.monotonic())
        if self._at_source:
            self._begun()
        while True:
            try:
                count = self._hypervisor.recv_into(view[_HEADER.size :])
            except ConnectionResetError:
                count = 0
            if count == 0:
                poller = select.poll()
                poller.register(self._hypervisor, 0)
                gone = any(events & select.POLLHUP for _, events in poller.poll(0))
                self._peer.sendall(_HEADER.pack(_GONE if gone else _END, 0))
                return
            at_s = time.monotonic()
            _HEADER.pack_into(buffer, 0, _DATA, count)
            self._peer.sendall(view[: _HEADER.size + count])
            if self._deactivated is not None:
                took_s = gap.saw(view[_HEADER.size : _HEADER.size + count], at_s)
                if took_s is not None:
                    self._deactivated(took_s, at_s)

    def _inward(self) -> None:
        """Peer to hypervisor. EOFError if the peer ends without saying so."""
        view = memoryview(bytearray(_CHUNK_BYTES))
        listening, begun = True, self._at_source
        while True:
            kind, length = _HEADER.unpack(self._receive(view, _HEADER.size))
            if not begun:
                begun = True
                self._begun()
            if kind == _DATA and 0 < length <= _CHUNK_BYTES:
                data = self._receive(view, length)
                if listening:
                    try:
                        self._hypervisor.sendall(data)
                    except ConnectionError:  # Of any other error it would lack a part, and wait.
                        listening = False  # It went; our other half tells the peer.
            elif kind in (_END, _GONE) and length == 0:
                both = kind == _GONE and self._at_source
                with contextlib.suppress(OSError):
                    self._hypervisor.shutdown(socket.SHUT_RDWR if both else socket.SHUT_WR)
                return
            else:
                raise RemoteProtocolError(f"device chunk of kind {kind} and {length} bytes")

    def _receive(self, view: memoryview, count: int) -> memoryview:
        got = 0
        while got < count:
            received = self._peer.recv_into(view[got:count], 0, socket.MSG_WAITALL)
            if received == 0:
                raise EOFError("the other engine went without a word")
            got += received
        return view[:count]


class SourceRelay:
    """The source's side: a TCP stream that is connected beforehand, and a unix listener."""

    def __init__(
        self,
        endpoint: Endpoint,
        hello: StreamHello,
        patience_s: float,
        control: Control,
    ) -> None:
        """`control` is told from a helper thread."""
        self._control = control
        self._endpoint = endpoint
        self._hello = hello
        self._patience_s = patience_s
        self._peer: StreamSocket | None = None
        self._listener: socket.socket | None = None
        self._path: Path | None = None
        self._pumps: Pumps | None = None
        self._thread: threading.Thread | None = None
        self._stop = Signal()

    def prepare(self, waiter: Waiter) -> None:
        """Have a fresh, live TCP stream. Ends an earlier relay. ChannelLostError if it can't."""
        self._end()
        self._connect(waiter)

    def _connect(self, waiter: Waiter) -> None:
        """As `prepare`, for whichever thread has the stream now."""
        if self._peer is not None and is_alive(self._peer):
            return
        deadline = time.monotonic() + self._patience_s
        while True:
            if self._peer is not None:
                self._peer.close()
                self._peer = None
            try:
                self._peer = open_stream(self._endpoint, self._hello, waiter)
            except StreamBrokenError as error:
                if time.monotonic() > deadline:
                    raise ChannelLostError(f"the device channel: {error}") from error
                waiter.wait(None, 0, 0.1)
            else:
                return

    def listen(self, path: Path) -> None:
        """Let the hypervisor connect to `path` (mode 0600), and relay it. A stale socket goes."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            if path.is_socket():
                path.unlink()
            listener.bind(str(path))
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise EngineError(f"the device channel can't listen on {path}: {error}") from error
        finally:
            os.umask(mask)
        self._listener, self._path = listener, path
        self._thread = threading.Thread(target=self._serve, args=(listener,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Idempotent. The hypervisor sees its socket closed."""
        self._end()
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    def _serve(self, listener: socket.socket) -> None:
        """One hypervisor, once. Returns early when the relay is ended."""
        try:
            self._await(listener, HelperWaiter(self._stop))
        except (EngineError, StoppedError):
            return  # It is ended; or no stream is to be had, which ends the pages' as well.
        peer = self._peer
        if peer is None:
            return
        with contextlib.suppress(OSError):
            hypervisor, _ = listener.accept()
            self._pumps = Pumps(
                hypervisor,
                peer,
                at_source=True,
                begun=self._control.at_switchover,
                deactivated=self._tell_deactivated,
            )
            self._peer = None  # It belongs to the pumps now.
            self._pumps.run()

    def _await(self, listener: socket.socket, waiter: HelperWaiter) -> None:
        """Until the hypervisor calls, with a live stream: a broken one is replaced at once, while
        the guest runs. Nothing comes on it before the hypervisor has sent, but its end.
        """
        idle = True
        while True:
            watched = {listener.fileno(): POLL_IN, self._stop.fileno(): POLL_IN}
            if self._peer is not None and idle:
                watched[self._peer.fileno()] = POLL_IN
            called = listener.fileno() in poll(watched, 86_400)
            waiter.tick()
            idle = self._peer is None or not is_alive(self._peer)
            self._connect(waiter)
            if called:
                return

    def _tell_deactivated(self, seconds: float, monotonic_s: float) -> None:
        at_s = time.time() - (time.monotonic() - monotonic_s)
        with contextlib.suppress(AgentGoneError):  # The main thread sees it, too.
            self._control.send(DisksDeactivated(seconds=seconds, at_s=at_s))

    def _end(self) -> None:
        self._stop.set()
        if self._pumps is not None:
            self._pumps.close()
            self._pumps = None
        if self._thread is not None:
            self._thread.join(_JOIN_S)
            self._thread = None
        self._stop.clear()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None


class DestinationRelay:
    """The destination's side: waits for a TCP stream and a path, in any order, and joins them.

    Not before the source's first byte: a stream that breaks while it waits is replaced by the next,
    and the hypervisor, which would take its end for the guest's, hears of neither.
    """

    def __init__(
        self, connect_s: float, opened: Callable[[Path], None], begun: Callable[[], None]
    ) -> None:
        """Called from helper threads: `opened` when the hypervisor is connected, `begun` when the
        source's has begun to send.
        """
        self._begun = begun
        self._connect_s = connect_s
        self._opened = opened
        self._changed = threading.Condition()
        self._peer: StreamSocket | None = None
        """The newest; its thread closes it."""
        self._hypervisor: socket.socket | None = None
        self._pumps: Pumps | None = None
        self._closed = threading.Event()

    def offer_peer(self, peer: StreamSocket) -> None:
        """A stream from the source's engine; it replaces one that waits or is in use."""
        with self._changed:
            if self._pumps is not None:
                self._pumps.close()
                self._pumps = None
            self._dismiss()
            self._peer = peer
        threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def open(self, path: Path) -> None:
        """Connect to the hypervisor at `path`; call it in a thread of its own.

        EngineError if it doesn't listen in time.
        """
        deadline = time.monotonic() + self._connect_s
        while not self._closed.is_set():
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(str(path))
            except OSError as error:
                sock.close()
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"the hypervisor isn't listening on {path}: {error}"
                    ) from error
                self._closed.wait(0.005)
                continue
            with self._changed:
                self._hypervisor = sock
                self._changed.notify_all()
            self._opened(path)
            return

    def close(self) -> None:
        self._closed.set()
        with self._changed:
            if self._pumps is not None:
                self._pumps.close()
            self._dismiss()
            if self._hypervisor is not None:
                self._hypervisor.close()
                self._hypervisor = None

    def _dismiss(self) -> None:
        """Let the thread of the stream that waits end, which closes it."""
        if self._peer is not None:
            with contextlib.suppress(OSError):  # It has broken: the thread sees that, too.
                self._peer.shutdown(socket.SHUT_RDWR)
            self._peer = None
        self._changed.notify_all()

    def _serve(self, peer: StreamSocket) -> None:
        """Until the stream's first byte, and from then on; returns when it is over."""
        poll({peer.fileno(): POLL_IN}, 86_400)
        with self._changed:
            while self._peer is peer and self._hypervisor is None and is_alive(peer):
                self._changed.wait()
            if self._peer is not peer or self._hypervisor is None or not is_alive(peer):
                if self._peer is peer:
                    self._peer = None
                peer.close()
                return
            pumps = Pumps(self._hypervisor, peer, at_source=False, begun=self._begun)
            self._peer = self._hypervisor = None
            self._pumps = pumps
        pumps.run()
