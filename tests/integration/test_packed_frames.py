"""What a destination accepts of compressed pages, and what it says that it can undo."""

from __future__ import annotations

import contextlib
import fcntl
import re
import socket

import lz4.block
import msgspec
import pytest
import zstandard

from migrator import ranges, wire
from migrator.engine import codecs, frames
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.control import HelperWaiter, Signal
from migrator.engine.frames import FrameKind
from migrator.engine.stream import Endpoint, PageStream
from migrator.errors import EngineError
from tests.integration.stream_ends import MIB, PAGE, SIZE, Ends, hello


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
    ends: Ends, kind: FrameKind, payload: bytes, announced: int, word: str
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
def test_a_destination_that_cant_write_its_memory_fails(ends: Ends, packed: bool) -> None:
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
        stream = PageStream(endpoint, hello(), TokenBucket(None, 0.0))

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


def test_a_welcome_names_the_codecs_and_an_older_source_doesnt_mind(ends: Ends) -> None:
    class OlderWelcome(msgspec.Struct, frozen=True, kw_only=True):
        refusal: str = ""

    with socket.create_connection(ends.listener.getsockname()) as sock:
        ends.accept()
        sock.sendall(wire.encode_frame(wire.FrameKind.HELLO, hello()))
        sock.settimeout(30.0)
        (frame,) = wire.FrameDecoder().feed(sock.recv(4096))
        assert frame.decode(msgspec.msgpack.Decoder(OlderWelcome)).refusal == ""
        welcome = frame.decode(msgspec.msgpack.Decoder(frames.StreamWelcome))
        assert welcome.codecs == codecs.FAMILIES
        sock.sendall(frames.encode(FrameKind.BYE))
        assert ends.connections[0].join(30.0)
