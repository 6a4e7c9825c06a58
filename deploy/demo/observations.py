"""What the demo's client sees, as it says it: one JSON object a line. Pure.

Times named `*_at_s` are seconds of the host's wall clock, as in `migrator.model`, so that they can
be laid beside a migration's timeline. All namespaces of a lab share that clock.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from deploy.guest.protocol import GuestStatus

SAMPLE_S: Final = 0.05
"""Width of a sample."""


class _Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    pass


class Sample(_Line, frozen=True, kw_only=True, tag="sample"):
    """What arrived within `SAMPLE_S` from `at_s` on."""

    at_s: float
    stream_bytes: int = 0
    """Of the long download."""
    packets: int = 0
    longest_gap_ms: float = 0.0
    """The longest wait between two packets that ended in this sample; 0: none ended."""
    gap_ended_at_s: float = 0.0


class Loss(_Line, frozen=True, kw_only=True, tag="loss"):
    """Numbers that were skipped, noticed when the next packet arrived."""

    at_s: float
    first_sequence: int
    count: int


class Late(_Line, frozen=True, kw_only=True, tag="late"):
    """A packet of an earlier `Loss` that arrived after all."""

    at_s: float
    sequence: int


class Duplicate(_Line, frozen=True, kw_only=True, tag="duplicate"):
    """A packet that had arrived before: were two copies of the guest running?"""

    at_s: float
    sequence: int


class Reboot(_Line, frozen=True, kw_only=True, tag="reboot"):
    """A packet of another boot than the one before: the guest has started anew."""

    at_s: float


class Request(_Line, frozen=True, kw_only=True, tag="request"):
    """One short HTTP request on a connection of its own. `at_s` is when it was begun."""

    at_s: float
    seconds: float
    error: str | None = None


class StreamState(enum.StrEnum):
    STARTED = "started"
    BROKEN = "broken"
    """The connection ended, or what it brought was wrong. It isn't begun again."""


class Stream(_Line, frozen=True, kw_only=True, tag="stream"):
    """The long download began, or broke."""

    at_s: float
    state: StreamState
    error: str | None = None


class Farewell(_Line, frozen=True, kw_only=True, tag="farewell"):
    """The client's last words."""

    at_s: float
    status: GuestStatus | None = None
    """After the guest has verified every page of its memory; None: it didn't answer."""
    error: str | None = None
    """Why it didn't."""


Observation = Sample | Loss | Late | Duplicate | Reboot | Request | Stream | Farewell

_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Observation)


def encode_line(observation: Observation) -> bytes:
    """One line, with its end."""
    return _ENCODER.encode(observation) + b"\n"


def decode_line(line: bytes) -> Observation:
    """Raises msgspec.DecodeError."""
    decoded: Observation = _DECODER.decode(line)
    return decoded
