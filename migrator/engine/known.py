"""What the destination has of each page, as hashes: one that equals what was last sent stays here.

    copied ─► hash ─► as it was sent? ─► skipped
                       └───────────────► sent, and its hash kept

A guest rewrites pages with what they held already, and an emulator touches them without changing
them. Telling costs 1.7 us a page, so it is done only where pages are copied anyway because the link
is slow (`packing`), and mostly not while it finds nothing.

The hash is GMAC's, with a random key an engine and one nonce for all pages: 128 bits of GHASH, for
which processors have instructions (BLAKE2b takes 6 to 10 us a page). A page is compared with one
earlier content of the same page. Whatever two contents these are, they have the same hash with one
key in 2^119, by the blocks of a page over 2^128: as long as nobody knows the key, and no hash ever
leaves the engine. So a guest that wants to corrupt its own copy can't search for a collision, as it
could with a fast hash that isn't keyed (xxh128), and the one nonce tells nobody anything.

What is known is what was *sent* over a stream and is acknowledged, or on its way in order: a page
that is sent again, goes another way, or was under way when its stream broke is forgotten.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from migrator import ranges
from migrator.engine.memory import MappedRegion
from migrator.model import PAGE_SIZE_BYTES
from migrator.ranges import Ranges

_DIGEST_WORDS: Final = 2
_NONCE: Final = bytes(12)
_COMPARED_MIN: Final = 4096
"""Pages after which it is judged whether comparing pays."""
_WORTH_IT: Final = 0.02
_TRIALS_APART: Final = 16
"""Where it doesn't, one frame in so many is compared all the same."""

Digests = npt.NDArray[np.uint64]


class KnownPages:
    """One engine's. A page belongs to one stream, so threads never meet at one."""

    def __init__(self, regions: Sequence[MappedRegion]) -> None:
        self._tag = AESGCM(secrets.token_bytes(16)).encrypt
        # Untouched until written to: a guest that is never packed pays for none of it.
        self._digests: list[Digests] = [
            np.zeros((region.size_bytes // PAGE_SIZE_BYTES, _DIGEST_WORDS), dtype=np.uint64)
            for region in regions
        ]
        self._used = False
        self._compared = 0
        self._same = 0
        self._trial_in = 0

    def should_hash(self) -> bool:
        """Asked for each frame: False for most of them while too few pages are the same."""
        if self._compared < _COMPARED_MIN or self._same >= _WORTH_IT * self._compared:
            return True
        self._trial_in -= 1
        if self._trial_in < 0:
            self._trial_in = _TRIALS_APART
            return True
        return False

    def hash(self, pages: memoryview) -> Digests:
        """One row a page. It keeps Python's lock: 0.4 ms for a frame of a MiB."""
        tag = self._tag  # Of nothing, with the page as what is authenticated beside it.
        found = b"".join(
            tag(_NONCE, b"", pages[at : at + PAGE_SIZE_BYTES])
            for at in range(0, len(pages), PAGE_SIZE_BYTES)
        )
        return np.frombuffer(found, dtype=np.uint64).reshape(-1, _DIGEST_WORDS)

    def same(self, region: int, content: Ranges, digests: Digests) -> npt.NDArray[np.bool_]:
        """Which of the pages are, by their hashes, as they were sent last."""
        known = self._digests[region][_pages(content)]
        compared = known.any(axis=1)
        same: npt.NDArray[np.bool_] = compared & (known == digests).all(axis=1)
        self._compared += int(np.count_nonzero(compared))
        self._same += int(np.count_nonzero(same))
        if self._compared > 4 * _COMPARED_MIN:  # What was long ago counts less.
            self._compared, self._same = self._compared // 2, self._same // 2
        return same

    def sent(self, region: int, content: Ranges, digests: Digests | None) -> None:
        """These pages go out, with these hashes; None: it isn't known with what."""
        if digests is not None:
            self._used = True
            self._digests[region][_pages(content)] = digests
        elif self._used:
            for start, end in (content // PAGE_SIZE_BYTES).tolist():
                self._digests[region][start:end] = 0


def _pages(content: Ranges) -> npt.NDArray[np.int64]:
    """The numbers of the pages, in order."""
    return ranges.page_starts(content, PAGE_SIZE_BYTES) // PAGE_SIZE_BYTES
