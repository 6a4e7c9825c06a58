"""Which pages of the destination's memory are missing, and how they are filled in. Post-copy.

    MISSING ──asked──► ASKED ──filled──► PRESENT
       ▲                 │
       └──stream broke───┘

One byte a page. Missing pages are holes of the memory file, and holes only: the hypervisor's
mapping is registered for missing pages, and nobody writes through another one. So a
successor of a dead engine reads from the file what is missing: each hole might be. Unless the
mapping isn't registered any more: the dead one had filled in all of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from migrator import ranges
from migrator.engine import kernel
from migrator.engine.landing import unwritable
from migrator.engine.memory import MappedRegion
from migrator.errors import EngineError
from migrator.model import PAGE_SIZE_BYTES
from migrator.ports import RegionMapping
from migrator.ranges import Ranges

PRESENT: Final = 0
MISSING: Final = 1
ASKED: Final = 2
_WINDOW_PAGES: Final = 512
_HELD_S: Final = 0.5
"""How long the kernel may hold a page that it moves: a millisecond, mostly."""
_LOOK_S: Final = 0.001


def post_copy_refusal(regions: Sequence[MappedRegion]) -> str:
    """Why these can't be filled in while the guest runs; "" if they can."""
    for region in regions:
        if region.page_size_bytes != PAGE_SIZE_BYTES:
            return (
                f"memory region {region.layout.name} is made of huge pages, "
                "which can't be filled in 4 KiB at a time"
            )
    return ""


