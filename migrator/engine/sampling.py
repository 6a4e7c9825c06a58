"""Sampling the dirty log of a guest that isn't migrating: how fast it writes, and on what.

  arm ── tick ── tick ── tick ... ── the end        each tick: scan, count, and clean again
           │       │       │
fresh     120     118     121   pages a tick: their sum over the time is the dirty rate
distinct  120     180     210   pages so far: the curve of the working set
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from migrator import ranges
from migrator.engine import codecs
from migrator.engine.control import Waiter
from migrator.engine.dirty_log import DirtyLog
from migrator.engine.memory import MappedRegion
from migrator.engine_messages import DirtySampled
from migrator.figures import DirtyPoint
from migrator.model import PAGE_SIZE_BYTES
from migrator.ranges import Ranges

_TICK_S: Final = 0.1
_SCANS_PER_TICK: Final = 10
"""A tick lasts at least so many scans, so that looking takes no more than a tenth of the time."""
_MARKS_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
"""About where the curve has its points; and at the end."""
_PAGES_LOOKED_AT: Final = 2048
_FRAME_PAGES: Final = 256
"""Pages that are packed together: a MiB, as in a migration."""
_ZERO_PAGE: Final = bytes(PAGE_SIZE_BYTES)


def sample_dirty(
    log: DirtyLog, regions: Sequence[MappedRegion], seconds: float, waiter: Waiter
) -> DirtySampled:
    """Watch for `seconds`, which should be more than a tick. `log` is registered, and stays so.

    Raises what `waiter` raises; nothing of the guest is changed then either.
    """
    distinct = [ranges.empty() for _ in regions]
    fresh_bytes = 0
    curve: list[DirtyPoint] = []
    marks = [mark for mark in _MARKS_S if mark < seconds - _TICK_S / 2]
    log.arm()
    began = time.monotonic()
    elapsed, tick_s = 0.0, _TICK_S
    while elapsed < seconds:
        waiter.wait(None, 0, max(0.0, min(tick_s, seconds - elapsed)))
        scanned = time.monotonic()
        log.scan()
        elapsed = time.monotonic() - began
        for index, fresh in enumerate(log.take()):
            fresh_bytes += ranges.byte_count(fresh)
            distinct[index] = ranges.union(distinct[index], fresh)
        if elapsed >= seconds or (marks and elapsed >= marks[0] - _TICK_S / 2):
            found = sum(ranges.byte_count(each) for each in distinct)
            curve.append(DirtyPoint(seconds=elapsed, bytes=found))
            marks = [mark for mark in marks if elapsed < mark - _TICK_S / 2]
        tick_s = max(_TICK_S, _SCANS_PER_TICK * (time.monotonic() - scanned))
    return DirtySampled(seconds=elapsed, fresh_bytes=fresh_bytes, curve=tuple(curve))


def content_shares(
    regions: Sequence[MappedRegion], extents: Sequence[Ranges]
) -> tuple[float, float]:
    """Of the populated extents the share of pages of zeros, and what LZ4 leaves of a byte of the
    others; by looking at some, evenly spaced.

    Reads by `pread`, which populates nothing: a page that was given back meanwhile reads as zeros.
    """
    pages = [
        os.pread(region.fd, PAGE_SIZE_BYTES, start)
        for region, found in zip(regions, extents, strict=True)
        for start in _spread(found)
    ]
    filled = [page for page in pages if page != _ZERO_PAGE]
    if not filled:
        return (1.0 if pages else 0.0), 1.0
    packed_bytes = 0
    for at in range(0, len(filled), _FRAME_PAGES):
        frame = b"".join(filled[at : at + _FRAME_PAGES])
        packed_bytes += min(len(codecs.compress(codecs.LADDER[0], memoryview(frame))), len(frame))
    return 1.0 - len(filled) / len(pages), packed_bytes / (len(filled) * PAGE_SIZE_BYTES)


def _spread(extents: Ranges) -> list[int]:
    """The offsets of some pages of the extents; costs nothing more where memory is large."""
    filled = np.cumsum((extents[:, 1] - extents[:, 0]) // PAGE_SIZE_BYTES)
    if not len(filled) or not filled[-1]:
        return []
    chosen = np.arange(0, filled[-1], max(1, filled[-1] // _PAGES_LOOKED_AT))
    row = np.searchsorted(filled, chosen, side="right")
    starts = extents[row, 1] - (filled[row] - chosen) * PAGE_SIZE_BYTES
    return [int(start) for start in starts]
