"""Which pages can be made smaller, told by a glance.

    ready ─► glance ─┬─► soft ─► packing threads ─► frames
                     └─► hard ─► frames as they are, while no packed one is ready
                           └───► packing threads, once nothing soft is left

A link that waits for a packed frame has to be given pages as they are. If those are the ones that
no codec makes smaller, nothing is lost by it: cores that were busy, at the beginning of a pass most
of all, get to the others later. A glance costs a hundredth of what the link takes for the piece.

Pieces only wait here; what is in them is read when they are packed or sent. Single-threaded.
"""

from __future__ import annotations

import collections
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from migrator import ranges
from migrator.engine import codecs
from migrator.engine.packing_policy import RAW_SHARE
from migrator.engine.stream import Piece
from migrator.model import PAGE_SIZE_BYTES
from migrator.ranges import Ranges

SAMPLE_PAGES: Final = 8
"""Of a piece. Frames of a MiB of a Linux guest are mostly of one kind throughout."""
AHEAD_BYTES: Final = 64 * 1024 * 1024
"""Of each kind, looked at before it is needed. Text of a gigabyte must not hide what comes after it
for good, nor all of it be looked at before the first page goes."""
SOFT_BYTES: Final = 8 * 1024 * 1024
HARD_BYTES: Final = 2 * 1024 * 1024
"""As much keeps the packing threads, and a link of 1 Gbit/s for 20 ms, busy."""
_GLANCES: Final = tuple(each for each in codecs.LADDER if each.name in ("lz4", "zstd-1"))
"""LZ4 finds what repeats, in a fifth of the time, which is most. What is only distributed unevenly
Zstandard finds alone."""
_ALIKE: Final = 16
_GLANCES_APART: Final = 4
"""After so many soft pieces in a row one in so many is looked at, until one is hard: glances took a
fifth of the sending thread's time."""
_RANGES_MAX: Final = 64 * 1024
"""Of a piece in a queue. To take a bit off a piece copies the rest of it: of three million ranges
that took longer than a link of 10 Gbit/s takes for the bit."""
_WORDS: Final = PAGE_SIZE_BYTES // 8


def is_hard(words: npt.NDArray[np.uint64], content: Ranges) -> bool:
    """Whether a few pages of `content`, evenly apart, can't be made smaller.

    `words`: the region. They are compressed from a copy, for the guest may be writing them.
    """
    starts = ranges.page_starts(content, PAGE_SIZE_BYTES)
    count = min(len(starts), SAMPLE_PAGES)
    chosen = starts[np.arange(count) * (len(starts) - 1) // max(1, count - 1)]
    sample: npt.NDArray[np.uint64] = words.reshape(-1, _WORDS)[chosen // PAGE_SIZE_BYTES]
    limit, sampled = RAW_SHARE * sample.nbytes, sample.data.cast("B")
    return all(len(codecs.compress(each, sampled)) >= limit for each in _GLANCES)


class PieceQueue:
    """Pieces in their order, and how much they hold."""

    def __init__(self) -> None:
        self._pieces: collections.deque[Piece] = collections.deque()
        self.content_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._pieces)

    @property
    def head(self) -> Piece:
        """The next one. IndexError: none."""
        return self._pieces[0]

    def put(self, piece: Piece) -> None:
        """At the end; one without content isn't put at all."""
        self.content_bytes += ranges.byte_count(piece.content)
        while len(piece.content) > _RANGES_MAX:
            head = msgspec.structs.replace(piece, content=piece.content[:_RANGES_MAX])
            self._pieces.append(head)
            piece = msgspec.structs.replace(piece, content=piece.content[_RANGES_MAX:])
        if len(piece.content):
            self._pieces.append(piece)

    def put_back(self, piece: Piece) -> None:
        """At the head."""
        self._pieces.appendleft(piece)
        self.content_bytes += ranges.byte_count(piece.content)

    def take(self, bytes_max: int, ranges_max: int | None = None) -> Piece:
        """What is within the limits off the next piece. IndexError: none."""
        piece = self._pieces[0]
        taken, rest = ranges.take(piece.content, bytes_max, ranges_max or len(piece.content))
        self.content_bytes -= ranges.byte_count(taken)
        if not len(rest):
            return self._pieces.popleft()
        piece.content = rest
        return msgspec.structs.replace(piece, content=taken)


class Sorted:
    """Pieces of at most a MiB each, by kind."""

    def __init__(self) -> None:
        self.soft = PieceQueue()
        """Can be made smaller."""
        self.hard = PieceQueue()
        """Can't, by a glance."""
        self._soft_in_row = 0

    def __bool__(self) -> bool:
        return bool(self.soft or self.hard)

    @property
    def full(self) -> bool:
        """Enough was looked at for now."""
        return max(self.soft.content_bytes, self.hard.content_bytes) >= AHEAD_BYTES

    @property
    def enough(self) -> bool:
        """There is something of each kind: neither the packing threads nor the link need wait."""
        if self.full:
            return True
        return self.soft.content_bytes >= SOFT_BYTES and self.hard.content_bytes >= HARD_BYTES

    def put_back(self, ready: PieceQueue) -> None:
        """All of it to the head of the queue that it was taken from."""
        for queue in (self.hard, self.soft):
            while queue:
                ready.put_back(queue.take(queue.content_bytes))

    def put(self, piece: Piece, words: npt.NDArray[np.uint64]) -> None:
        """`words`: of its region."""
        if self._looked_at and is_hard(words, piece.content):
            self._soft_in_row = 0
            self.hard.put(piece)
        else:
            self._soft_in_row += 1
            self.soft.put(piece)

    @property
    def _looked_at(self) -> bool:
        """Whether the next piece has to be. Where all were soft of late it likely is, too."""
        return self._soft_in_row < _ALIKE or self._soft_in_row % _GLANCES_APART == 0
