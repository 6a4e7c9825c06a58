"""What travels in the frames of the agents' protocol, and how errors cross it.

    dialing agent                              listening agent
      │ HELLO {version, node, agent_version} ──────►│
      │◄────── HELLO {version, node, agent_version} ┤   or NOTICE ferry.refused, and the end
      │ REQUEST {id, method, params, timeout_s} ───►│
      │ REQUEST ... (any number in flight) ────────►│
      │◄──────────── RESPONSE {id, result or error} ┤   in any order
      │ NOTICE {method, params} ───────────────────►│   no answer
      │ NOTICE ferry.cancel {id} ──────────────────►│   the caller doesn't wait any more
      │ REQUEST {id 0, ferry.ping} ────────────────►│   every second
      │◄──────────────────────────── RESPONSE {0} ──┤

`params` and `result` are msgpack of the method's own types. A field that the receiver doesn't
know is ignored, also deep inside (`migrator.unknown_fields`); one that is missing and has no
default is malformed. What can't be said this way takes a new version (ARCHITECTURE.md: "Two
versions at once").
"""

from __future__ import annotations

import enum
from typing import Final, TypeVar

import msgspec

from migrator.errors import FerryError, InvalidRequest, RefusedError, RemoteProtocolError, from_code
from migrator.unknown_fields import decode
from migrator.wire import Frame

PROTOCOL_VERSION: Final = 1
PING: Final = "ferry.ping"
CANCEL: Final = "ferry.cancel"
REFUSED: Final = "ferry.refused"
PING_ID: Final = 0
DETAILS_LIMIT: Final = 64
NOTICE_TIMEOUT_S: Final = 30.0
"""How long the handler of a notice may take."""

T = TypeVar("T")


class Side(enum.Enum):
    """Which end of a connection this is."""

    INVALID = 0
    DIALING = 1
    LISTENING = 2


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    node: str
    agent_version: str


class Request(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    method: str
    params: bytes
    timeout_s: float
    """The listening side gives the handler up after it."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A FerryError on its way: its `code`, its sentence, and the parts that its type has."""

    code: str
    message: str
    details: tuple[str, ...] = ()
    fields: dict[str, str] = {}
    """Of a refusal, whose `details` are its reasons."""


class Response(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    result: bytes = b""
    error: Failure | None = None


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    method: str
    params: bytes


class CancelParams(msgspec.Struct, frozen=True, kw_only=True):
    id: int


class RefusedParams(msgspec.Struct, frozen=True, kw_only=True):
    """Why the connection is being closed."""

    reason: str


hello_decoder = msgspec.msgpack.Decoder(Hello)
request_decoder = msgspec.msgpack.Decoder(Request)
response_decoder = msgspec.msgpack.Decoder(Response)
notice_decoder = msgspec.msgpack.Decoder(Notice)
_encoder = msgspec.msgpack.Encoder()


MALFORMED: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding untrusted bytes may raise: msgspec doesn't wrap bad UTF-8 and deep nesting."""


def open_frame(frame: Frame, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """The message in a frame; RemoteProtocolError naming the field if it doesn't fit."""
    try:
        return frame.decode(decoder)
    except MALFORMED as error:
        raise RemoteProtocolError(f"malformed {frame.kind.name.lower()} frame: {error}") from error


def pack(value: object) -> bytes:
    """Params or a result as msgpack."""
    return _encoder.encode(value)


def unpack(data: bytes, kind: type[T], what: str) -> T:
    """The inverse of `pack`; RemoteProtocolError naming `what` and the field if it doesn't fit."""
    try:
        return decode(data, msgspec.msgpack.Decoder(kind))
    except MALFORMED as error:
        raise RemoteProtocolError(f"{what} is malformed: {error}") from error


def to_failure(error: FerryError) -> Failure:
    """What crosses the wire of an error."""
    details: tuple[str, ...] = ()
    fields: dict[str, str] = {}
    if isinstance(error, RefusedError):
        details, fields = error.reasons, error.fields
    elif isinstance(error, InvalidRequest):
        details = tuple(text for field in error.fields.items() for text in field)
    return Failure(
        code=error.code, message=str(error), details=details[:DETAILS_LIMIT], fields=fields
    )


def from_failure(failure: Failure) -> FerryError:
    """The error again, with its type (the nearest that this version knows)."""
    error = from_code(failure.code, failure.message, failure.details)
    if isinstance(error, RefusedError):
        error.fields = dict(failure.fields)
    elif isinstance(error, InvalidRequest):
        error.fields = dict(zip(failure.details[::2], failure.details[1::2], strict=False))
    return error
