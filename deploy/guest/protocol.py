"""What a host reads from a running guest: packets, streams, counters, console lines. Pure.

A UDP packet, 32 bytes, little-endian:

    0   8  "FERRYUDP"
    8   8  boot id: another number after each boot
    16  8  sequence, from 1; one a millisecond, a packet that couldn't be sent uses its number up
    24  8  the guest's monotonic clock, in ns (it stands still in a blackout)

The stream (`/10m`, `/stream`) is a sequence of little-endian 64-bit words, word k = k * WEYL.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec
import numpy as np

_UDP = struct.Struct("<8sQQQ")
_UDP_MAGIC: Final = b"FERRYUDP"
_WEYL: Final = np.uint64(0x9E3779B97F4A7C15)
_WORD_BYTES: Final = 8

STREAM_10M_BYTES: Final = 10 * 1024 * 1024
"""Length of `/10m`."""


class UdpPacket(msgspec.Struct, frozen=True, kw_only=True):
    """One of a guest's numbered packets."""

    boot_id: int
    sequence: int
    guest_monotonic_ns: int

    @classmethod
    def parse(cls, data: bytes) -> UdpPacket:
        """Raises ValueError for anything else than a guest's packet."""
        if len(data) != _UDP.size:
            raise ValueError(f"a guest's packet has {_UDP.size} bytes, not {len(data)}")
        magic, boot_id, sequence, guest_monotonic_ns = _UDP.unpack(data)
        if magic != _UDP_MAGIC:
            raise ValueError("not a guest's packet: wrong magic")
        return cls(boot_id=boot_id, sequence=sequence, guest_monotonic_ns=guest_monotonic_ns)

    def encode(self) -> bytes:
        return _UDP.pack(_UDP_MAGIC, self.boot_id, self.sequence, self.guest_monotonic_ns)


class GuestStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The guest's counters (`/status`, `/verify`, FERRY-STATUS). All count from its boot."""

    name: str
    boot_id: str
    """16 hexadecimal digits; `int(boot_id, 16)` is the packets' boot id."""
    uptime_ms: int
    """By the guest's monotonic clock, which stands still in a blackout."""
    ready: bool
    corruptions: int
    """Memory and disk together. Anything but 0 is a bug."""
    memory_pages: int
    memory_writes: int
    memory_checks: int
    """Pages verified and found right."""
    memory_sweeps: int
    """How often the sweep has come round."""
    memory_corruptions: int
    disk_slots: int
    disk_records_written: int
    disk_last_sequence: int
    """Number of the newest record on the disk, acknowledged; also of earlier boots."""
    disk_checks: int
    disk_corruptions: int
    disk_errors: int
    """Requests that failed and were repeated."""
    udp_sent: int
    udp_errors: int
    http_requests: int
    http_bytes_sent: int


_STATUS_DECODER = msgspec.json.Decoder(GuestStatus)
READY: Final = "FERRY-READY"
CORRUPTION: Final = "FERRY-CORRUPTION"
_STATUS: Final = "FERRY-STATUS "
_PANIC: Final = "Kernel panic"


def parse_status(text: str | bytes) -> GuestStatus:
    """The JSON of `/status` or of a heartbeat. Raises msgspec.DecodeError."""
    return _STATUS_DECODER.decode(text)


class ConsoleReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a guest's console log says."""

    boots: int
    """How often it became ready."""
    last_status: GuestStatus | None
    corruptions: tuple[str, ...]
    errors: tuple[str, ...]
    """FERRY-ERROR and FERRY-DISK-ERROR lines, and kernel panics."""

    @property
    def healthy(self) -> bool:
        return self.boots > 0 and not self.corruptions and not self.errors


def read_console(text: str) -> ConsoleReport:
    """Sorts a console log. A last line that is not yet complete is left out."""
    boots = 0
    last_status: GuestStatus | None = None
    corruptions: list[str] = []
    errors: list[str] = []
    complete, _, _ = text.rpartition("\n")
    for line in map(str.strip, complete.split("\n")):
        if line.startswith(_STATUS):
            last_status = _status_or_none(line.removeprefix(_STATUS)) or last_status
        elif line.startswith(READY):
            boots += 1
        elif CORRUPTION in line:
            corruptions.append(line)
        elif _PANIC in line or line.startswith(("FERRY-ERROR", "FERRY-DISK-ERROR")):
            errors.append(line)
    return ConsoleReport(
        boots=boots,
        last_status=last_status,
        corruptions=tuple(corruptions),
        errors=tuple(errors),
    )


def _status_or_none(text: str) -> GuestStatus | None:
    try:
        return parse_status(text)
    except msgspec.DecodeError:
        return None  # a kernel message may have run into the line


def stream_bytes(offset_bytes: int, length_bytes: int) -> bytes:
    """What the guest sends at this place of a stream."""
    first = offset_bytes // _WORD_BYTES
    last = -(-(offset_bytes + length_bytes) // _WORD_BYTES)
    # Multiplication of unsigned arrays wraps silently, as in the guest.
    words = np.arange(first, last, dtype=np.uint64) * _WEYL
    start = offset_bytes - first * _WORD_BYTES
    return words.astype("<u8").tobytes()[start : start + length_bytes]
