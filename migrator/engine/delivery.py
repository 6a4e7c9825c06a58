"""What one stream has to deliver in a pass, and how it gets through.

    todo ─► prepare (8 MiB: zero pages apart, announced) ─► ready ─────────► frames ─► not yet
     ▲                                                       ▲ └ sorted, packed ─┘      acknowledged
     │                                                       │   (slow links)             │
     └ the pass's ranges                                     └──────── stream broke ──────┘

A delivery is done when each of its pages is acknowledged. When the stream breaks, it connects
again (bounded by `reconnect_s`), and sends again only what wasn't acknowledged.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from migrator import ranges
from migrator.engine import frames
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.channel import ChannelHealth, reconnect
from migrator.engine.control import Waiter
from migrator.engine.frames import FrameKind
from migrator.engine.known import KnownPages
from migrator.engine.memory import MappedRegion
from migrator.engine.packing import Packer
from migrator.engine.packing_policy import PACK_BYTES_MAX, PackingPolicy, Plan, StreamPlan
from migrator.engine.precedence import Precedence
from migrator.engine.sorting import PieceQueue, Sorted
from migrator.engine.stream import PageStream, Piece, StreamBrokenError
from migrator.engine.zeroes import ZeroFilter
from migrator.model import PAGE_SIZE_BYTES, PassKind, PassReport
from migrator.ranges import Ranges

_BATCH_BYTES: Final = 8 * 1024 * 1024
_LOOKAHEAD_BYTES: Final = 32 * 1024 * 1024
"""Announced ahead of what is sent, where pages are huge: prefaulting mustn't be caught up with."""
_EXPECT_BYTES_MIN: Final = 1024 * 1024
"""Less than this isn't worth a prefault in another thread."""
_PACKING_BYTES_MIN: Final = 1024 * 1024
"""Less is sent before a packing thread is up; a usual final pass is."""
_LOOKS_A_STEP: Final = 4
"""Pieces looked at beside each frame that is sent."""
_WARY_BYTES: Final = 512 * 1024
"""Sent plain at a time where packed frames may come meanwhile."""
_PACKED_WAIT_S: Final = 0.005
_BUDGET_WAIT_S: Final = 0.001
_IN_HAND_S_MIN: Final = 0.005
"""What the link must have to do, at least, while packed pages are waited for."""


