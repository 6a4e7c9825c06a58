"""What travels on a page stream, as bytes. Pure.

    source                                                    destination
      │  hello (migrator.wire): version, migration, secret, kind, index ─►│ checks
      │◄────────────────────────── welcome: accepted, or why not; codecs │
      │  EXPECT  ranges ─────────────────────────────────────────────────►│ prefaults huge pages
      │  PAGES   ranges, payload ────────────────────────────────────────►│ into guest memory
      │  PACKED  ranges, payload (LZ4 block) ────────────────────────────►│ unpacked, then likewise
      │  ZSTD    ranges, payload (Zstandard frame) ──────────────────────►│ likewise
      │  ZERO    ranges ─────────────────────────────────────────────────►│ punches out
      │  BARRIER ────────────────────────────────────────────────────────►│
      │◄────────────────────────────────── ACK (sequence: all up to it are in place)
      │  MISSING ranges ─────────────────────────────────────────────────►│ punches out, notes
      │  ARM ────────────────────────────────────────────────────────────►│ from now on faults
      │  BYE ────────────────────────────────────────────────────────────►│ an end in order

On the two post-copy streams (FAULTS and BULK), which the source opens, the destination asks:

      │◄───────────────────────────────── PULL ranges (sequence: pages that are missing still) │
      │  PAGES, PACKED, ZSTD, ZERO: each page that was asked for, once ──►│ fills holes
      │◄──────────────────────────────────────────────────────────── LIST │ after a restart
      │  EXTENTS ranges ... BARRIER: what isn't a hole ──────────────────►│
      │◄───────────────────────────────────────────────────────────── BYE │ nothing is missing

    byte   0       2         3      4         6        8       12         16          24         32
           ┌───────┬─────────┬──────┬─────────┬────────┬───────┬──────────┬───────────┬──────────┐
           │ "FP"  │ version │ kind │ region  │ 0      │ count │ 0        │ sequence  │ payload  │
           └───────┴─────────┴──────┴─────────┴────────┴───────┴──────────┴───────────┴──────────┘
           little endian; then `count` ranges of 16 bytes (start, end: offsets in the region), then
           `payload` bytes: the ranges' content, joined. Of PACKED: as one LZ4 block without its
           size, which is that of the ranges, at most PACKED_BYTES_MAX, and more than the payload.
           Of ZSTD: likewise as one Zstandard frame, which tells the same size.

A source sends ZSTD, and packed answers, only where the welcome says so: one that doesn't know them
says nothing. PAGES, PACKED, ZSTD, ZERO, MISSING, ARM and BARRIER count up the sequence by one each,
from 1 on every new connection, and are acknowledged. Kind 0 is invalid. Whatever is not as
described is refused with RemoteProtocolError before a byte of guest memory is touched.
"""

from __future__ import annotations

import enum
import hmac
import struct
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from migrator import ranges
from migrator.errors import LocalProtocolError, RemoteProtocolError
from migrator.ranges import Ranges

STREAM_VERSION: Final = 1
FRAME_RANGES_MAX: Final = 1000
"""Fits one vectored call: IOV_MAX is 1024 on Linux, and the header takes one."""
FRAME_BYTES_MAX: Final = 4 * 1024 * 1024
"""What is sent again after a broken stream is a few of these. Bigger ones were not faster."""
PAYLOAD_BYTES_CAP: Final = 1024**3
"""A frame holds one page at least, and pages may be 1 GiB."""
PACKED_BYTES_MAX: Final = 1024 * 1024
"""Of guest memory in a PACKED frame: what the destination keeps a buffer for."""
STREAMS_MAX: Final = 64

_MAGIC: Final = b"FP"
_HEADER: Final = struct.Struct("<2sBBHHIIQQ")
HEADER_BYTES: Final = _HEADER.size
RANGE_BYTES: Final = 16


class StreamKind(enum.IntEnum):
    INVALID = 0
    PAGES = 1
    DEVICE = 2
    FAULTS = 3
    """Post-copy: pages that somebody waits for."""
    BULK = 4
    """Post-copy: all the others."""


class StreamHello(msgspec.Struct, frozen=True, kw_only=True):
    """The first words on a connection, in a HELLO frame of `migrator.wire`."""

    version: int
    migration_id: str
    secret: bytes
    kind: StreamKind
    index: int = 0
    """Of a PAGES stream: 0 .. streams - 1."""
    streams: int = 1


class StreamWelcome(msgspec.Struct, frozen=True, kw_only=True):
    """The destination's answer. `refusal` says why; "" accepts."""

    refusal: str = ""
    codecs: tuple[str, ...] = ("lz4",)
    """What this side can undo (`engine.codecs`). A destination that says nothing knows LZ4."""
    pull_codecs: tuple[str, ...] = ()
    """Likewise on FAULTS and BULK. One that says nothing takes PAGES and ZERO alone there."""


def refusal_of(hello: StreamHello, migration_id: str, secret: bytes) -> str:
    """Why a hello isn't let in; "" if it is. Says nothing about what would have been right.

    The secret is compared first and in constant time: a stranger learns nothing else.
    """
    if len(secret) < 16 or not hmac.compare_digest(hello.secret, secret):
        return "the secret is wrong"
    if hello.version != STREAM_VERSION:
        return f"stream version {hello.version} is unknown; this side speaks {STREAM_VERSION}"
    if hello.migration_id != migration_id:
        return "this engine serves another migration"
    if hello.kind is StreamKind.INVALID:
        return "the stream's kind is invalid"
    if not 1 <= hello.streams <= STREAMS_MAX or not 0 <= hello.index < hello.streams:
        return f"stream {hello.index} of {hello.streams} is out of range"
    return ""


