"""What a pass has to send, as pieces for each stream.

- first: every populated extent, after marking all of it clean; and that the rest is holes
- dirty: what is pending, and what the guest gave back since it was sent
- final: what is pending after one more scan
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from migrator import ranges
from migrator.engine import frames, kernel
from migrator.engine.dirty_log import DirtyLog
from migrator.engine.memory import MappedRegion
from migrator.engine.stream import Piece
from migrator.model import PAGE_SIZE_BYTES, STRIPE_BYTES, PassKind
from migrator.ranges import Ranges

_HOLES_SHARE: Final = 0.1
"""Looking for new holes may take this share of a pre-copy's time."""


class PassPlanner:
    """Remembers what was ever sent. Reads the guest's page tables, never its memory."""

    def __init__(
        self, regions: list[MappedRegion], log: DirtyLog, pagemap: kernel.PagemapScanner
    ) -> None:
        self._regions = regions
        self._log = log
        self._pagemap = pagemap
        self._sent_ever: list[Ranges] = [ranges.empty() for _ in regions]
        self._sent_last: list[Ranges] = list(self._sent_ever)
        """By final passes, which have no time to add it."""
        self._told_missing: list[Ranges] = list(self._sent_ever)
        self._begun = False
        self._holes_at_s = 0.0
        self._holes_cost_s = 0.0

    def pieces(self, kind: PassKind, streams: int) -> list[list[Piece]]:
        """What each stream has to send in a pass.

        The guest's memory is marked clean before any of it is read, so that nothing is missed.
        """
        pieces: list[list[Piece]] = [[] for _ in range(streams)]
        if kind is PassKind.FIRST:
            self._begun = True
            self._log.arm()
            for index, extents in enumerate(self.extents()):
                self._sent_ever[index] = extents
                whole = ranges.from_pairs([(0, self._regions[index].size_bytes)])
                holes = ranges.subtract(whole, extents)
                self._share_out(pieces, index, holes, kind=frames.FrameKind.ZERO, hole=True)
                if self._regions[index].can_sendfile:
                    self._share_out(pieces, index, extents)
                else:
                    mapped = self._mapped(index)
                    self._share_out(pieces, index, ranges.intersect(extents, mapped), cold=True)
                    rest = ranges.subtract(extents, mapped)
                    self._share_out(pieces, index, rest, through_file=True)
            return pieces
        if kind is PassKind.FINAL:
            self._log.scan()
        else:
            self._punch_new_holes(pieces)
        for index, pending in enumerate(self._log.take()):
            if kind is PassKind.FINAL:
                self._share_out(pieces, index, pending)
                self._sent_last[index] = ranges.union(self._sent_last[index], pending)
                continue
            known = self._sent_ever[index]
            fresh = ranges.subtract(pending, known)
            self._share_out(pieces, index, fresh, cold=not self._regions[index].can_pwrite)
            self._share_out(pieces, index, ranges.subtract(pending, fresh))
            self._sent_ever[index] = ranges.union(known, fresh)
        return pieces

    def missing(self, *, last: bool) -> tuple[list[Ranges], list[Ranges]]:
        """By region, after a scan: what the destination lacks, and what is to be a hole there.

        The first is no longer pending, and is told once: nothing is sent after it was. The second
        is empty unless nothing was ever sent. `last`: nothing will be told after it.
        """
        if self._begun:
            self._log.scan()
            found = self._log.take()
            news = list(map(ranges.subtract, found, self._told_missing))
            if not last:
                self._told_missing = list(map(ranges.union, self._told_missing, news))
            return news, [ranges.empty() for _ in self._regions]
        self._begun = True
        self._log.arm()
        extents = self._told_missing = self.extents()
        wholes = [ranges.from_pairs([(0, region.size_bytes)]) for region in self._regions]
        return extents, list(map(ranges.subtract, wholes, extents))

    def untold_pages(self) -> int:
        """What of the pending pages `missing` has yet to tell."""
        found = map(ranges.subtract, self._log.pending(), self._told_missing)
        return sum(ranges.page_count(content, PAGE_SIZE_BYTES) for content in found)

    def not_sent(self, deferred: Iterable[tuple[int, Ranges]]) -> None:
        """What a pass left out: the destination may have no memory there yet."""
        parts: dict[int, list[Ranges]] = {}
        for region, content in deferred:
            parts.setdefault(region, []).append(content)
        for region, found in parts.items():
            left_out = ranges.union(*found)
            self._sent_ever[region] = ranges.subtract(self._sent_ever[region], left_out)

    def _share_out(
        self,
        pieces: list[list[Piece]],
        index: int,
        content: Ranges,
        *,
        kind: frames.FrameKind = frames.FrameKind.PAGES,
        through_file: bool = False,
        cold: bool = False,
        hole: bool = False,
    ) -> None:
        """Give each stream its stripes. A stripe holds whole pages, so huge ones widen it."""
        if not len(content):
            return
        stripe_bytes = max(STRIPE_BYTES, self._regions[index].page_size_bytes)
        parts = ranges.split_by_stripe(content, len(pieces), stripe_bytes)
        for mine, part in zip(pieces, parts, strict=True):
            mine.append(Piece(index, part, kind, through_file, cold, hole))

    def _punch_new_holes(self, pieces: list[list[Piece]]) -> None:
        """Memory that the guest gave back (balloon) since we sent it is zeros at the source.

        The kernel doesn't report it as written. Walking the extents takes 7 ms per GiB, so it is
        done only now and then, and never while the guest is paused.
        """
        now = time.monotonic()
        if self._holes_cost_s > _HOLES_SHARE * (now - self._holes_at_s):
            return
        for index, extents in enumerate(self.extents()):
            sent = ranges.union(self._sent_ever[index], self._sent_last[index])
            holes = ranges.subtract(sent, extents)
            self._share_out(pieces, index, holes, kind=frames.FrameKind.ZERO, hole=True)
            self._sent_ever[index] = ranges.subtract(sent, holes)
            self._sent_last[index] = ranges.empty()
        self._holes_at_s = time.monotonic()
        self._holes_cost_s = self._holes_at_s - now

    def extents(self) -> list[Ranges]:
        """What of each region is populated, in whole pages."""
        return [
            ranges.align_outward(
                kernel.populated_extents(region.fd, region.size_bytes), region.page_size_bytes
            )
            for region in self._regions
        ]

    def _mapped(self, index: int) -> Ranges:
        """What of a region the hypervisor has mapped: it can be read without populating it."""
        found = [
            self._pagemap.present(mapping.address, mapping.address + mapping.length_bytes)
            - (mapping.address - mapping.region_offset_bytes)
            for mapping in self._regions[index].layout.mappings
        ]
        return ranges.union(*found)