class Delivery:
    """One stream's part of a pass. Owned by one thread; the counters may be read by others."""

    def __init__(
        self,
        stream: PageStream,
        pieces: Iterable[Piece],
        regions: list[MappedRegion],
        bucket: TokenBucket,
        policy: PackingPolicy,
        *,
        skip_zeroes: bool,
        known: KnownPages | None = None,
        written: Callable[[int, Ranges], Ranges] | None = None,
    ) -> None:
        """`written`: pages that have to be sent again anyway, and are left for then."""
        self._stream = stream
        self._todo = PieceQueue()
        self.left_bytes = 0
        for piece in pieces:
            self._todo.put(piece)
            self.left_bytes += _guest_bytes(piece)
        self._ready = PieceQueue()
        self._sorted = Sorted()
        self._regions = regions
        self._bucket = bucket
        self._zero_filter = ZeroFilter() if skip_zeroes else None
        self.pages = 0
        self.zero_pages = 0
        self.same_pages = 0
        """Not sent: the destination has them as they are."""
        self.deferred: list[tuple[int, Ranges]] = []
        """Not sent, by region: written since they were marked clean, so still to be found dirty."""
        self.cut: list[tuple[int, Ranges]] = []
        """Not sent, by region: the pass was ended before their turn came."""
        self.cut_pages = 0
        self._ending = False
        self.payload_bytes = 0
        """Of guest memory, however few bytes it was on the wire."""
        self.packed_bytes: collections.Counter[str] = collections.Counter()
        """Of these, what each codec packed."""
        self._policy = policy
        self._known = known
        self._written = written
        self._plan = StreamPlan(policy)
        self._packer = Packer(policy, known)
        self._precedence = Precedence()
        self._may_pack = self.left_bytes >= _PACKING_BYTES_MIN

    def run(self, health: ChannelHealth, reconnect_s: float, waiter: Waiter) -> None:
        """Until all is acknowledged. ChannelLostError, EngineError, and what the waiter raises."""
        try:
            with self._bucket.in_use():
                self._run(health, reconnect_s, waiter)
        finally:
            self._precedence.end()
            self._packer.close()

    def _run(self, health: ChannelHealth, reconnect_s: float, waiter: Waiter) -> None:
        self._stream.link.restart()
        while True:
            try:
                while self._step(waiter):
                    waiter.tick()
                self._stream.await_acknowledged(waiter)
                return
            except StreamBrokenError as error:
                self._take_back()
                reconnect(self._stream, health, str(error), reconnect_s, waiter)

    @property
    def empty(self) -> bool:
        """Nothing has to be sent. True again at the end of `run`."""
        return not self._todo and not self._waiting

    @property
    def _waiting(self) -> bool:
        """Something is prepared, and has to be sent."""
        return bool(self._ready or self._sorted or not self._packer.empty)

    def end(self) -> None:
        """Send no more of the guest's pages than are on their way. From any thread."""
        self._ending = True

    def _leave_rest(self) -> None:
        """Holes are told all the same: they cost nothing, and no later pass would."""
        self._sorted.put_back(self._ready)
        rest = self._packer.take_back()
        for queue in (self._ready, self._todo):
            while queue:
                rest.append(queue.take(queue.content_bytes))
        for piece in rest:
            if piece.hole:
                self._todo.put(piece)
                continue
            count = _guest_bytes(piece)
            self.left_bytes -= count
            self.cut_pages += count // PAGE_SIZE_BYTES
            self.cut.append((piece.region, piece.content))

    def _take_back(self) -> None:
        """What wasn't acknowledged comes first again, then what was packed and not sent."""
        for piece in reversed(self._packer.take_back()):
            self._ready.put_back(piece)
        for sent in reversed(self._stream.take_unacknowledged()):
            if sent.piece is not None:
                self._forget(sent.piece)
                self._ready.put_back(sent.piece)
                self.left_bytes += _guest_bytes(sent.piece)

    def _step(self, waiter: Waiter) -> bool:
        """Prepare as far ahead as allowed, and send one frame. False: nothing is left."""
        if self._ending:
            self._leave_rest()
        link_bytes_per_s = self._stream.gauge()
        plan = None
        if self._may_pack:
            expected = self._stream.link.expected_bytes_per_s
            plan = self._plan(link_bytes_per_s, self._stream.codecs, expected)
        sorting = self._may_pack and self._is_slow(plan, link_bytes_per_s)
        self._precedence.keep(sorting)
        while (
            self._todo
            and self._ready.content_bytes < (_LOOKAHEAD_BYTES if self._todo.head.cold else 1)
            and not (sorting and self._sorted.enough)
        ):
            self._prepare(waiter)
        if sorting:
            self._sort()
        else:
            self._sorted.put_back(self._ready)
        if plan is not None:
            self._pack_ahead(plan)
        if not self._waiting:
            return not self.empty  # The guest may have written all that was prepared meanwhile.
        if not self._packed_goes(plan, waiter) or self._runs_dry:
            # In small frames while it isn't known whether packing pays, or packed ones are awaited.
            sure = plan is None and self._stream.link.judged and self._packer.empty
            wary = self._may_pack and not sure
            self._send_plain(_WARY_BYTES if wary else frames.FRAME_BYTES_MAX, waiter)
        self._stream.collect_acks()
        return True

    def _is_slow(self, plan: Plan | None, link_bytes_per_s: float | None) -> bool:
        """Whether pages are packed, or would be on idle cores. True while nothing is known."""
        if plan is not None or not self._stream.link.judged:
            return True
        return self._policy.could_pay(link_bytes_per_s, self._stream.codecs)

    def _sort(self) -> None:
        """Look at a few of the pieces that come next: the link mustn't wait for that."""
        for _ in range(_LOOKS_A_STEP):
            if self._sorted.enough or not self._next_packable:
                return
            piece = self._ready.take(PACK_BYTES_MAX, frames.FRAME_RANGES_MAX)
            self._sorted.put(piece, self._regions[piece.region].words)

    @property
    def _runs_dry(self) -> bool:
        """The link does, packed frames or not, and there are pages that are as good plain."""
        if not self._sorted.hard or self._stream.gauge() is None:
            return False
        return self._stream.in_hand_s < _IN_HAND_S_MIN

    def _send_plain(self, bytes_max: int, waiter: Waiter) -> None:
        head = self._take(self._plain, bytes_max)
        if head is not None:
            self._count(head)
            self._forget(head)
            self._stream.send(head, self._regions[head.region], waiter)

    @property
    def _next_packable(self) -> bool:
        return bool(self._ready) and self._packable(self._ready.head)

    @property
    def _plain(self) -> PieceQueue:
        """What goes as it is: what is never packed, what isn't worth it, what comes next."""
        if self._ready and not self._packable(self._ready.head):
            return self._ready
        return self._sorted.hard or self._sorted.soft or self._ready

    def _packed_goes(self, plan: Plan | None, waiter: Waiter) -> bool:
        """Whether the turn is over: what is packed went, or is awaited. False: plain pages go."""
        if self._ready and not self._packable(self._ready.head):
            return False
        if not self._packer.empty:
            return self._send_packed(waiter)
        if plan is None:
            return False
        # No core has time for it: that is awaited while the link has enough to do.
        if self._stream.in_hand_s <= _IN_HAND_S_MIN + _PACKED_WAIT_S:
            return False
        waiter.wait(None, 0, _BUDGET_WAIT_S)
        return True

    def _take(self, queue: PieceQueue, bytes_max: int) -> Piece | None:
        """A frame's worth off the next piece. None: all of that was written meanwhile."""
        piece = queue.head
        limit = frames.PAYLOAD_BYTES_CAP
        if piece.kind is FrameKind.PAGES:
            page = self._regions[piece.region].page_size_bytes
            limit = self._bucket.piece_bytes(bytes_max)
            limit = max(page, limit - limit % page)
        taken = queue.take(limit, frames.FRAME_RANGES_MAX)
        self._defer(taken)
        if len(taken.content) > frames.FRAME_RANGES_MAX:  # What was written left holes.
            taken.content, rest = ranges.take(taken.content, limit, frames.FRAME_RANGES_MAX)
            queue.put_back(msgspec.structs.replace(taken, content=rest))
        return taken if len(taken.content) else None

    def _forget(self, piece: Piece) -> None:
        """Nobody knows with which content these pages go, or went."""
        if self._known is not None:
            self._known.sent(piece.region, piece.content, None)

    def _count(self, piece: Piece) -> None:
        """A piece goes out."""
        count = _guest_bytes(piece)
        self.left_bytes -= count
        pages = count // PAGE_SIZE_BYTES
        if piece.kind is FrameKind.PAGES:
            self.pages += pages
            self.payload_bytes += count
        else:
            self.zero_pages += pages

    def _pack_ahead(self, plan: Plan) -> None:
        """Keep the packing threads busy with what comes next. Huge pages are left as they are."""
        while self._packer.room:
            queue = self._sorted.soft
            if not queue and (self._sorted.full or not (self._next_packable or self._todo)):
                queue = self._sorted.hard
            if not queue:
                return
            piece = self._take(queue, plan.frame_bytes)
            if piece is not None:
                self._packer.put(piece, self._regions[piece.region], plan)

    def _packable(self, piece: Piece) -> bool:
        can_sendfile = self._regions[piece.region].can_sendfile
        return piece.kind is FrameKind.PAGES and not piece.through_file and can_sendfile

    def _send_packed(self, waiter: Waiter) -> bool:
        """What is packed, if it is in time. False: the link would run dry, and plain pages go."""
        spare_s = self._stream.in_hand_s - _IN_HAND_S_MIN
        taken = self._packer.take(min(_PACKED_WAIT_S, spare_s))
        if taken is None:
            if spare_s > _PACKED_WAIT_S:
                return True
            for piece in self._packer.take_back(1) if not (self._ready or self._sorted) else ():
                self._ready.put(piece)
            return False
        piece, packed = taken
        zeroes = msgspec.structs.replace(piece, content=packed.zeroes, kind=FrameKind.ZERO)
        pages = msgspec.structs.replace(piece, content=packed.content)
        region = self._regions[piece.region]
        self.left_bytes -= ranges.byte_count(packed.same)
        self.same_pages += ranges.page_count(packed.same, PAGE_SIZE_BYTES)
        if len(pages.content):
            self._count(pages)
            if packed.codec is not None:
                self.packed_bytes[packed.codec.name] += ranges.byte_count(pages.content)
            if self._known is not None:
                self._known.sent(piece.region, pages.content, packed.digests)
            try:
                self._stream.send_copy(pages, packed.payload, packed.codec, waiter)
            except BaseException:
                self._ready.put(zeroes)
                raise
        if len(zeroes.content):
            self._count(zeroes)
            self._forget(zeroes)
            self._stream.send(zeroes, region, waiter)
        return True

    def _prepare(self, waiter: Waiter) -> None:
        """Move a batch from todo to ready: zero pages apart, the rest announced if it is cold."""
        region = self._regions[self._todo.head.region]
        batch_bytes = frames.PAYLOAD_BYTES_CAP
        if self._todo.head.kind is FrameKind.PAGES:
            batch_bytes = max(_BATCH_BYTES, region.page_size_bytes)
        piece = self._todo.take(batch_bytes)
        self._defer(piece)
        if self._zero_filter is not None and piece.kind is FrameKind.PAGES and region.can_sendfile:
            piece.content, zeroes = self._zero_filter.split(region.words, piece.content)
            self._ready.put(Piece(piece.region, zeroes, FrameKind.ZERO))
        content = piece.content
        self._ready.put(piece)  # First: announcing may break the stream.
        if piece.cold and ranges.byte_count(content) >= _EXPECT_BYTES_MIN:
            self._stream.expect(region, content, waiter)

    def _defer(self, piece: Piece) -> None:
        """Take out of a piece what the guest has written meanwhile."""
        if self._written is None or piece.kind is not FrameKind.PAGES:
            return
        written = self._written(piece.region, piece.content)
        if len(written):
            piece.content = ranges.subtract(piece.content, written)
            self.deferred.append((piece.region, written))
            self.left_bytes -= ranges.byte_count(written)


def delivered(number: int, kind: PassKind, deliveries: Sequence[Delivery]) -> PassReport:
    """What they did together; time, bytes and what is pending are the caller's."""
    packed_bytes = sum((delivery.packed_bytes for delivery in deliveries), collections.Counter())
    return PassReport(
        number=number,
        kind=kind,
        seconds=0.0,
        bytes_sent=0,
        pages=sum(delivery.pages for delivery in deliveries),
        zero_pages=sum(delivery.zero_pages for delivery in deliveries),
        payload_bytes=sum(delivery.payload_bytes for delivery in deliveries),
        compressors=tuple(name for name, _ in packed_bytes.most_common()),
        same_pages=sum(delivery.same_pages for delivery in deliveries),
        cut_pages=sum(delivery.cut_pages for delivery in deliveries),
        deferred_pages=sum(
            ranges.page_count(content, PAGE_SIZE_BYTES)
            for delivery in deliveries
            for _, content in delivery.deferred
        ),
    )


def _guest_bytes(piece: Piece) -> int:
    """What a piece counts for: a hole isn't memory."""
    return 0 if piece.hole else ranges.byte_count(piece.content)
