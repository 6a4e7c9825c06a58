"""Which pages are all zeros: they needn't travel.

Reading every page would cost more than sending it over a fast network. So the first word of each
page is looked at, and only where it is zero the rest. Where few pages of a batch were zero, the
next batches aren't looked at: `ZeroFilter` samples.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from migrator import ranges
from migrator.model import PAGE_SIZE_BYTES
from migrator.ranges import Ranges

_WORDS: Final = PAGE_SIZE_BYTES // 8
_CHECK_PAGES: Final = 512
"""Pages compared at once: 2 MiB, which stays in the processor's cache."""
_WORTH_IT: Final = 1 / 32
"""Share of zero pages from which every batch is looked at."""
_SKIP_BATCHES: Final = 3


def split_zeroes(words: npt.NDArray[np.uint64], content: Ranges) -> tuple[Ranges, Ranges]:
    """(pages with content, zero pages) of page-aligned ranges.

    `words` is the region's memory as words, shape (size / 8,). Only reads pages in `content`.
    """
    starts = ranges.page_starts(content, PAGE_SIZE_BYTES)
    suspects = starts[words[starts // 8] == 0]
    if not len(suspects):
        return content, ranges.empty()
    pages = words.reshape(-1, _WORDS)
    zero = np.zeros(len(suspects), dtype=bool)
    for at in range(0, len(suspects), _CHECK_PAGES):
        numbers = suspects[at : at + _CHECK_PAGES] // PAGE_SIZE_BYTES
        zero[at : at + _CHECK_PAGES] = ~pages[numbers].any(axis=1)
    zeroes = ranges.from_page_starts(suspects[zero], PAGE_SIZE_BYTES)
    return ranges.subtract(content, zeroes), zeroes


class ZeroFilter:
    """Samples `split_zeroes` over the batches of one pass and stream."""

    def __init__(self) -> None:
        self._skip = 0

    def split(self, words: npt.NDArray[np.uint64], content: Ranges) -> tuple[Ranges, Ranges]:
        if self._skip:
            self._skip -= 1
            return content, ranges.empty()
        pages, zeroes = split_zeroes(words, content)
        if ranges.byte_count(zeroes) < _WORTH_IT * ranges.byte_count(content):
            self._skip = _SKIP_BATCHES
        return pages, zeroes
