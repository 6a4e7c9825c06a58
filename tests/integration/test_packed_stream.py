"""Compressed pages over a real connection: a delivery here, the destination's receiver there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator

import lz4.block
import numpy as np
import pytest

from migrator import ranges, wire
from migrator.engine import frames
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.control import HelperWaiter, Signal
from migrator.engine.delivery import ChannelHealth, Delivery
from migrator.engine.frames import FrameKind, StreamHello, StreamKind
from migrator.engine.known import KnownPages
from migrator.engine.memory import MappedRegion
from migrator.engine.packing import PackingPolicy
from migrator.engine.receiver import Connection, Memory
from migrator.engine.stream import Endpoint, PageStream, Piece
from migrator.engine.transport import StreamSocket
from migrator.engine_messages import RegionLayout
from migrator.errors import EngineError
from migrator.ranges import Ranges

PAGE = 4096
MIB = 1024**2
SIZE = 32 * MIB
SECRET = b"s" * 32


class _Host:
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


def _region(name: str) -> MappedRegion:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    return MappedRegion(0, fd, RegionLayout(name=name, size_bytes=SIZE, page_size_bytes=PAGE))


class _Ends:
    """Both ends of a page stream."""

    def __init__(self) -> None:
        self.source = _region("source")
        self.memory = Memory([_region("destination")])
        self.host = _Host()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.connections: list[Connection] = []

    def connect(self) -> socket.socket:
        """A raw connection that was let in."""
        sock = socket.create_connection(self.listener.getsockname())
        self.accept()
        hello = wire.encode_frame(wire.FrameKind.HELLO, _hello())
        sock.sendall(hello)
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


@pytest.fixture
def ends() -> Iterator[_Ends]:
    made = _Ends()
    yield made
    made.close()
    assert not made.host.faults


def _hello() -> StreamHello:
    return StreamHello(
        version=frames.STREAM_VERSION, migration_id="m", secret=SECRET, kind=StreamKind.PAGES
    )


class _Waiter(HelperWaiter):
    """Accepts whenever the stream connects; cuts the connection once, at the nth frame."""

    def __init__(self, stop: Signal, ends: _Ends, cut_at: int) -> None:
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


class _Always(PackingPolicy):
    """Packs, whatever this machine is busy with, which may make it slower than the link."""

    def pays(self, link_bytes_per_s: float | None) -> bool:
        super().pays(link_bytes_per_s)
        return True

    def should_compress(self) -> bool:
        return True


@pytest.mark.parametrize("cut_at", [0, 12])
def test_memory_arrives_compressed(ends: _Ends, cut_at: int) -> None:
    view = ends.source.view
    text = b"a guest's memory repeats itself, more or less: %6d\n"
    for at in range(0, 8 * MIB, 52):
        view[at : at + 52] = (text % (at % 999_983))[:52].ljust(52)
    view[8 * MIB : 10 * MIB] = os.urandom(2 * MIB)
    scattered = np.arange(16 * MIB, 20 * MIB, 3 * PAGE)
    for start in scattered.tolist():
        view[start : start + 64] = b"x" * 64
    content = ranges.union(
        ranges.from_pairs([(0, 12 * MIB)]),  # Of which the last 2 MiB are zeros.
        ranges.from_page_starts(scattered, PAGE),
    )
    ends.arrived[:] = b"\xff" * SIZE
    bucket = TokenBucket(24 * MIB, time.monotonic())
    endpoint = Endpoint(host="127.0.0.1", port=ends.listener.getsockname()[1])
    stream = PageStream(endpoint, _hello(), bucket)
    stop = Signal()
    waiter = _Waiter(stop, ends, cut_at)
    stream.connect(waiter)
    delivery = Delivery(
        stream,
        [Piece(0, content)],
        [ends.source],
        bucket,
        _Always(lambda: 8.0),
        skip_zeroes=False,
    )
    try:
        delivery.run(ChannelHealth(lambda message: None), 30.0, waiter)
    finally:
        stream.bye()
        stream.close()
        stop.close()
    assert delivery.empty
    assert delivery.left_bytes == 0
    for start, end in content.tolist():
        assert ends.arrived[start:end] == view[start:end]
    assert ends.arrived[12 * MIB : 16 * MIB] == b"\xff" * (4 * MIB)  # Not asked for.
    assert delivery.zero_pages >= 2 * MIB // PAGE
    if not cut_at:
        assert delivery.zero_pages == 2 * MIB // PAGE
        assert delivery.payload_bytes == ranges.byte_count(content) - 2 * MIB
        assert stream.bytes_sent < 0.6 * delivery.payload_bytes


@pytest.mark.parametrize("cut_at", [0, 3])
def test_pages_that_are_as_they_were_sent_stay_here(ends: _Ends, cut_at: int) -> None:
    """Also where the connection breaks in between: what may not have arrived is sent again."""
    noise = os.urandom(8 * MIB)
    ends.source.view[: 8 * MIB] = noise
    content = ranges.from_pairs([(0, 8 * MIB)])
    bucket = TokenBucket(24 * MIB, time.monotonic())
    endpoint = Endpoint(host="127.0.0.1", port=ends.listener.getsockname()[1])
    stream = PageStream(endpoint, _hello(), bucket)
    stop = Signal()
    waiter = _Waiter(stop, ends, 0)
    stream.connect(waiter)
    known, policy = KnownPages([ends.source]), _Always(lambda: 8.0)

    def deliver() -> Delivery:
        made = Delivery(
            stream,
            [Piece(0, content)],
            [ends.source],
            bucket,
            policy,
            skip_zeroes=False,
            known=known,
        )
        made.run(ChannelHealth(lambda message: None), 30.0, waiter)
        return made

    try:
        first = deliver()
        assert first.same_pages == 0
        changed = [5, 700, 1999]
        for page in changed:
            ends.source.view[page * PAGE] ^= 1
        if cut_at:
            waiter.cut_in(cut_at)
        before = stream.bytes_sent
        second = deliver()
        # A page that is sent plain isn't looked at.
        assert second.same_pages + second.pages >= 8 * MIB // PAGE
        if not cut_at:
            assert second.same_pages > 1024
            assert stream.bytes_sent - before < 4 * MIB
        assert ends.arrived[: 8 * MIB] == ends.source.view[: 8 * MIB]
        assert bytes(ends.arrived[: 8 * MIB]) != noise
    finally:
        stream.bye()
        stream.close()
        stop.close()


@pytest.mark.parametrize(
    ("payload", "announced", "word"),
    [
        (b"\xff" * 100, 2 * PAGE, "malformed"),
        (lz4.block.compress(bytes(PAGE), store_size=False), 2 * PAGE, "announced 8192"),
        (lz4.block.compress(bytes(3 * PAGE), store_size=False), 2 * PAGE, "malformed"),
        (bytes(2 * PAGE), 2 * PAGE, "can't stand for"),
        (bytes(100), 2 * MIB, "can't stand for"),
    ],
)
def test_malformed_packed_pages_are_refused(
    ends: _Ends, payload: bytes, announced: int, word: str
) -> None:
    ends.arrived[:] = b"\x55" * SIZE
    with ends.connect() as sock:
        head = frames.encode(
            FrameKind.PACKED,
            sequence=1,
            content=ranges.from_pairs([(0, announced)]),
            packed_bytes=len(payload),
        )
        sock.sendall(head + payload)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(100) == b""
    assert ends.connections[0].join(30.0)
    assert word in ends.host.reasons[0]
    assert ends.arrived == b"\x55" * SIZE


@pytest.mark.parametrize("packed", [False, True])
def test_a_destination_that_cant_write_its_memory_fails(ends: _Ends, packed: bool) -> None:
    """It is no broken link, after which the source would try again."""
    f_add_seals, f_seal_future_write = 1033, 0x10  # linux/fcntl.h
    fcntl.fcntl(ends.memory.regions[0].fd, f_add_seals, f_seal_future_write)
    payload = lz4.block.compress(bytes(PAGE), store_size=False) if packed else bytes(PAGE)
    with ends.connect() as sock:
        head = frames.encode(
            FrameKind.PACKED if packed else FrameKind.PAGES,
            sequence=1,
            content=ranges.from_pairs([(0, PAGE)]),
            packed_bytes=len(payload),
        )
        sock.sendall(head + payload)
        assert sock.recv(100) == b""
    assert ends.connections[0].join(30.0)
    (fault,) = ends.host.faults
    ends.host.faults.clear()
    assert isinstance(fault, EngineError)
    assert "can't be written" in str(fault)
