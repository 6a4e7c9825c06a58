"""One TCP stream through a migration, seen where it arrives: each segment, by the kernel's clock.

The receiver's program may be late; the wire isn't. A segment whose bytes have been seen before was
sent again. Segments are as long as the sender's card hands them over (up to 64 KiB).
"""

from __future__ import annotations

import collections
import itertools
import socket
import statistics
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from deploy.lab.cables import GUEST_INTERFACE
from tests.integration.cluster.client import _Watch, in_namespace

BIN_S: Final = 0.05
"""Rates are taken over so long."""
SHARE: Final = 0.9
_SO_TIMESTAMPNS: Final = 35
_SO_RCVBUFFORCE: Final = 33
_BUFFER_BYTES: Final = 32 * 1024**2
_ETH_P_IP: Final = 0x0800
_POLL_S: Final = 0.2
_HEAD_BYTES: Final = 120
_TIMESPEC: Final = struct.Struct("@ll")


class Segment(NamedTuple):
    """`at_s`: wall clock."""

    at_s: float
    sequence: int
    length_bytes: int


class Recovery(NamedTuple):
    """What one migration cost the stream."""

    before_bytes_per_s: float
    after_bytes_per_s: float
    back_ms: float | None
    """From the resume to the end of the first BIN_S that had SHARE of the rate before; None: never.
    It may begin at any time: if it had to begin at a multiple of its length, the stream's own
    unsteadiness would make it some multiples late."""
    silence_ms: float
    """The longest time without a segment, from the resume on."""
    repeated: int
    """Segments from the start of the migration on that held no new byte."""


class Arrivals(_Watch):
    """Every segment with data from an address that arrives in the client's namespace."""

    def __init__(self, namespace: str, address: str) -> None:
        super().__init__()
        self._source = socket.inet_aton(address)
        self._socket = in_namespace(namespace, self._opened)
        self._seen: list[Segment] = []

    @staticmethod
    def _opened() -> socket.socket:
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_IP))
        opened.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        opened.bind((GUEST_INTERFACE, _ETH_P_IP))
        opened.settimeout(_POLL_S)
        return opened

    def seen(self) -> list[Segment]:
        """All so far."""
        return list(self._seen)

    def _run(self) -> None:
        with self._socket:
            while not self._stop.is_set():
                try:
                    packet, control, _, sender = self._socket.recvmsg(_HEAD_BYTES, 64)
                except TimeoutError:
                    continue
                if sender[2] == socket.PACKET_OUTGOING or packet[12:16] != self._source:
                    continue
                segment = segment_in(packet)
                if segment is not None and segment[1]:
                    seconds, nanoseconds = _TIMESPEC.unpack_from(control[0][2])
                    self._seen.append(Segment(seconds + nanoseconds / 1e9, *segment))


def segment_in(packet: bytes) -> tuple[int, int] | None:
    """Sequence number and data length of the TCP segment in an IPv4 packet; None: no TCP. Pure."""
    if len(packet) < 40 or packet[9] != socket.IPPROTO_TCP:
        return None
    head = (packet[0] & 0xF) * 4
    (total,) = struct.unpack_from("!H", packet, 2)
    (sequence,) = struct.unpack_from("!I", packet, head + 4)
    return sequence, total - head - (packet[head + 12] >> 4) * 4


def recovery(
    segments: Sequence[Segment],
    from_s: float,
    began_s: float,
    resumed_s: float,
    after_s: float,
) -> Recovery:
    """Of a stream that ran from `from_s`, whose guest moved from `began_s` on. Pure."""
    until_s = resumed_s + after_s
    before = statistics.median(_rates(segments, from_s, began_s))
    after = _rates(segments, resumed_s, until_s)
    late = [each.at_s for each in segments if resumed_s <= each.at_s < until_s]
    gaps = [later - earlier for earlier, later in itertools.pairwise([resumed_s, *late, until_s])]
    return Recovery(
        before_bytes_per_s=before,
        after_bytes_per_s=statistics.mean(after),
        back_ms=_back_ms(segments, resumed_s, until_s, SHARE * before * BIN_S),
        silence_ms=max(gaps) * 1e3,
        repeated=_repeated([each for each in segments if began_s <= each.at_s < until_s]),
    )


def _rates(segments: Sequence[Segment], from_s: float, until_s: float) -> list[float]:
    bins = [0] * max(int((until_s - from_s) / BIN_S), 1)
    for each in segments:
        number = int((each.at_s - from_s) // BIN_S)
        if 0 <= number < len(bins):
            bins[number] += each.length_bytes
    return [count / BIN_S for count in bins]


def _back_ms(
    segments: Sequence[Segment], resumed_s: float, until_s: float, enough_bytes: float
) -> float | None:
    """The end of the first BIN_S since the resume in which so much arrived."""
    window: collections.deque[Segment] = collections.deque()
    held_bytes = 0
    for each in segments:
        if not resumed_s <= each.at_s < until_s:
            continue
        window.append(each)
        held_bytes += each.length_bytes
        while window[0].at_s <= each.at_s - BIN_S:
            held_bytes -= window.popleft().length_bytes
        if held_bytes >= enough_bytes:
            return max(each.at_s - resumed_s, BIN_S) * 1e3
    return None


def _repeated(segments: Sequence[Segment]) -> int:
    highest: int | None = None
    count = 0
    for each in segments:
        end = (each.sequence + each.length_bytes) & 0xFFFFFFFF
        if highest is None or 0 < (end - highest) & 0xFFFFFFFF < 1 << 31:
            highest = end
        else:
            count += 1
    return count
