"""The records that a guest writes to its disk, and what makes a set of them right. Pure.

A record fills one slot of 4,096 bytes, little-endian:

    0   8  "FERRYREC"
    8   4  version, 1
    12  4  CRC-32 (zlib's) of the record with this field 0
    16  8  sequence, from 1, without gaps, also across boots
    24  8  slots of the circle; record n is in slot (n - 1) % slots
    32  8  boot id of the guest that wrote it
    40  8  the guest's monotonic clock, in ns
    48  4  the checksum of the record before (0 in record 1)
    52  4  0
    56     a pattern

On a healthy disk whose newest record is n, each slot holds the newest record that belongs to it,
and each record names the checksum of the one before. Only the slot of record n + 1 may be
broken: a guest that was killed in the middle of a write hadn't counted it. So the loss of the
newest record can't be told from the disk alone: compare with the guest's `disk_last_sequence`.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Mapping
from typing import Final

import msgspec

RECORD_BYTES: Final = 4096
SLOTS_MAX: Final = 1 << 20
"""A guest's limit, and so the bound of a check."""
_HEADER = struct.Struct("<8sIIQQQQII")
_MAGIC: Final = b"FERRYREC"
_VERSION: Final = 1
_CRC_AT: Final = 12
_EMPTY: Final = bytes(RECORD_BYTES)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One whole record."""

    sequence: int
    slots: int
    boot_id: int
    guest_monotonic_ns: int
    previous_crc32: int
    crc32: int


class SlotState(enum.Enum):
    """What a slot without a whole record holds."""

    EMPTY = "empty"
    """Zeros: never written."""
    BROKEN = "broken"


class DiskProblem(msgspec.Struct, frozen=True, kw_only=True):
    """One slot that doesn't hold what it must."""

    slot: int
    expected_sequence: int
    """0: nothing was ever written there."""
    detail: str


class DiskReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a disk holds."""

    slots: int
    """Of the circle; 0 where the disk was never written."""
    first_sequence: int
    """The oldest record; 0 if none."""
    last_sequence: int
    """The newest record. Compare it with what the guest counted (`disk_last_sequence`)."""
    records: int
    """Whole records in their right places."""
    boot_ids: tuple[int, ...]
    """Of the guests that wrote the records, in the order of their writing."""
    torn_slot: int | None
    """The next record's slot, where it was broken off in the middle of a write. No problem."""
    problems: tuple[DiskProblem, ...]

    @property
    def intact(self) -> bool:
        """Whether the numbering has no gap, and all checksums and the chain are right."""
        return not self.problems


def encode_record(
    *,
    sequence: int,
    slots: int,
    boot_id: int = 0,
    guest_monotonic_ns: int = 0,
    previous_crc32: int = 0,
) -> bytes:
    """A record as a guest writes it, but for the pattern, which is left zero."""

    def header(crc32: int) -> bytes:
        return _HEADER.pack(
            _MAGIC,
            _VERSION,
            crc32,
            sequence,
            slots,
            boot_id,
            guest_monotonic_ns,
            previous_crc32,
            0,
        )

    padding = bytes(RECORD_BYTES - _HEADER.size)
    return header(zlib.crc32(header(0) + padding)) + padding


def parse_slot(data: bytes) -> Record | SlotState:
    """What 4,096 bytes of a disk hold. Raises ValueError for another length."""
    if len(data) != RECORD_BYTES:
        raise ValueError(f"a slot has {RECORD_BYTES} bytes, not {len(data)}")
    if data == _EMPTY:
        return SlotState.EMPTY
    magic, version, crc32, sequence, slots, boot_id, at_ns, previous, _ = _HEADER.unpack_from(data)
    actual = zlib.crc32(data[_CRC_AT + 4 :], zlib.crc32(bytes(4), zlib.crc32(data[:_CRC_AT])))
    named = magic == _MAGIC and version == _VERSION and crc32 == actual
    if not named or sequence < 1 or not 2 <= slots <= SLOTS_MAX:
        return SlotState.BROKEN
    return Record(
        sequence=sequence,
        slots=slots,
        boot_id=boot_id,
        guest_monotonic_ns=at_ns,
        previous_crc32=previous,
        crc32=crc32,
    )


def expected_sequence(slot: int, last_sequence: int, slots: int) -> int:
    """The record that `slot` holds when `last_sequence` is the newest of all; 0 for none."""
    if last_sequence <= slot:
        return 0
    return last_sequence - (last_sequence - 1 - slot) % slots


def check_slots(contents: Mapping[int, Record | SlotState], slots: int) -> DiskReport:
    """Judges a circle of `slots` slots. `contents` has an entry for each that is not empty."""
    whole = {slot: found for slot, found in contents.items() if isinstance(found, Record)}
    last = max((record.sequence for record in whole.values()), default=0)
    placed: dict[int, Record] = {}
    problems: list[DiskProblem] = []
    torn_slot: int | None = None
    for slot in range(slots):
        sequence = expected_sequence(slot, last, slots)
        found = contents.get(slot, SlotState.EMPTY)
        if found is SlotState.BROKEN and slot == last % slots:
            torn_slot = slot
        elif isinstance(found, Record) and found.sequence == sequence and found.slots == slots:
            placed[sequence] = found
        elif found is not SlotState.EMPTY or sequence != 0:
            problems.append(_misplaced(slot, sequence, found))
    for sequence, record in placed.items():
        previous = placed.get(sequence - 1)
        if previous is not None and previous.crc32 != record.previous_crc32:
            problems.append(
                DiskProblem(
                    slot=(sequence - 1) % slots,
                    expected_sequence=sequence,
                    detail="was written after another record than the one before it on this disk",
                )
            )
    in_order = [placed[sequence] for sequence in sorted(placed)]
    return DiskReport(
        slots=slots,
        first_sequence=in_order[0].sequence if in_order else 0,
        last_sequence=last,
        records=len(placed),
        boot_ids=tuple(dict.fromkeys(record.boot_id for record in in_order)),
        torn_slot=torn_slot,
        problems=tuple(problems),
    )


def _misplaced(slot: int, sequence: int, found: Record | SlotState) -> DiskProblem:
    if isinstance(found, Record):
        detail = f"holds record {found.sequence} of a circle of {found.slots} slots"
    else:
        detail = f"is {found.value}"
    return DiskProblem(slot=slot, expected_sequence=sequence, detail=detail)