class FrameKind(enum.IntEnum):
    INVALID = 0
    EXPECT = 1
    PAGES = 2
    ZERO = 3
    BARRIER = 4
    ACK = 5
    BYE = 6
    MISSING = 7
    ARM = 8
    PULL = 9
    LIST = 10
    EXTENTS = 11
    PACKED = 12
    """PAGES, compressed by LZ4."""
    ZSTD = 13
    """PAGES, compressed by Zstandard."""


COMPRESSED: Final = frozenset({FrameKind.PACKED, FrameKind.ZSTD})
_WITH_PAYLOAD: Final = COMPRESSED | {FrameKind.PAGES}
_WITH_RANGES: Final = _WITH_PAYLOAD | {
    FrameKind.EXPECT,
    FrameKind.ZERO,
    FrameKind.MISSING,
    FrameKind.PULL,
    FrameKind.EXTENTS,
}
SEQUENCED: Final = _WITH_PAYLOAD | {
    FrameKind.ZERO,
    FrameKind.BARRIER,
    FrameKind.MISSING,
    FrameKind.ARM,
}
_KNOWN: Final = frozenset(FrameKind) - {FrameKind.INVALID}


class Header(msgspec.Struct, frozen=True):
    kind: FrameKind
    region: int
    count: int
    sequence: int
    payload_bytes: int


def encode(
    kind: FrameKind,
    *,
    sequence: int = 0,
    region: int = 0,
    content: Ranges | None = None,
    packed_bytes: int = 0,
) -> bytes:
    """Header and ranges; the payload of PAGES, PACKED and ZSTD follows it on the stream.

    `packed_bytes`: how long that of PACKED and ZSTD is.
    """
    count = 0 if content is None else len(content)
    if count > FRAME_RANGES_MAX:
        raise LocalProtocolError(f"{count} ranges don't fit a frame of {FRAME_RANGES_MAX}")
    payload = packed_bytes
    if content is not None and kind is FrameKind.PAGES:
        payload = ranges.byte_count(content)
    header = _HEADER.pack(_MAGIC, STREAM_VERSION, kind, region, 0, count, 0, sequence, payload)
    return header if content is None else header + content.astype("<i8").tobytes()


def parse_header(data: bytes | bytearray | memoryview) -> Header:
    """RemoteProtocolError says what is wrong with it."""
    magic, version, number, region, zero, count, zeros, sequence, payload = _HEADER.unpack(data)
    if magic != _MAGIC or zero or zeros:
        raise RemoteProtocolError(f"not a page frame: {bytes(data[:16]).hex()}")
    if version != STREAM_VERSION:
        raise RemoteProtocolError(f"page frame version {version} is unknown")
    if number not in _KNOWN:
        raise RemoteProtocolError(f"page frame kind {number} is unknown")
    kind = FrameKind(number)
    if count > FRAME_RANGES_MAX or (count > 0) != (kind in _WITH_RANGES):
        raise RemoteProtocolError(f"a {kind.name} frame can't have {count} ranges")
    if payload > PAYLOAD_BYTES_CAP or (payload > 0) != (kind in _WITH_PAYLOAD):
        raise RemoteProtocolError(f"a {kind.name} frame can't have {payload} bytes of payload")
    return Header(kind, region, count, sequence, payload)


class RegionShape(msgspec.Struct, frozen=True):
    size_bytes: int
    page_size_bytes: int


def parse_ranges(
    header: Header, data: bytes | bytearray | memoryview, regions: Sequence[RegionShape]
) -> Ranges:
    """The frame's ranges: ascending, disjoint, whole pages inside an existing region.

    RemoteProtocolError otherwise, and when they don't add up to the payload.
    """
    if header.region >= len(regions):
        raise RemoteProtocolError(f"there is no memory region {header.region}")
    shape = regions[header.region]
    found = np.frombuffer(data, dtype="<i8").reshape(-1, 2).astype(np.int64)
    if len(found) != header.count:
        raise RemoteProtocolError(f"{len(found)} ranges, announced were {header.count}")
    if len(found) == 1:
        # The page of a fault is told so: numpy's ways would take ten times as long.
        start, end = found[0].tolist()
        sound = 0 <= start < end <= shape.size_bytes
        whole = not (start % shape.page_size_bytes or end % shape.page_size_bytes)
    else:
        starts, ends = found[:, 0], found[:, 1]
        sound = bool(starts[0] >= 0 and ends[-1] <= shape.size_bytes and (starts < ends).all())
        if sound and (starts[1:] < ends[:-1]).any():
            raise RemoteProtocolError("ranges overlap or are out of order")
        whole = not (found % shape.page_size_bytes).any()
    if not sound:
        raise RemoteProtocolError("a range is empty or outside its memory region")
    if not whole:
        raise RemoteProtocolError("a range isn't made of whole pages")
    size_bytes = ranges.byte_count(found)
    if header.kind is FrameKind.PAGES and size_bytes != header.payload_bytes:
        raise RemoteProtocolError("the ranges don't add up to the payload")
    if header.kind in COMPRESSED and not header.payload_bytes < size_bytes <= PACKED_BYTES_MAX:
        raise RemoteProtocolError(
            f"{header.payload_bytes} packed bytes can't stand for {size_bytes}"
        )
    return found
