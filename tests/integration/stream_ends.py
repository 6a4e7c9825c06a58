"""Both ends of a page stream over a real connection, in this process."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Sequence

from migrator import wire
from migrator.engine import frames
from migrator.engine.codecs import LADDER, Codec
from migrator.engine.control import HelperWaiter, Signal
from migrator.engine.frames import StreamHello, StreamKind
from migrator.engine.memory import MappedRegion
from migrator.engine.packing_policy import PACK_BYTES_MIN, Order, PackingPolicy, Plan
from migrator.engine.receiver import Connection, Memory
from migrator.engine.transport import StreamSocket
from migrator.engine_messages import RegionLayout
from migrator.ranges import Ranges

PAGE = 4096
MIB = 1024**2
SIZE = 32 * MIB
SECRET = b"s" * 32


class Host:
    """Lets everyone in, and notes why streams ended."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.faults: list[BaseException] = []

    tls = None

    def refusal_of(self, hello: StreamHello, peer: str | None) -> str:
        return ""

    def admit(self, connection: Connection) -> None:
        return

    def ended(self, connection: Connection, reason: str) -> None:
        self.reasons.append(reason)

    def post_copy_stream(self, kind: StreamKind, sock: StreamSocket) -> None:
        raise AssertionError("no post-copy stream is opened")

    def missing(self, region: int, content: Ranges) -> None:
        raise AssertionError("no page is missing")

    def arm(self) -> None:
        raise AssertionError("no page is missing")

    def device_stream(self, sock: StreamSocket) -> None:
        raise AssertionError

    def fault(self, error: BaseException) -> None:
        self.faults.append(error)


def region_of(name: str) -> MappedRegion:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    return MappedRegion(0, fd, RegionLayout(name=name, size_bytes=SIZE, page_size_bytes=PAGE))


class Ends:
    """Both ends of a page stream."""

    def __init__(self) -> None:
        self.source = region_of("source")
        self.memory = Memory([region_of("destination")])
        self.host = Host()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.connections: list[Connection] = []

    def connect(self) -> socket.socket:
        """A raw connection that was let in."""
        sock = socket.create_connection(self.listener.getsockname())
        self.accept()
        sock.sendall(wire.encode_frame(wire.FrameKind.HELLO, hello()))
        sock.settimeout(30.0)
        assert sock.recv(4096)
        return sock

    def accept(self) -> None:
        sock, _ = self.listener.accept()
        connection = Connection(sock, self.memory, self.host, 30.0)
        self.connections.append(connection)
        connection.start()

    @property
    def arrived(self) -> memoryview:
        return self.memory.regions[0].view

    def close(self) -> None:
        for connection in self.connections:
            connection.revoke()
            assert connection.join(30.0)
        self.memory.prefaulter.close()
        self.listener.close()
        os.close(self.source.fd)
        os.close(self.memory.regions[0].fd)


def hello() -> StreamHello:
    return StreamHello(
        version=frames.STREAM_VERSION, migration_id="m", secret=SECRET, kind=StreamKind.PAGES
    )


class AcceptingWaiter(HelperWaiter):
    """Accepts whenever the stream connects; cuts the connection once, at the nth frame."""

    def __init__(self, stop: Signal, ends: Ends, cut_at: int) -> None:
        super().__init__(stop)
        self._ends = ends
        self._cut_in = cut_at

    def wait(self, source: object, events: int, timeout_s: float) -> bool:
        self._ends.listener.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            self._ends.accept()
        return super().wait(source, events, timeout_s)  # type: ignore[arg-type]

    def cut_in(self, frames: int) -> None:
        self._cut_in = frames

    def tick(self) -> None:
        self._cut_in -= 1
        if self._cut_in == 0:
            self._ends.connections[-1].revoke()


class AlwaysPacks(PackingPolicy):
    """Packs, whatever this machine is busy with, which may make it slower than the link."""

    affordable = True

    def __init__(self, tried: tuple[Codec, ...] = LADDER) -> None:
        super().__init__(lambda: 8.0)
        self._tried = tried
        self._turns = itertools.cycle(tried)

    def plan(self, link_bytes_per_s: float | None, usable: Sequence[Codec]) -> Plan | None:
        tried = tuple(codec for codec in self._tried if codec in usable)
        return Plan(tried[0], tried, 2, PACK_BYTES_MIN, hashing=True, cheap=True)

    def order(self, plan: Plan, guest_bytes: int, *, hashing: bool = False) -> Order:
        return Order(next(self._turns), compared=plan.usable)