class MissingPages:
    """All regions' pages. Thread-safe; every method is short."""

    def __init__(self, regions: list[MappedRegion]) -> None:
        """EngineError: see `post_copy_refusal`."""
        if refusal := post_copy_refusal(regions):
            raise EngineError(refusal)
        self._lock = threading.Lock()
        self._raw = [bytearray(region.size_bytes // PAGE_SIZE_BYTES) for region in regions]
        self._states: list[npt.NDArray[np.uint8]] = [
            np.frombuffer(raw, dtype=np.uint8) for raw in self._raw
        ]
        self._cursor = (0, 0)
        self.left_pages = 0

    def add(self, region: int, content: Ranges) -> None:
        """These pages are missing."""
        with self._lock:
            states = self._states[region]
            for start, end in (content // PAGE_SIZE_BYTES).tolist():
                part = states[start:end]
                self.left_pages += end - start - int(np.count_nonzero(part))
                part[:] = MISSING

    def keep(self, region: int, content: Ranges) -> None:
        """None but these are missing: the source has holes elsewhere, which are zeros."""
        size = len(self._raw[region]) * PAGE_SIZE_BYTES
        whole = ranges.from_pairs([(0, size)])
        for start, end in ranges.subtract(whole, content).tolist():
            self.filled(region, start, end)

    def is_missing(self, region: int, offset: int) -> bool:
        return self._raw[region][offset // PAGE_SIZE_BYTES] != PRESENT

    def filled(self, region: int, start: int, end: int) -> None:
        """These pages are in place."""
        with self._lock:
            part = self._states[region][start // PAGE_SIZE_BYTES : end // PAGE_SIZE_BYTES]
            self.left_pages -= int(np.count_nonzero(part))
            part[:] = PRESENT

    def forget_asked(self) -> None:
        """What was asked for and didn't come is missing again."""
        with self._lock:
            for states in self._states:
                states[states == ASKED] = MISSING

    def move_to(self, region: int, offset: int) -> None:
        """The guest works here: the next pages to ask for are those behind it."""
        self._cursor = (region, offset // PAGE_SIZE_BYTES)

    def ask(self, pages_max: int) -> tuple[int, Ranges] | None:
        """The next pages to ask for, marked as asked: (region, ranges). None: none is left."""
        with self._lock:
            first, page = self._cursor
            for step in range(len(self._raw) + 1):
                region = (first + step) % len(self._raw)
                found = self._raw[region].find(MISSING, page if step == 0 else 0)
                if found >= 0:
                    window = self._states[region][found : found + _WINDOW_PAGES]
                    pages = np.flatnonzero(window == MISSING)[:pages_max]
                    window[pages] = ASKED
                    starts = (pages + found).astype(np.int64)
                    self._cursor = (region, int(starts[-1]) + 1)
                    return region, ranges.from_page_starts(
                        starts * PAGE_SIZE_BYTES, PAGE_SIZE_BYTES
                    )
            return None


def first_data(region: MappedRegion, mapping: RegionMapping) -> int | None:
    """The offset in the region of the mapping's first page that isn't a hole. None: all are."""
    first = mapping.region_offset_bytes
    try:
        found = os.lseek(region.fd, first, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise
    found -= found % PAGE_SIZE_BYTES
    return found if found < first + mapping.length_bytes else None


class Placer:
    """Fills holes of the hypervisor's memory, and lets go on who waits for them."""

    def __init__(self, uffd: int, regions: list[MappedRegion]) -> None:
        self._uffd = uffd
        self._regions = regions
        self._mappings = [
            (mapping.address, mapping.address + mapping.length_bytes, mapping, region.index)
            for region in regions
            for mapping in region.layout.mappings
        ]
        self._watches = False

    def watch(self) -> None:
        """From here on a hole's reader waits, and the kernel leaves holes alone. Idempotent.

        EngineError if the kernel refuses.
        """
        if self._watches:
            return
        try:
            kernel.uffd_initialise(self._uffd)
            for start, end, _, _ in self._mappings:
                kernel.uffd_register_missing(self._uffd, start, end - start)
        except OSError as error:
            raise EngineError(f"missing pages can't be waited for: {error}") from error
        self._watches = True

    def arm(self) -> None:
        """As `watch`; wakes whoever waits already, for a dead engine or since `watch`."""
        self.watch()
        self.wake_all()

    def armed(self) -> bool:
        """Whether an earlier engine watched, and hasn't disarmed: then pages may be missing.

        A page that is there tells: to fill it fails because it is there, or, first of all, because
        nobody waits for that mapping's holes. True also where nothing tells. OSError.
        """
        told = False
        for start, _, mapping, index in self._mappings:
            offset = first_data(self._regions[index], mapping)
            if offset is None:
                continue
            told = True
            try:
                address = start + offset - mapping.region_offset_bytes
                kernel.uffd_zero(self._uffd, address, PAGE_SIZE_BYTES)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
            else:
                return True
        return not told

    def wake_all(self) -> None:
        """Whoever waits looks again: a fault that was read by an engine that died is told anew."""
        for start, end, _, _ in self._mappings:
            with contextlib.suppress(OSError):
                kernel.uffd_wake(self._uffd, start, end - start)

    def disarm(self) -> None:
        """Holes are zeros again, and nobody waits. Only when no page is missing any more."""
        for start, end, _, _ in self._mappings:
            with contextlib.suppress(OSError):
                kernel.uffd_unregister(self._uffd, start, end - start)

    def locate(self, address: int) -> tuple[int, int] | None:
        """(region, offset of the page) of an address in the hypervisor's address space."""
        for start, end, mapping, region in self._mappings:
            if start <= address < end:
                offset = address - start + mapping.region_offset_bytes
                return region, offset - offset % PAGE_SIZE_BYTES
        return None

    def copy(self, region: int, start: int, end: int, source: int) -> None:
        """Fill [start, end) of a region with what is at our address `source`.

        Pages that are there already stay as they are. OSError: the hypervisor is gone.
        """
        self._fill(region, start, end, source)

    def zero(self, region: int, start: int, end: int) -> None:
        """Fill with zeros; otherwise as `copy`."""
        self._fill(region, start, end, None)

    def _fill(self, region: int, start: int, end: int, source: int | None) -> None:
        at = start
        while at < end:
            address, reach = self._address_of(region, at)
            length = min(end - at, reach)
            if source is None:
                done = kernel.uffd_zero(self._uffd, address, length)
            else:
                done = kernel.uffd_copy(self._uffd, address, source + at - start, length)
            if done == 0:  # There already. Somebody may have looked before it was.
                kernel.uffd_wake(self._uffd, address, PAGE_SIZE_BYTES)
                done = PAGE_SIZE_BYTES
            at += done
        if len(self._mappings) > len(self._regions):
            self._wake_elsewhere(region, start, end)

    def _address_of(self, region: int, offset: int) -> tuple[int, int]:
        """Where a region's offset is mapped, and how many bytes the mapping has from there."""
        for mapping in self._regions[region].layout.mappings:
            within = offset - mapping.region_offset_bytes
            if 0 <= within < mapping.length_bytes:
                return mapping.address + within, mapping.length_bytes - within
        raise OSError(errno.ENOENT, f"offset {offset:#x} of region {region} isn't mapped")

    def _wake_elsewhere(self, region: int, start: int, end: int) -> None:
        """The same bytes may be mapped more than once."""
        for mapping in self._regions[region].layout.mappings:
            low = max(start, mapping.region_offset_bytes)
            high = min(end, mapping.region_offset_bytes + mapping.length_bytes)
            if low < high:
                address = mapping.address + low - mapping.region_offset_bytes
                kernel.uffd_wake(self._uffd, address, high - low)


def make_hole(region: MappedRegion, start: int, end: int) -> None:
    """Whatever is there of [start, end) is gone, and whoever looks finds a hole.

    The kernel makes no hole of a part of a huge page that somebody holds: it writes zeros there,
    and says nothing. Nobody would wait for such a page, nor could it be filled. Whoever only moves
    a page lets go of it soon. EngineError: somebody doesn't, or the kernel can't.
    """
    try:
        _make_hole(region, start, end)
    except OSError as error:
        raise unwritable(region, error) from error


def _make_hole(region: MappedRegion, start: int, end: int) -> None:
    deadline = time.monotonic() + _HELD_S
    kernel.punch_hole(region.fd, start, end)
    while kernel.has_data(region.fd, start, end):
        if time.monotonic() > deadline:
            raise EngineError(
                f"memory region {region.layout.name} can't be emptied at {start:#x}: "
                "a huge page there is held by somebody, perhaps for a device"
            )
        time.sleep(_LOOK_S)  # Nobody can wait for that, and for so long at most.
        kernel.punch_hole(region.fd, start, end)


def holes_of(region: MappedRegion) -> Ranges:
    """What of a region's file is a hole, in whole pages."""
    data = kernel.populated_extents(region.fd, region.size_bytes)
    whole = ranges.from_pairs([(0, region.size_bytes)])
    return ranges.subtract(whole, ranges.align_outward(data, PAGE_SIZE_BYTES))
