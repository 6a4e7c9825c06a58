"""The dirty log: which pages of a running guest were written since they were last taken.

      register ─► arm ─► scan ─► take ─► scan ─► take ... ─► unregister
                          │        ▲
                          └ pending┘        (restore: what was taken but not delivered)

A page is in one of three places: clean in the kernel's page tables, *pending* here, or taken by
a pass that is sending it. The order of each step is what makes it correct: a page is marked clean
before its bytes are read, so a write after the mark is found by the next scan.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Sequence
from typing import Final

from migrator import ranges
from migrator.engine import kernel
from migrator.engine_messages import RegionLayout
from migrator.errors import EngineError
from migrator.model import PAGE_SIZE_BYTES
from migrator.ranges import Ranges

_ANOTHER_S: Final = 10.0
"""How long an engine that has the log may take to end: it may be looking through a large guest."""
_LOOK_S: Final = 0.02


class LogClaim:
    """One engine at a time has a guest's dirty log: a lock on the guest's memory file.

    Another's scan would take note of writes that ours then never hears of. An engine whose agent
    was killed, or that is being killed, may still be at it when the next one begins. The kernel
    frees the lock when the process is gone, and not before.
    """

    def __init__(self, memory_fd: int) -> None:
        self._memory_fd = memory_fd
        self._fd = -1

    def take(self) -> None:
        """Idempotent. EngineError: another engine has it, and doesn't end."""
        if self._fd >= 0:
            return
        try:
            # Opened anew: the descriptors that engines are given share one open file, and its lock.
            fd = os.open(f"/proc/self/fd/{self._memory_fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:  # Then all is as it would be without.
            sys.stderr.write(f"the dirty log can't be claimed: {error}\n")
            return
        deadline = time.monotonic() + _ANOTHER_S
        while not _locked(fd):
            if time.monotonic() > deadline:
                os.close(fd)
                raise EngineError("another engine is still tracking what this guest writes")
            time.sleep(_LOOK_S)  # Nobody can wait for such a lock, and for so long at most.
        self._fd = fd

    def give_back(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class DirtyLog:
    """One guest's dirty log. `unregister` must be called at the end, whatever happened."""

    def __init__(
        self, uffd: int, pagemap_fd: int, regions: Sequence[RegionLayout], claim: LogClaim
    ) -> None:
        self._uffd = uffd
        self._pagemap_fd = pagemap_fd
        self._scanner = kernel.PagemapScanner(pagemap_fd)
        self._regions = tuple(regions)
        self._claim = claim
        self._anothers = False
        """What is registered may be another engine's."""
        self._pending: list[Ranges] = [ranges.empty() for _ in regions]
        self._scanned_at_s = time.monotonic()
        self.scanned_s = 0.0
        """Between the last two scans: in which what the last one found was written."""

    def register(self) -> None:
        """Track the guest's writes from here on, from scratch: whatever an earlier engine left.

        EngineError on refusal; nothing is registered then, or what is is another engine's.
        """
        self._anothers = True
        self._claim.take()
        self._anothers = False
        try:
            kernel.uffd_initialise(self._uffd)
            for region in self._regions:
                for mapping in region.mappings:
                    kernel.uffd_unregister(self._uffd, mapping.address, mapping.length_bytes)
                    kernel.uffd_register_wp(self._uffd, mapping.address, mapping.length_bytes)
            self.arm()
        except OSError as error:
            self.unregister()
            raise EngineError(f"dirty tracking can't be started: {error}") from error

    def arm(self) -> None:
        """Mark everything clean and forget what is pending."""
        for region in self._regions:
            for mapping in region.mappings:
                self._scanner.arm(mapping.address, mapping.address + mapping.length_bytes)
        self._scanned_at_s = time.monotonic()
        self._pending = [ranges.empty() for _ in self._regions]

    def scan(self) -> None:
        """Add what was written since the last scan to what is pending."""
        now = time.monotonic()
        self.scanned_s, self._scanned_at_s = now - self._scanned_at_s, now
        for index, region in enumerate(self._regions):
            found = [self._pending[index]]
            for mapping in region.mappings:
                end = mapping.address + mapping.length_bytes
                written = self._scanner.written(mapping.address, end)
                if len(written):
                    found.append(written - (mapping.address - mapping.region_offset_bytes))
            if len(found) > 1:
                self._pending[index] = ranges.union(*found)

    def take(self) -> list[Ranges]:
        """What is pending, by region; it is no longer pending."""
        taken = self._pending
        self._pending = [ranges.empty() for _ in self._regions]
        return taken

    def pending(self) -> Sequence[Ranges]:
        """By region."""
        return tuple(self._pending)

    def written_pages(self) -> WrittenPages:
        """For one thread: what the next scan will find, of some pages."""
        return WrittenPages(self._pagemap_fd, self._regions)

    def restore(self, region: int, taken: Ranges) -> None:
        """Make what was taken but not delivered pending again."""
        self._pending[region] = ranges.union(self._pending[region], taken)

    def pending_bytes(self) -> int:
        return sum(ranges.byte_count(found) for found in self._pending)

    def pending_pages(self) -> int:
        """Of 4 KiB, as in every figure, whatever the guest's memory is made of."""
        return sum(ranges.page_count(found, PAGE_SIZE_BYTES) for found in self._pending)

    def unregister(self) -> None:
        """Stop tracking. Idempotent, and also right for a guest that is gone."""
        if self._anothers:
            return
        for region in self._regions:
            for mapping in region.mappings:
                # ESRCH or EINVAL: the process or the mapping is gone, and the tracking with it.
                with contextlib.suppress(OSError):
                    kernel.uffd_unregister(self._uffd, mapping.address, mapping.length_bytes)
        self._claim.give_back()


class WrittenPages:
    """What the guest has written since it was last marked clean. Only looks; one for a thread."""

    def __init__(self, pagemap_fd: int, regions: Sequence[RegionLayout]) -> None:
        self._scanner = kernel.PagemapScanner(pagemap_fd)
        self._regions = regions

    def __call__(self, region: int, content: Ranges) -> Ranges:
        """What of `content` the next scan will find in any case. Empty where that can't be told."""
        layout = self._regions[region]
        if layout.page_size_bytes != PAGE_SIZE_BYTES or not len(content):
            return ranges.empty()
        found: list[Ranges] = []
        for mapping in layout.mappings:
            offset = mapping.region_offset_bytes
            low = max(int(content[0, 0]), offset)
            high = min(int(content[-1, 1]), offset + mapping.length_bytes)
            if low < high:
                shift = mapping.address - offset
                found.append(self._scanner.peek(low + shift, high + shift) - shift)
        return ranges.intersect(ranges.union(*found), content) if found else ranges.empty()
