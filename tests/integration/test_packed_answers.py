"""Post-copy's pages, packed: a server here, the filler of a real address space there."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from migrator import ranges
from migrator.engine import filler, frames, receiver
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.channel import ChannelHealth
from migrator.engine.codecs import LADDER, Codec
from migrator.engine.filler import Filler
from migrator.engine.frames import StreamKind, StreamWelcome
from migrator.engine.memory import MappedRegion
from migrator.engine.page_server import PageServer
from migrator.engine.receiver import Connection, Memory
from migrator.engine.stream import Endpoint
from migrator.engine.transport import StreamSocket
from tests.integration.engine_lab.lab import MIB, PAGE, Guest
from tests.integration.stream_ends import AlwaysPacks, Host, hello

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfd needs root")

SIZE = 24 * MIB
CAP_BYTES_PER_S = 32 * MIB
END_S = 60.0


class _Destination(Host):
    """Hands post-copy streams to the filler."""

    def __init__(self, filler: Filler) -> None:
        super().__init__()
        self._filler = filler

    def post_copy_stream(self, kind: StreamKind, sock: StreamSocket) -> None:
        self._filler.offer(kind, sock)


class _World:
    """A source's guest that stands still, a destination's that lacks each page, and both ends."""

    def __init__(self, binary: Path, codec: Codec, stack: contextlib.ExitStack) -> None:
        self.faults: list[BaseException] = []
        self.source, self.destination = Guest(binary, SIZE), Guest(binary, SIZE)
        for guest in (self.source, self.destination):
            stack.callback(guest.close)
        there = [self._region(self.destination)]
        self.done = threading.Event()
        self.filler = Filler(
            self.destination.uffd,
            there,
            silence_s=END_S,
            on_done=self.done.set,
            fault=self.faults.append,
        )
        stack.callback(self.filler.close)
        memory = Memory(there)
        stack.callback(memory.prefaulter.close)
        host = _Destination(self.filler)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(END_S)

        def accept() -> None:
            for _ in (StreamKind.FAULTS, StreamKind.BULK):
                Connection(listener.accept()[0], memory, host, END_S).start()

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        stack.callback(accepting.join, END_S)
        self.server = PageServer(
            Endpoint(host="127.0.0.1", port=listener.getsockname()[1]),
            lambda kind: msgspec.structs.replace(hello(), kind=kind),
            [self._region(self.source)],
            TokenBucket(CAP_BYTES_PER_S, time.monotonic()),
            ChannelHealth(lambda message: None),
            AlwaysPacks((codec,)),
            reconnect_s=END_S,
            fault=self.faults.append,
        )
        stack.callback(self.server.close)

    @staticmethod
    def _region(guest: Guest) -> MappedRegion:
        return MappedRegion(0, guest.fd, guest.layout)


@pytest.fixture(params=LADDER, ids=[codec.name for codec in LADDER])
def world(
    request: pytest.FixtureRequest, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[_World]:
    monkeypatch.setattr(filler, "_HANDOFF_S", END_S)  # What nobody waits for isn't pulled unasked.
    with contextlib.ExitStack() as stack:
        yield _World(binary, request.param, stack)


def fill_in(world: _World) -> float:
    """All pages, some of which the guest waits for; how many bytes one on the link stood for."""
    world.source.tell(f"fill 0 {16 * MIB}")  # A few words a page.
    os.pwrite(world.source.fd, os.urandom(4 * MIB), 16 * MIB)
    world.source.tell(f"zero {20 * MIB} {22 * MIB}")
    world.filler.note(0, ranges.from_pairs([(0, 22 * MIB)]))
    world.filler.arm()
    world.server.start()
    world.destination.tell(f"time {8 * MIB} {9 * MIB}")  # Each word waits for its page.
    world.filler.pull_all()
    world.destination.tell(f"time {18 * MIB} {19 * MIB}")  # These may be there by then.
    assert world.done.wait(END_S)
    report = world.filler.finish()
    assert not world.faults
    assert report.faults >= MIB // PAGE
    assert report.pages >= 22 * MIB // PAGE
    world.source.tell(f"time {8 * MIB} {9 * MIB}")  # The same change here.
    world.source.tell(f"time {18 * MIB} {19 * MIB}")
    assert world.source.digest() == world.destination.digest()
    return report.packed_ratio


def test_pages_arrive_packed_and_whole(world: _World) -> None:
    assert fill_in(world) > 3.0
    assert world.server.bytes_sent < 8 * MIB


def test_an_older_destination_is_sent_plain_pages(
    world: _World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(refusal: str, codecs: tuple[str, ...], pull_codecs: tuple[str, ...]) -> StreamWelcome:
        return StreamWelcome(refusal=refusal, codecs=codecs)

    monkeypatch.setattr(receiver, "StreamWelcome", older)
    assert fill_in(world) == 1.0
    assert world.server.bytes_sent > 20 * MIB


def test_a_welcome_says_what_may_be_answered() -> None:
    told = msgspec.msgpack.decode(
        msgspec.msgpack.encode({"refusal": "", "codecs": ["lz4", "zstd"]}), type=StreamWelcome
    )
    assert told.pull_codecs == ()
    assert frames.STREAM_VERSION == 1  # What older releases speak.
