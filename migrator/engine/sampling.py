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
from migrator.engine.codecs import Codec
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
_FEW_PAGES: Final = 128
"""Of what is pending after an iteration: enough for a share that is right to a few hundredths."""
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
    return DirtySampled(
        seconds=elapsed,
        fresh_bytes=fresh_bytes,
        curve=tuple(curve),
        dirtied_packed_share=pending_packed_share(regions, distinct, codecs.LADDER[0]),
    )


def pending_packed_share(
    regions: Sequence[MappedRegion], pending: Sequence[Ranges], codec: Codec
) -> float | None:
    """What is left on the wire of a byte of what is pending, by looking at a few pages of it.

    None: nothing is pending. It takes 1 to 2 ms: the guest runs, and the next iteration waits.
    """
    if not any(len(found) for found in pending):
        return None
    zero_share, packed_share = content_shares(regions, pending, codec, pages=_FEW_PAGES)
    return (1.0 - zero_share) * packed_share


def content_shares(
    regions: Sequence[MappedRegion],
    extents: Sequence[Ranges],
    codec: Codec = codecs.LADDER[0],
    *,
    pages: int = _PAGES_LOOKED_AT,
) -> tuple[float, float]:
    """Of the populated extents the share of pages of zeros, and what `codec` leaves of a byte of
    the others; by looking at about `pages` of each region, evenly spaced. Huge pages count as they
    travel: whole, and as they are (`delivery`).
    """
    in_use = content = wire = 0.0
    for region, found in zip(regions, extents, strict=True):
        zero_share, packed_share = 0.0, 1.0
        if region.can_sendfile:
            zero_share, packed_share = _shares(region, found, codec, pages)
        size = ranges.byte_count(found)
        in_use += size
        content += size * (1.0 - zero_share)
        wire += size * (1.0 - zero_share) * packed_share
    return 1.0 - content / in_use if in_use else 0.0, wire / content if content else 1.0


def _shares(region: MappedRegion, extents: Ranges, codec: Codec, pages: int) -> tuple[float, float]:
    """Of one region's, as `content_shares`.

    Reads by `pread`, which populates nothing: a page that was given back meanwhile reads as zeros.
    """
    looked_at = [os.pread(region.fd, PAGE_SIZE_BYTES, start) for start in _spread(extents, pages)]
    filled = [page for page in looked_at if page != _ZERO_PAGE]
    if not filled:
        return (1.0 if looked_at else 0.0), 1.0
    packed_bytes = 0
    for at in range(0, len(filled), _FRAME_PAGES):
        frame = b"".join(filled[at : at + _FRAME_PAGES])
        packed_bytes += min(len(codecs.compress(codec, memoryview(frame))), len(frame))
    return 1.0 - len(filled) / len(looked_at), packed_bytes / (len(filled) * PAGE_SIZE_BYTES)


def _spread(extents: Ranges, pages: int) -> list[int]:
    """The offsets of about `pages` pages of the extents; more cost nothing more."""
    filled = np.cumsum((extents[:, 1] - extents[:, 0]) // PAGE_SIZE_BYTES)
    if not len(filled) or not filled[-1]:
        return []
    chosen = np.arange(0, filled[-1], max(1, filled[-1] // pages))
    row = np.searchsorted(filled, chosen, side="right")
    starts = extents[row, 1] - (filled[row] - chosen) * PAGE_SIZE_BYTES
    return [int(start) for start in starts]
