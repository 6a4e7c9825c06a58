"""Verifies the records on a guest's raw disk image, from the host.

    python -m deploy.guest.disk_check IMAGE

Exit status: 0 intact, 1 damaged, 2 the image can't be read or was never written by a guest.
Check a disk that nobody writes: after the guest was stopped, or on a copy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from deploy.guest.records import (
    RECORD_BYTES,
    DiskReport,
    Record,
    SlotState,
    check_slots,
    parse_slot,
)

_CHUNK_BYTES: Final = 256 * RECORD_BYTES
_PROBLEMS_SHOWN_MAX: Final = 20


def check_disk(image: Path) -> DiskReport:
    """Reads the circle of records at the start of `image` and judges it.

    A disk without any record gives a report with `slots` 0; where it isn't blank, with a problem
    a slot. Raises OSError if the image can't be read.
    """
    contents: dict[int, Record | SlotState] = {}
    slots: int | None = None
    for slot, data in _read_slots(image):
        if slots is not None and slot >= slots:
            break
        found = parse_slot(data)
        if found is SlotState.EMPTY:
            continue
        contents[slot] = found
        if slots is None and isinstance(found, Record):
            slots = found.slots
    if slots is None:
        # Never written, or nothing whole is left: every slot that is not blank is a problem.
        return check_slots(contents, max(contents, default=-1) + 1)
    return check_slots(contents, slots)


def _read_slots(image: Path) -> Iterator[tuple[int, bytes]]:
    with image.open("rb") as file:
        slot = 0
        while chunk := file.read(_CHUNK_BYTES):
            for at in range(0, len(chunk) - RECORD_BYTES + 1, RECORD_BYTES):
                yield slot, chunk[at : at + RECORD_BYTES]
                slot += 1


def describe(report: DiskReport) -> str:
    """A few lines for a person."""
    if report.slots == 0:
        return "blank: no guest has written to this disk"
    lines = [
        f"{'intact' if report.intact else 'DAMAGED'}: records {report.first_sequence} to "
        f"{report.last_sequence} in {report.slots} slots, {report.records} whole, "
        f"written in {len(report.boot_ids)} boot(s)"
    ]
    if report.torn_slot is not None:
        lines.append(f"record {report.last_sequence + 1} was broken off while being written")
    lines += [
        f"slot {problem.slot}, record {problem.expected_sequence}: {problem.detail}"
        for problem in report.problems[:_PROBLEMS_SHOWN_MAX]
    ]
    if len(report.problems) > _PROBLEMS_SHOWN_MAX:
        lines.append(f"and {len(report.problems) - _PROBLEMS_SHOWN_MAX} more")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Verify the records on a guest's raw disk image.")
    parser.add_argument("image", type=Path)
    image: Path = parser.parse_args().image
    try:
        report = check_disk(image)
    except OSError as error:
        print(f"{image}: {error.strerror}", file=sys.stderr)
        return 2
    print(describe(report))
    if report.slots == 0:
        return 2
    return 0 if report.intact else 1


if __name__ == "__main__":
    sys.exit(main())
