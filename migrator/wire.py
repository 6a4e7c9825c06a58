"""The frames that agents and engines exchange: versioned, capped, msgpack inside.

    byte   0      2        3       4              8
           ┌──────┬────────┬───────┬──────────────┬───────────────┐
           │ "FY" │ version│ kind  │ body length  │ msgpack body  │
           └──────┴────────┴───────┴──────────────┴───────────────┘
              2       1        1      4, big endian    0 .. cap

Pure: bytes in, frames out. Kind 0 is invalid, so that a zeroed buffer is never a frame. A frame
with a foreign magic, an unknown version or kind, or a length above its cap is refused with
RemoteProtocolError as soon as its header is complete: the body is never buffered.
"""

from __future__ import annotations

import enum
import struct
from typing import Any, Final, TypeVar

import msgspec

from migrator.errors import LocalProtocolError, RemoteProtocolError

MAGIC: Final = b"FY"
VERSION: Final = 1
_HEADER: Final = struct.Struct(">2sBBI")
HEADER_BYTES: Final = _HEADER.size

T = TypeVar("T")


class FrameKind(enum.IntEnum):
    INVALID = 0
    HELLO = 1
    REQUEST = 2
    RESPONSE = 3
    NOTICE = 4
    ENGINE = 5


BODY_CAP_BYTES: Final[dict[FrameKind, int]] = {
    FrameKind.HELLO: 4 * 1024,
    FrameKind.REQUEST: 1024 * 1024,
    FrameKind.RESPONSE: 16 * 1024 * 1024,
    FrameKind.NOTICE: 1024 * 1024,
    FrameKind.ENGINE: 1024 * 1024,
}


class Frame(msgspec.Struct, frozen=True):
    kind: FrameKind
    body: bytes

    def decode(self, decoder: msgspec.msgpack.Decoder[T]) -> T:
        """The typed message inside; RemoteProtocolError (naming the field) if it doesn't fit."""
        try:
            return decoder.decode(self.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RemoteProtocolError(
                f"malformed {self.kind.name.lower()} frame: {error}"
            ) from error


_encoder = msgspec.msgpack.Encoder()


def encode_frame(kind: FrameKind, message: Any) -> bytes:
    """One frame. LocalProtocolError if the body is above its kind's cap."""
    body = _encoder.encode(message)
    cap = BODY_CAP_BYTES.get(kind)
    if cap is None:
        raise LocalProtocolError(f"frame kind {kind!r} can't be sent")
    if len(body) > cap:
        raise LocalProtocolError(
            f"a {kind.name.lower()} frame of {len(body)} bytes is above the cap of {cap}"
        )
    return _HEADER.pack(MAGIC, VERSION, kind, len(body)) + body


class FrameDecoder:
    """Collects bytes and yields frames. After an error it stays broken: close the connection."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._error: RemoteProtocolError | None = None

    @property
    def buffered_bytes(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes, in order. RemoteProtocolError: see the module."""
        if self._error is not None:
            raise self._error
        self._buffer += data
        frames: list[Frame] = []
        try:
            while len(self._buffer) >= HEADER_BYTES:
                kind, length = parse_header(bytes(self._buffer[:HEADER_BYTES]))
                if len(self._buffer) < HEADER_BYTES + length:
                    break
                body = bytes(self._buffer[HEADER_BYTES : HEADER_BYTES + length])
                del self._buffer[: HEADER_BYTES + length]
                frames.append(Frame(kind, body))
        except RemoteProtocolError as error:
            self._error = error
            self._buffer.clear()
            if frames:  # Hand over what was complete before the bad frame; fail at the next call.
                return frames
            raise
        return frames


def parse_header(header: bytes) -> tuple[FrameKind, int]:
    """Kind and body length. RemoteProtocolError says what is wrong with the header."""
    magic, version, kind_number, length = _HEADER.unpack(header)
    if magic != MAGIC:
        raise RemoteProtocolError(f"not a Ferry frame: it begins with {magic.hex()}")
    if version != VERSION:
        raise RemoteProtocolError(
            f"frame version {version} is unknown; this side speaks version {VERSION}"
        )
    try:
        kind = FrameKind(kind_number)
        cap = BODY_CAP_BYTES[kind]
    except (ValueError, KeyError):
        raise RemoteProtocolError(f"frame kind {kind_number} is unknown") from None
    if length > cap:
        raise RemoteProtocolError(
            f"a {kind.name.lower()} frame of {length} bytes is above the cap of {cap}"
        )
    return kind, length
