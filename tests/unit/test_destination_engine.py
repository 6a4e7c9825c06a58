"""A destination's engine in a thread of this process: its streams' comings and goings."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest

from migrator import ranges, wire
from migrator.engine import destination, frames
from migrator.engine.control import Control, StoppedError
from migrator.engine.destination import DestinationEngine
from migrator.engine.frames import FrameKind, StreamHello, StreamKind, StreamWelcome
from migrator.engine.memory import MappedRegion
from migrator.engine_messages import (
    ChannelBroken,
    Configure,
    FromEngine,
    RegionLayout,
    Stop,
)
from migrator.model import Role
from migrator.ranges import Ranges

PAGE = 4096
SIZE = 16 * PAGE
SECRET = b"s" * 32
LONG_S = 30.0
_heard: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


class _Filler:
    """Fills nothing, and notes what it is told."""

    def __init__(
        self,
        uffd: int,
        regions: list[MappedRegion],
        *,
        silence_s: float,
        on_done: Callable[[], None],
        fault: Callable[[BaseException], None],
    ) -> None:
        self.noted: list[Ranges] = []

    def note(self, region: int, content: Ranges) -> None:
        self.noted.append(content)

    def arm(self) -> None:
        return

    def close(self) -> None:
        return


class _Gate(threading.Event):
    """Whoever waits for the hypervisor says so, and goes on when the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.reached.set()
        return super().wait(LONG_S)


class _World:
    """An engine, and its agent's end of the socketpair."""

    def __init__(self) -> None:
        self.agent, theirs = socket.socketpair()
        self.agent.settimeout(LONG_S)
        self._frames = wire.FrameDecoder()
        self._news: list[FromEngine] = []
        self.control = Control(theirs)
        fd = os.memfd_create("guest")
        os.ftruncate(fd, SIZE)
        layout = RegionLayout(name="ram", size_bytes=SIZE, page_size_bytes=PAGE)
        configure = Configure(
            role=Role.DESTINATION,
            migration_id="m",
            secret=SECRET,
            pid=0,
            regions=(layout,),
            bind_address="127.0.0.1",
            reconnect_s=LONG_S,
        )
        self.fd = fd
        self.engine = DestinationEngine(configure, [fd], self.control)
        self.end: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self._streams: list[socket.socket] = []

    def _run(self) -> None:
        try:
            self.engine.run()
        except BaseException as error:
            self.end = error

    def connect(self, index: int = 0, streams: int = 1) -> socket.socket:
        """A page stream that has said hello."""
        sock = socket.create_connection(self.engine._listener.getsockname(), LONG_S)
        self._streams.append(sock)
        hello = StreamHello(
            version=frames.STREAM_VERSION,
            migration_id="m",
            secret=SECRET,
            kind=StreamKind.PAGES,
            index=index,
            streams=streams,
        )
        sock.sendall(wire.encode_frame(wire.FrameKind.HELLO, hello))
        return sock

    def hear(self, kind: type[FromEngine]) -> None:
        """Until the engine has said that."""
        while not any(isinstance(each, kind) for each in self._news):
            for frame in self._frames.feed(self.agent.recv(65536)):
                self._news.append(frame.decode(_heard))

    def close(self) -> None:
        if self.thread.is_alive():
            self.agent.sendall(wire.encode_frame(wire.FrameKind.ENGINE, Stop()))
        self.thread.join(LONG_S)
        self.engine.close()
        for sock in (*self._streams, self.agent):
            sock.close()
        self.control.close()
        os.close(self.fd)


def receive(sock: socket.socket, count: int) -> bytes:
    """So many bytes; fewer at the stream's end."""
    return sock.recv(count, socket.MSG_WAITALL)


def let_in(sock: socket.socket) -> None:
    """Read the welcome."""
    header = receive(sock, wire.HEADER_BYTES)
    assert header, "the stream was closed instead"
    kind, length = wire.parse_header(header)
    body = wire.Frame(kind, receive(sock, length))
    assert body.decode(msgspec.msgpack.Decoder(StreamWelcome)).refusal == ""


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    sock.close()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[_World]:
    monkeypatch.setattr(destination, "Filler", _Filler)
    monkeypatch.setattr(destination, "_REPLACE_S", 2.0)
    made = _World()
    yield made
    made.close()
    assert isinstance(made.end, StoppedError)


def test_a_stream_takes_the_place_of_one_that_is_after_the_filler(world: _World) -> None:
    """That one ends only when it has got it."""
    gate = world.engine._attached = _Gate()
    world.thread.start()
    first = world.connect()
    let_in(first)
    content = ranges.from_pairs([(0, PAGE)])
    first.sendall(frames.encode(FrameKind.MISSING, sequence=1, region=0, content=content))
    assert gate.reached.wait(LONG_S)
    second = world.connect()
    assert first.recv(1) == b"", "it is told to end"
    gate.set()
    let_in(second)
    assert isinstance(world.engine._filler, _Filler)
    assert len(world.engine._filler.noted) == 1


def test_page_streams_may_stay_away_once_pages_are_missing(world: _World) -> None:
    """All that they carry was told: the source closes them, and its goodbye may be lost."""
    world.engine._attached.set()
    world.thread.start()
    streams = [world.connect(index, streams=2) for index in range(2)]
    for sock in streams:
        let_in(sock)
    told, idle = streams
    reset(idle)
    world.hear(ChannelBroken)
    told.sendall(frames.encode(FrameKind.ARM, sequence=1))
    ack = frames.parse_header(receive(told, frames.HEADER_BYTES))
    assert (ack.kind, ack.sequence) == (FrameKind.ACK, 1)
    reset(told)
    world.engine._health._since -= 10 * LONG_S  # So long ago.
    world.thread.join(2.0)  # It looks each second.
    assert world.thread.is_alive(), world.end
