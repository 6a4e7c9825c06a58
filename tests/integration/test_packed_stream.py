"""Compressed pages over a real connection: a delivery here, the destination's receiver there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence

import lz4.block
import msgspec
import numpy as np
import pytest
import zstandard

from migrator import ranges, wire
from migrator.engine import codecs, frames
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.codecs import LADDER, Codec
from migrator.engine.control import HelperWaiter, Signal
from migrator.engine.delivery import ChannelHealth, Delivery
from migrator.engine.frames import FrameKind, StreamHello, StreamKind
from migrator.engine.known import KnownPages
from migrator.engine.memory import MappedRegion
from migrator.engine.packing_policy import Order, PackingPolicy, Plan
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


def _names(tried: tuple[Codec, ...]) -> str:
    return tried[0].name if len(tried) == 1 else "all"


class _Always(PackingPolicy):
    """Packs, whatever this machine is busy with, which may make it slower than the link."""

    affordable = True

    def __init__(self, tried: tuple[Codec, ...] = LADDER) -> None:
        super().__init__(lambda: 8.0)
        self._tried = tried

    def plan(self, link_bytes_per_s: float | None, usable: Sequence[Codec]) -> Plan:
        tried = tuple(codec for codec in self._tried if codec in usable)
        return Plan(codec=tried[0], usable=tried, threads=2, hashing=True, cheap=True)

    def order(self, plan: Plan, guest_bytes: int) -> Order:
        return Order(plan.usable, compared=True)


class _FullLink(PageStream):
    """Has enough to do always: nothing goes plain because this machine is busy."""

    in_hand_s = 1.0


@pytest.mark.parametrize("cut_at", [0, 12])
@pytest.mark.parametrize("tried", [*((codec,) for codec in LADDER), LADDER], ids=_names)
def test_memory_arrives_compressed(ends: _Ends, tried: tuple[Codec, ...], cut_at: int) -> None:
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
    stream = _FullLink(endpoint, _hello(), bucket)
    stop = Signal()
    waiter = _Waiter(stop, ends, cut_at)
    stream.connect(waiter)
    delivery = Delivery(
        stream,
        [Piece(0, content)],
        [ends.source],
        bucket,
        _Always(tried),
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
        assert set(delivery.packed_bytes) <= {codec.name for codec in tried}
        assert delivery.packed_bytes.total() > 6 * MIB


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
    known, policy = KnownPages([ends.source]), _Always()

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


def _zstd(content: bytes, *, sized: bool = True) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_content_size=sized).compress(content)


_LZ4_PAGE = lz4.block.compress(bytes(PAGE), store_size=False)
_TEXT = bytes(range(256)) * (2 * PAGE // 256)


@pytest.mark.parametrize(
    ("kind", "payload", "announced", "word"),
    [
        (FrameKind.PACKED, b"\xff" * 100, 2 * PAGE, "malformed"),
        (FrameKind.PACKED, _LZ4_PAGE, 2 * PAGE, "announced 8192"),
        (
            FrameKind.PACKED,
            lz4.block.compress(bytes(3 * PAGE), store_size=False),
            2 * PAGE,
            "malformed",
        ),
        (FrameKind.PACKED, bytes(2 * PAGE), 2 * PAGE, "can't stand for"),
        (FrameKind.PACKED, bytes(100), 2 * MIB, "can't stand for"),
        (FrameKind.PACKED, _zstd(bytes(2 * PAGE)), 2 * PAGE, "malformed"),
        (FrameKind.ZSTD, _LZ4_PAGE, PAGE, "malformed"),
        (FrameKind.ZSTD, b"\xff" * 100, 2 * PAGE, "malformed"),
        (FrameKind.ZSTD, b"", 2 * PAGE, "payload"),
        (FrameKind.ZSTD, _zstd(bytes(PAGE)), 2 * PAGE, "announced 8192"),
        (FrameKind.ZSTD, _zstd(bytes(3 * PAGE)), 2 * PAGE, "announced 8192"),
        (FrameKind.ZSTD, _zstd(bytes(2**30)), 2 * PAGE, "can't stand for"),
        (FrameKind.ZSTD, _zstd(bytes(2**24)), 2 * PAGE, "announced 8192"),
        (FrameKind.ZSTD, _zstd(_TEXT, sized=False), 2 * PAGE, "announced 8192"),
        (FrameKind.ZSTD, _zstd(_TEXT)[:-3], 2 * PAGE, "malformed|announced"),
        (FrameKind.ZSTD, _zstd(_TEXT) + b"\0", 2 * PAGE, "malformed"),
        (FrameKind.ZSTD, _zstd(_TEXT) + _zstd(_TEXT), 2 * PAGE, "malformed"),
        (FrameKind.ZSTD, bytes(2 * PAGE), 2 * PAGE, "can't stand for"),
        (FrameKind.ZSTD, bytes(100), 2 * MIB, "can't stand for"),
        # Skippable: a frame of nothing.
        (
            FrameKind.ZSTD,
            b"\x50\x2a\x4d\x18\0\x20\0\0" + bytes(90),
            2 * PAGE,
            "malformed|announced",
        ),
    ],
)
def test_malformed_packed_pages_are_refused(
    ends: _Ends, kind: FrameKind, payload: bytes, announced: int, word: str
) -> None:
    ends.arrived[:] = b"\x55" * SIZE
    with ends.connect() as sock:
        head = frames.encode(
            kind,
            sequence=1,
            content=ranges.from_pairs([(0, announced)]),
            packed_bytes=len(payload),
        )
        sock.sendall(head + payload)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(100) == b""
    assert ends.connections[0].join(30.0)
    assert re.search(word, ends.host.reasons[0])
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


@pytest.mark.parametrize(
    ("told", "families"),
    [
        ({"refusal": ""}, {codecs.LZ4}),  # Older than Zstandard.
        ({"refusal": "", "codecs": ["zstd", "brotli"]}, {codecs.ZSTD}),
        ({"refusal": "", "codecs": []}, set()),
    ],
)
def test_a_destination_gets_only_what_it_says_that_it_knows(
    told: dict[str, object], families: set[str]
) -> None:
    """Two versions at once: what a welcome doesn't name isn't sent, and unknown names are none."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.closing(Signal()) as stop:
        endpoint = Endpoint(host="127.0.0.1", port=listener.getsockname()[1])
        stream = PageStream(endpoint, _hello(), TokenBucket(None, 0.0))

        class _Answering(HelperWaiter):
            def wait(self, source: object, events: int, timeout_s: float) -> bool:
                with contextlib.suppress(BlockingIOError):
                    listener.settimeout(0)
                    accepted.append(listener.accept()[0])
                    accepted[0].sendall(wire.encode_frame(wire.FrameKind.HELLO, told))
                return super().wait(source, events, timeout_s)  # type: ignore[arg-type]

        accepted: list[socket.socket] = []
        stream.connect(_Answering(stop))
        assert {codec.family for codec in stream.codecs} == families
        stream.close()
        for sock in accepted:
            sock.close()


def test_a_welcome_names_the_codecs_and_an_older_source_doesnt_mind(ends: _Ends) -> None:
    class OlderWelcome(msgspec.Struct, frozen=True, kw_only=True):
        refusal: str = ""

    with socket.create_connection(ends.listener.getsockname()) as sock:
        ends.accept()
        sock.sendall(wire.encode_frame(wire.FrameKind.HELLO, _hello()))
        sock.settimeout(30.0)
        (frame,) = wire.FrameDecoder().feed(sock.recv(4096))
        assert frame.decode(msgspec.msgpack.Decoder(OlderWelcome)).refusal == ""
        welcome = frame.decode(msgspec.msgpack.Decoder(frames.StreamWelcome))
        assert welcome.codecs == codecs.FAMILIES
        sock.sendall(frames.encode(FrameKind.BYE))
        assert ends.connections[0].join(30.0)
