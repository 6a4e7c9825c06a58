"""What can make pages small, and how it is undone: LZ4, and Zstandard at a few levels.

    fast ◄─────────────────────────────────────────────► small
    lz4          zstd-fast-3          zstd-1          zstd-3

A frame's kind says what its payload is (`frames`): PACKED is one LZ4 block without its size, ZSTD
one Zstandard frame that tells its content's size. The level is nobody's business but the source's.
The destination says in its welcome which families it can undo; one that says nothing is older than
Zstandard, and gets LZ4.

Every call here works without Python's lock while it compresses or decompresses.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import lz4.block
import zstandard

from migrator.engine import frames
from migrator.engine.frames import FrameKind
from migrator.errors import RemoteProtocolError


@dataclass(frozen=True, slots=True)
class Codec:
    """One way to compress a frame. What is assumed holds until it was measured."""

    name: str
    """As users read it."""
    family: str
    """As the two sides agree on it."""
    level: int
    kind: FrameKind
    speed_assumed: float
    """Bytes a second of one core."""
    share_assumed: float
    """What is left of a byte that can be made smaller at all."""


LZ4: Final = "lz4"
ZSTD: Final = "zstd"

LADDER: Final = (
    Codec("lz4", LZ4, 0, FrameKind.PACKED, 0.6e9, 0.48),
    Codec("zstd-fast-3", ZSTD, -3, FrameKind.ZSTD, 0.5e9, 0.45),
    Codec("zstd-1", ZSTD, 1, FrameKind.ZSTD, 0.35e9, 0.37),
    Codec("zstd-3", ZSTD, 3, FrameKind.ZSTD, 0.25e9, 0.35),
)
"""Cheapest first. The figures are of a Linux guest's memory (docs/measurements.md): speeds are
between a fast hour of its machine's and a slow one. Higher levels take many times as long and save
a hundredth more of it."""
_NAMED: Final = {codec.name: codec for codec in LADDER}

FAMILIES: Final = (LZ4, ZSTD)
"""What this side can do, and undo."""


class _Contexts(threading.local):
    """Each thread's own: one isn't for two at once, and costs a MiB to make."""

    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        window = frames.PACKED_BYTES_MAX
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=window)


_contexts: Final = _Contexts()


def usable(families: Collection[str]) -> tuple[Codec, ...]:
    """Of the ladder, what this side can do and the other can undo."""
    return tuple(codec for codec in LADDER if codec.family in families)


def named(name: str) -> Codec:
    """The codec of the ladder that is called so. KeyError."""
    return _NAMED[name]


def compress(codec: Codec, content: memoryview) -> bytes:
    """`content` must not change meanwhile: see `packing`."""
    if codec.family == LZ4:
        smaller: bytes = lz4.block.compress(content, store_size=False)
        return smaller
    compressor = _contexts.compressors.get(codec.level)
    if compressor is None:
        compressor = zstandard.ZstdCompressor(
            level=codec.level, write_checksum=False, write_content_size=True
        )
        _contexts.compressors[codec.level] = compressor
    return compressor.compress(content)


def decompress(kind: FrameKind, payload: memoryview, size: int) -> memoryview:
    """The `size` bytes that the payload stands for; never more memory than that is taken for it.

    RemoteProtocolError: it isn't what was announced.
    """
    content = _unzstd(payload, size) if kind is FrameKind.ZSTD else _unlz4(payload, size)
    if len(content) != size:
        raise RemoteProtocolError(f"packed pages are {len(content)} bytes, announced {size}")
    return memoryview(content)


def _unlz4(payload: memoryview, size: int) -> bytes:
    try:
        content: bytes = lz4.block.decompress(payload, uncompressed_size=size)
    except lz4.block.LZ4BlockError as error:
        raise RemoteProtocolError(f"packed pages are malformed: {error}") from error
    return content


def _unzstd(payload: memoryview, size: int) -> bytes:
    try:
        # The library takes as much memory as a frame says that it holds, whatever it is allowed.
        told = zstandard.get_frame_parameters(payload).content_size
        if told != size:
            raise RemoteProtocolError(f"packed pages are {told} bytes, announced {size}")
        return _contexts.decompressor.decompress(
            payload, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise RemoteProtocolError(f"packed pages are malformed: {error}") from error
