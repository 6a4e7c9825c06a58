"""What post-copy's answers travel as: pages as they are, or what a codec makes of them.

    BULK     as the packing policy says, at the rate that the bulk stream is seen to have
    FAULTS   by LZ4 on a slow link: a page is there sooner, and the next ones wait for less

Only where the destination can undo it (`StreamWelcome.pull_codecs`). Bulk's thread asks for bulk,
the other one for faults.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from migrator import ranges
from migrator.engine import codecs, frames
from migrator.engine.codecs import Codec
from migrator.engine.frames import FrameKind
from migrator.engine.memory import MappedRegion
from migrator.engine.packing import pack
from migrator.engine.packing_policy import RAW_SHARE, PackingPolicy
from migrator.engine.zeroes import split_zeroes
from migrator.ranges import Ranges

SLOW_BYTES_PER_S: Final = 60e6
"""A page takes 70 us of such a link; packing and unpacking it takes 15, and saves nearly half."""
_LZ4: Final = next(codec for codec in codecs.LADDER if codec.family == codecs.LZ4)


class Answer(NamedTuple):
    """One frame, and the zero pages that aren't in it."""

    content: Ranges
    """May be empty: all were zero pages."""
    kind: FrameKind
    payload: list[memoryview]
    zeroes: Ranges

    def vector(self, region: int) -> list[bytes | memoryview]:
        """Header, ranges and payload."""
        size = sum(map(len, self.payload))
        return [
            frames.encode(self.kind, region=region, content=self.content, packed_bytes=size),
            *self.payload,
        ]


class AnswerPacker:
    """Of one post-copy. `usable` may be set by each new connection."""

    def __init__(self, policy: PackingPolicy) -> None:
        self._policy = policy
        self._slow = False
        self.usable: tuple[Codec, ...] = ()

    def bulk(self, region: MappedRegion, content: Ranges, bytes_per_s: float | None) -> Answer:
        """Of at most PACK_BYTES_MIN. `bytes_per_s`: the link's, or the cap's; None: not known."""
        self._slow = bytes_per_s is not None and bytes_per_s < SLOW_BYTES_PER_S
        plan = self._policy.plan(bytes_per_s, self.usable) if self.usable else None
        # One thread packs and sends by turns, with little queued: it has to be much the faster.
        if plan is None or not plan.cheap or not self._policy.affordable:
            content, zeroes = split_zeroes(region.words, content)
            return Answer(content, FrameKind.PAGES, _plain(region, content), zeroes)
        size = ranges.byte_count(content)
        order = self._policy.order(plan, size)
        packed = pack(region, content, order)
        self._policy.note(size, packed.trial, packed.compared, copy_seconds=packed.copy_seconds)
        kind = FrameKind.PAGES if packed.codec is None else packed.codec.kind
        return Answer(packed.content, kind, [packed.payload], packed.zeroes)

    def fault(self, region: MappedRegion, content: Ranges) -> Answer:
        """What a vCPU waits for: one page, mostly."""
        plain = _plain(region, content)
        size = sum(map(len, plain))
        if self._slow and _LZ4 in self.usable and size <= frames.PACKED_BYTES_MAX:
            smaller = codecs.compress(_LZ4, memoryview(b"".join(plain)))
            if len(smaller) < RAW_SHARE * size:
                return Answer(content, _LZ4.kind, [memoryview(smaller)], ranges.empty())
        return Answer(content, FrameKind.PAGES, plain, ranges.empty())


def _plain(region: MappedRegion, content: Ranges) -> list[memoryview]:
    return [region.view[start:end] for start, end in content.tolist()]
