"""The destination's engine: listens, and puts what arrives into the guest's memory.

The main thread talks to the agent and accepts; each connection has a thread of its own, so that
nothing but the socket stands between a frame's arrival and its acknowledgement.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from pathlib import Path
from typing import Final

from migrator.engine import frames
from migrator.engine.channel import ChannelHealth
from migrator.engine.control import (
    POLL_IN,
    ChannelLostError,
    Control,
    Signal,
    StoppedError,
    ThreadFaults,
    poll,
)
from migrator.engine.filler import Filler
from migrator.engine.frames import StreamHello, StreamKind
from migrator.engine.intake import ConnectionEndedError
from migrator.engine.memory import map_regions
from migrator.engine.missing import post_copy_refusal
from migrator.engine.receiver import Connection, Memory
from migrator.engine.relay import DestinationRelay
from migrator.engine.transport import ListenerTls, StreamSocket
from migrator.engine_messages import (
    Attach,
    Configure,
    DeviceChannelOpen,
    Listening,
    OpenDeviceChannel,
    Ping,
    Pong,
    PostCopyArmed,
    PostCopyDone,
    PullAll,
    Stop,
    Stopped,
    ToEngine,
)
from migrator.errors import EngineError, WrongStateError, words
from migrator.ranges import Ranges

_CONNECTIONS_MAX: Final = 2 * frames.STREAMS_MAX + 16
"""Every stream, its replacement, and some strangers."""
_REPLACE_S: Final = 5.0
_ATTACH_S: Final = 3.0
"""Between the source's word that pages will be missing and `Attach`: the agent gives leave for the
one when it has said the other."""
_GRACE_S: Final = 5.0
"""The source gives up first: it knows more."""


class DestinationEngine:
    """Use: construct, `run`, and in any case `close`."""

    def __init__(self, configure: Configure, descriptors: list[int], control: Control) -> None:
        self._configure = configure
        self._control = control
        self._attached = threading.Event()
        """The hypervisor has mapped its memory, and its userfaultfd is here."""
        self._uffd = -1
        if configure.attached:
            self._uffd, _, *descriptors = descriptors
            self._attached.set()
        self._memory = Memory(map_regions(configure, descriptors))
        self._health = ChannelHealth(control.send)
        self._faults = ThreadFaults()
        self._filled = Signal()
        self._filler: Filler | None = None
        self._lock = threading.Lock()
        """Over the filler's making."""
        self._admitting = threading.Lock()
        """One stream at a time takes an earlier one's place, whose thread may need the filler."""
        self._armed = False
        """Pages are missing: no page stream has to come back, for all that they carry was told."""
        self._connections: list[Connection] = []
        self._streams: dict[int, Connection] = {}
        self._closing = False
        self._tls = ListenerTls(configure.tls) if configure.tls is not None else None
        self._relay = DestinationRelay(
            configure.device_connect_s, self._device_open, control.at_switchover
        )
        try:
            self._listener = _listen(configure.bind_address)
        except OSError as error:
            raise EngineError(
                f"can't listen on {configure.bind_address or 'any address'}: {words(error)}"
            ) from error

    def run(self) -> None:
        """Until told to stop (StoppedError), or until something can't be helped (any other)."""
        if self._configure.post_copy and not self._the_filler().take_over():
            self._finish_filling()
        host, port = self._listener.getsockname()[:2]
        refusal = post_copy_refusal(self._memory.regions)
        self._control.send(Listening(host=host, port=port, no_post_copy=refusal))
        for message in self._control.pipelined:
            self._handle(message)
        watched = {
            self._control.fileno(): POLL_IN,
            self._listener.fileno(): POLL_IN,
            self._faults.signal.fileno(): POLL_IN,
            self._filled.fileno(): POLL_IN,
        }
        patience_s = self._configure.reconnect_s + _GRACE_S
        while True:
            happened = poll(watched, 1.0)
            if self._control.fileno() in happened:
                for message in self._control.receive():
                    self._handle(message)
            if self._faults.signal.fileno() in happened:
                self._faults.raise_first()
            if self._listener.fileno() in happened:
                self._accept()
            if self._filled.fileno() in happened:
                self._finish_filling()
            if self._health.broken_s > patience_s and not self._armed:
                raise ChannelLostError(f"the source's engine stayed away for {patience_s:g} s")

    def close(self) -> None:
        """Nothing writes to guest memory any more when this returns. Never fails.

        Pages that are missing in post-copy stay missing: who touches one waits for a successor.
        """
        self._closing = True
        self._listener.close()
        self._relay.close()
        if self._filler is not None:
            self._filler.close()
        for connection in self._connections:
            connection.revoke()
        for connection in self._connections:
            connection.join(_REPLACE_S)
        self._memory.prefaulter.close()

    def stopped(self) -> Stopped:
        """The last words."""
        return Stopped()

    def _handle(self, message: ToEngine) -> None:
        match message:
            case OpenDeviceChannel():
                path = Path(message.path)
                threading.Thread(target=self._open_device, args=(path,), daemon=True).start()
            case Attach():
                self._uffd = self._control.take_descriptor()
                for region, layout in zip(self._memory.regions, message.regions, strict=True):
                    region.layout = layout
                self._attached.set()
            case PullAll():
                self._the_filler().pull_all()
            case Ping():
                self._control.send(Pong())
            case Stop():
                raise StoppedError("the agent said so")
            case _:
                raise WrongStateError(type(message).__name__, "destination", "source")

    def _the_filler(self) -> Filler:
        """Made when the first page is missing, or its streams come: not every memory can have it.

        EngineError for one that can't.
        """
        if not self._attached.wait(_ATTACH_S):
            raise EngineError("pages are to be missing, and the hypervisor isn't there yet")
        with self._lock:
            if self._filler is None:
                self._filler = Filler(
                    self._uffd,
                    self._memory.regions,
                    silence_s=self._configure.silence_s,
                    on_done=self._filled.set,
                    fault=self._faults.report,
                )
            return self._filler

    def _finish_filling(self) -> None:
        self._filled.clear()
        report = self._the_filler().finish()
        self._control.send(
            PostCopyDone(
                seconds=report.seconds,
                pages=report.pages,
                faults=report.faults,
                fault_ms_median=report.fault_ms_median,
                fault_ms_max=report.fault_ms_max,
                packed_ratio=report.packed_ratio,
            )
        )

    def _open_device(self, path: Path) -> None:
        try:
            self._relay.open(path)
        except BaseException as error:
            self._faults.report(error)

    def _device_open(self, path: Path) -> None:
        self._control.send(DeviceChannelOpen(path=str(path)))

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # It was gone again.
        self._connections = [c for c in self._connections if not c.join(0)]
        if len(self._connections) >= _CONNECTIONS_MAX:
            sock.close()
            return
        connection = Connection(sock, self._memory, self, self._configure.silence_s)
        self._connections.append(connection)
        connection.start()

    # --- Host: called from the connections' threads ---

    @property
    def tls(self) -> ssl.SSLContext | None:
        """See `receiver.Host`."""
        return None if self._tls is None else self._tls.context()

    def refusal_of(self, hello: StreamHello, peer: str | None) -> str:
        """See `receiver.Host`."""
        if peer is not None and peer != self._configure.peer:
            return f"node {peer} dialled in a migration with node {self._configure.peer}"
        return frames.refusal_of(hello, self._configure.migration_id, self._configure.secret)

    def admit(self, connection: Connection) -> None:
        """See `receiver.Host`."""
        with self._admitting:
            if not connection.alive:
                raise ConnectionEndedError("it was given up before it was let in")
            earlier = self._streams.get(connection.index)
            if earlier is not None:
                earlier.revoke()
                if not earlier.join(_REPLACE_S):
                    raise EngineError(f"stream {connection.index} doesn't end")
            self._streams[connection.index] = connection
        self._health.restored(connection.index)

    def ended(self, connection: Connection, reason: str) -> None:
        """See `receiver.Host`."""
        if self._closing or self._armed:
            return
        if reason and self._streams.get(connection.index) is connection:
            with contextlib.suppress(Exception):
                self._health.broke(connection.index, reason)

    def device_stream(self, sock: StreamSocket) -> None:
        """See `receiver.Host`."""
        self._relay.offer_peer(sock)

    def post_copy_stream(self, kind: StreamKind, sock: StreamSocket) -> None:
        """See `receiver.Host`."""
        self._the_filler().offer(kind, sock)

    def missing(self, region: int, content: Ranges) -> None:
        """See `receiver.Host`."""
        self._the_filler().note(region, content)

    def arm(self) -> None:
        """See `receiver.Host`. The agent knows before the source does."""
        self._memory.prefaulter.close()
        self._the_filler().arm()
        self._armed = True
        self._control.send(PostCopyArmed())

    def fault(self, error: BaseException) -> None:
        """See `receiver.Host`."""
        self._faults.report(error)


def _listen(address: str) -> socket.socket:
    """A listener on a port that the kernel chooses. "": every address of this machine."""
    family, kind, protocol, _, name = socket.getaddrinfo(
        address or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.bind(name)
        sock.listen(frames.STREAMS_MAX)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock
