"""Page-range arithmetic: sets of bytes as sorted arrays of [start, end).

    start   0        4096      8192                12288     16384
            ├─────────┤         ├────────────────────┤
    as      [[0, 4096], [8192, 12288]]          shape (n, 2), int64, bytes

A *canonical* array is sorted, its ranges are not empty, and no two of them touch or overlap. Every
function takes and returns canonical arrays unless its docstring says otherwise, costs
O(n log n) in the number of ranges, and never depends on the size of the memory that the ranges
lie in. Pure: nothing is modified in place.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from migrator.model import STRIPE_BYTES

Ranges = npt.NDArray[np.int64]

_LEFT, _RIGHT = 1, 2


def empty() -> Ranges:
    return np.empty((0, 2), dtype=np.int64)


def from_pairs(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """Any (start, end) pairs, in bytes, as a canonical array. Empty pairs are dropped."""
    array = np.array(list(pairs), dtype=np.int64).reshape(-1, 2)
    return canonical(array)


def canonical(ranges: Ranges) -> Ranges:
    """Sort, drop what is empty, and coalesce what touches or overlaps. Takes any array."""
    ranges = ranges[ranges[:, 1] > ranges[:, 0]]
    if len(ranges) < 2:
        return ranges
    starts = ranges[:, 0]
    if (starts[1:] < starts[:-1]).any():
        ranges = ranges[np.argsort(starts, kind="stable")]
        starts = ranges[:, 0]
    reach = np.maximum.accumulate(ranges[:, 1])
    first = np.empty(len(ranges), dtype=bool)
    first[0] = True
    np.greater(starts[1:], reach[:-1], out=first[1:])
    if first.all():
        return ranges
    heads = np.flatnonzero(first)
    tails = np.append(heads[1:], len(ranges)) - 1
    return np.column_stack((starts[heads], reach[tails]))


def union(*sets: Ranges) -> Ranges:
    """What is in any of the sets."""
    filled = [ranges for ranges in sets if len(ranges)]
    if not filled:
        return empty()
    return filled[0] if len(filled) == 1 else canonical(np.concatenate(filled))


def subtract(left: Ranges, right: Ranges) -> Ranges:
    """What is in `left` but not in `right`."""
    return _combine(left, right, _LEFT) if len(left) and len(right) else left


def intersect(left: Ranges, right: Ranges) -> Ranges:
    """What is in both."""
    return _combine(left, right, _LEFT + _RIGHT) if len(left) and len(right) else empty()


def _combine(left: Ranges, right: Ranges, by: int) -> Ranges:
    """Sweep over all borders: the pieces that are covered by just those sets.

    Where borders coincide the sum between them means nothing, and the piece is empty.
    """
    borders = np.concatenate((left[:, 0], left[:, 1], right[:, 0], right[:, 1]))
    steps = np.repeat(
        np.array((_LEFT, -_LEFT, _RIGHT, -_RIGHT), dtype=np.int8),
        (len(left), len(left), len(right), len(right)),
    )
    order = np.argsort(borders, kind="stable")  # Four sorted runs: a merge.
    borders = borders[order]
    covered_by = np.cumsum(steps[order], dtype=np.int8)[:-1]
    pieces = np.flatnonzero(covered_by == by)
    return canonical(np.column_stack((borders[pieces], borders[pieces + 1])))


def byte_count(ranges: Ranges) -> int:
    if len(ranges) == 1:  # A page that somebody waits for: numpy takes ten times as long.
        return int(ranges[0, 1]) - int(ranges[0, 0])
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def page_count(ranges: Ranges, page_size_bytes: int) -> int:
    """Pages of `page_size_bytes` in page-aligned ranges."""
    return byte_count(ranges) // page_size_bytes


def align_outward(ranges: Ranges, page_size_bytes: int) -> Ranges:
    """Each range grown to whole pages."""
    grown = ranges.copy()
    grown[:, 0] -= grown[:, 0] % page_size_bytes
    grown[:, 1] += -grown[:, 1] % page_size_bytes
    return canonical(grown)


def cut(ranges: Ranges, piece_bytes: int) -> Ranges:
    """The same bytes with no range crossing a multiple of `piece_bytes`. Sorted, not canonical."""
    if not len(ranges):
        return ranges
    first = ranges[:, 0] // piece_bytes
    pieces = (ranges[:, 1] - 1) // piece_bytes - first + 1
    if (pieces == 1).all():
        return ranges
    row = np.repeat(np.arange(len(ranges)), pieces)
    within = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    piece = first[row] + within
    starts = np.maximum(ranges[row, 0], piece * piece_bytes)
    ends = np.minimum(ranges[row, 1], (piece + 1) * piece_bytes)
    return np.column_stack((starts, ends))


def split_by_stripe(ranges: Ranges, streams: int, stripe_bytes: int = STRIPE_BYTES) -> list[Ranges]:
    """The ranges of each stream: a stripe belongs to stream (its number modulo `streams`).

    The same byte always goes to the same stream, whatever the ranges around it.
    """
    if streams == 1:
        return [ranges]
    pieces = cut(ranges, stripe_bytes)
    stream = (pieces[:, 0] // stripe_bytes) % streams
    return [pieces[stream == index] for index in range(streams)]


def take(ranges: Ranges, bytes_max: int, ranges_max: int) -> tuple[Ranges, Ranges]:
    """Split sorted ranges into a head within both limits, and the rest.

    The head holds at least one byte where there is one; a range is cut where `bytes_max` says.
    """
    if len(ranges) <= min(1, ranges_max) and byte_count(ranges) <= bytes_max:
        return ranges, ranges[:0]
    window = ranges[:ranges_max]
    filled = np.cumsum(window[:, 1] - window[:, 0])
    whole = int(np.searchsorted(filled, bytes_max, side="right"))
    if whole == len(window):
        return window, ranges[whole:]
    used = int(filled[whole - 1]) if whole else 0
    middle = int(ranges[whole, 0]) + bytes_max - used
    if middle == int(ranges[whole, 0]):
        return window[:whole], ranges[whole:]
    head = ranges[: whole + 1].copy()
    head[whole, 1] = middle
    rest = ranges[whole:].copy()
    rest[0, 0] = middle
    return head, rest


def page_starts(ranges: Ranges, page_size_bytes: int) -> npt.NDArray[np.int64]:
    """The offset of each page in page-aligned ranges, ascending."""
    pages = (ranges[:, 1] - ranges[:, 0]) // page_size_bytes
    before = np.cumsum(pages) - pages
    within = np.arange(int(pages.sum()), dtype=np.int64) - np.repeat(before, pages)
    starts: npt.NDArray[np.int64] = np.repeat(ranges[:, 0], pages) + within * page_size_bytes
    return starts


def from_page_starts(starts: npt.NDArray[np.int64], page_size_bytes: int) -> Ranges:
    """The inverse of `page_starts`; takes offsets in any order."""
    return canonical(np.column_stack((starts, starts + page_size_bytes)))
