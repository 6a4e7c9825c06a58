"""What a migration will cost, before it is begun: a pure function of measured figures.

The prediction plays the migration: each iteration sends what is pending at the speed of the link,
and meanwhile the guest dirties as many pages as its dirty curve has for so many seconds. After
each iteration `policy.decide` is asked, as the session asks it. So prediction and migration can
differ in their figures, never in their reasoning. Pages that are made smaller take less of the
link: by how much is a figure, too (`PackedShares`); what goes while the guest stands still is too
little to be packed.

What follows from that, and is tested: where the number of iterations stays the same, a faster link
never takes longer and a guest that dirties more never needs fewer bytes. Where it changes that is
not so, because the policy itself isn't: a guest that dirties faster is switched over earlier, if
what is left fits into the downtime limit and a further iteration would not make it less.

    curve      bytes dirtied         ___________ what the guest's memory has at most
               within t          _.-'
                              .-'    beyond the last point: its last slope
                            /
                           0 ─────────────────────────► t
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Final

from migrator.figures import DirtyPoint, LinkOrigin, LinkSpeed, Prediction
from migrator.model import (
    PAGE_SIZE_BYTES,
    EngineKind,
    MigrationMode,
    MigrationRequest,
    OnTimeout,
    PassKind,
    PassReport,
)
from migrator.policy import (
    FIXED_BLACKOUT_MS,
    NOT_PACKED_SHARE,
    Decision,
    DecisionKind,
    decide,
    dirtied_s,
    throughput,
)
from migrator.ports import Struct

OVERHEAD_S: Final = 0.5
"""Setting up the destination and cleaning up, where no migration has shown it: as measured with
small guests on one machine (ARCHITECTURE: "Predictions")."""
PASS_OVERHEAD_S: Final = 0.002
"""Of each iteration: scan, acknowledgement, decision."""
PACKED_LINK_BYTES_PER_S: Final = 400e6
"""On a faster link pages aren't packed: one core isn't so much faster (`packing_policy`)."""
_PACK_BYTES_PER_S: Final = 0.5e9
"""Of guest memory: what one core packs by LZ4, copying included (`codecs.LADDER`)."""
_PACKED_TOLD_BYTES: Final = 4 * 1024 * 1024
"""Of pages in iterations: fewer don't tell how small a guest's become."""
_LEAST_SHARE: Final = 0.01
"""Of pages of zeros nothing is left, but for their frames."""
_PAGE_HEADER_BYTES: Final = 8
"""What the stream adds to a page, at most (a range's header, for a scattered page)."""


class PackedShares(Struct, frozen=True, kw_only=True):
    """What is left on the wire of a byte that the page engine sends."""

    memory: float = 1.0
    """Of the memory in use but its pages of zeros."""
    dirtied: float = 1.0
    """Of what the guest dirties meanwhile."""


PLAIN: Final = PackedShares()
"""Nothing is packed."""


class Figures(Struct, frozen=True, kw_only=True):
    """What a prediction is made from."""

    memory_in_use_bytes: int
    curve: tuple[DirtyPoint, ...]
    """By growing seconds; empty: the guest doesn't write."""
    link: LinkSpeed
    zero_share: float = 0.0
    """Of the memory in use: pages of zeros, which cost next to nothing."""
    packed: PackedShares = PLAIN
    """Where the page engine packs at all."""
    dirty_rate_origin: str = ""


def dirtied_bytes(curve: Sequence[DirtyPoint], seconds: float, limit_bytes: int) -> int:
    """What a guest dirties within `seconds`: never less in more time, at most `limit_bytes`."""
    before = DirtyPoint(seconds=0.0, bytes=0)
    slope = 0.0
    for point in curve:
        if point.seconds > before.seconds:
            slope = max(0.0, (point.bytes - before.bytes) / (point.seconds - before.seconds))
            if seconds <= point.seconds:
                break
            before = DirtyPoint(seconds=point.seconds, bytes=max(before.bytes, point.bytes))
    found = before.bytes + slope * max(0.0, seconds - before.seconds)
    pages = int(min(found, limit_bytes)) // PAGE_SIZE_BYTES
    return pages * PAGE_SIZE_BYTES


def speed(link: LinkSpeed, bandwidth_bytes_per_s: int | None) -> float:
    """Bytes a second: the link's, or the cap's where that is lower."""
    return min(link.bytes_per_s, bandwidth_bytes_per_s or link.bytes_per_s)


def predict(figures: Figures, request: MigrationRequest) -> Prediction:
    """How a migration of a guest with these figures will go: a pre-copy, and, in hybrid mode, the
    post-copy that ends one which doesn't converge. One that is asked to be all post-copy is
    predicted as if it were hybrid: no worse than that.
    """
    memory_bytes = figures.memory_in_use_bytes
    content_bytes = int(memory_bytes * (1.0 - figures.zero_share))
    rate = max(1.0, speed(figures.link, request.bandwidth_bytes_per_s))
    plain = request.engine is EngineKind.NATIVE or rate > PACKED_LINK_BYTES_PER_S
    packed = PLAIN if plain else figures.packed

    def dirtied(seconds: float) -> int:
        return dirtied_bytes(figures.curve, seconds, memory_bytes)

    link = figures.link
    uncapped = link.uncapped_bytes_per_s
    passes, decision, in_time = _play(content_bytes, rate, packed, dirtied, request, uncapped)
    overhead_s = OVERHEAD_S if link.overhead_s is None else link.overhead_s
    fixed_ms = FIXED_BLACKOUT_MS if link.fixed_blackout_ms is None else link.fixed_blackout_ms
    last_bytes = decision.pending_bytes
    last_wire_bytes = _wire_bytes(last_bytes)
    # The last pages go without the cap: the guest stands still.
    blackout_ms = fixed_ms + 1e3 * last_wire_bytes / max(1.0, link.bytes_per_s)
    converges = in_time and decision.kind is DecisionKind.SWITCH_OVER
    post_copy = not converges and request.mode is not MigrationMode.PRECOPY
    # A request that forces switches over all the same: once the iteration under way has ended.
    switches = converges or post_copy or request.on_timeout is OnTimeout.FORCE
    sent = sum(each.bytes_sent for each in passes)
    seconds = sum(each.seconds for each in passes)
    if post_copy:  # Within the cap, but for what the guest waits for.
        blackout_ms = fixed_ms
        last_wire_bytes = _wire_bytes(last_bytes, packed.dirtied)
        seconds += last_wire_bytes / rate
    elif not in_time and not switches:
        seconds = request.timeout_s
        sent = min(sent, int(rate * seconds))
    return Prediction(
        converges=converges,
        reason=decision.reason if in_time else f"not done within {request.timeout_s:g} s",
        iterations=len(passes) + (1 if switches else 0),
        bytes_sent=sent + (last_wire_bytes if switches else 0),
        total_s=overhead_s + seconds + (blackout_ms / 1e3 if switches else 0.0),
        blackout_ms=blackout_ms,
        memory_in_use_bytes=memory_bytes,
        zero_share=figures.zero_share,
        packed_share=packed.memory,
        dirtied_packed_share=packed.dirtied,
        dirty_rate_bytes_per_s=dirtied(passes[0].seconds) / passes[0].seconds,
        dirty_rate_origin=figures.dirty_rate_origin,
        link=link,
        post_copy=post_copy,
    )


def _play(
    content_bytes: int,
    rate: float,
    packed: PackedShares,
    dirtied: Callable[[float], int],
    request: MigrationRequest,
    link_bytes_per_s: float | None,
) -> tuple[list[PassReport], Decision, bool]:
    """The iterations, the decision after the last, and whether the request's time sufficed.

    Bounded: `decide` ends every pre-copy within `policy.MAX_ITERATIONS`.
    """
    passes: list[PassReport] = []
    pending_bytes = content_bytes
    alone = request.mode is MigrationMode.PRECOPY
    mode = MigrationMode.PRECOPY if alone else MigrationMode.HYBRID
    for number in itertools.count(1):
        share = max(packed.memory if number == 1 else packed.dirtied, _LEAST_SHARE)
        wire_bytes, cut_bytes = _wire_bytes(pending_bytes, share), 0
        # What one core can't pack goes plain.
        most_bytes_per_s = rate + _PACK_BYTES_PER_S * (1.0 - share)
        seconds = max(wire_bytes / rate, pending_bytes / most_bytes_per_s) + PASS_OVERHEAD_S
        late_s = sum(each.seconds for each in passes) + seconds - request.timeout_s
        if late_s > 0.0 and mode is MigrationMode.HYBRID:
            # It is ended early, and what it has not sent follows the guest.
            seconds -= late_s
            wire_bytes = int(wire_bytes * seconds / (seconds + late_s))
            cut_bytes = max(pending_bytes - int(wire_bytes / share), 0)
        most_bytes = max(content_bytes, pending_bytes)
        payload_bytes = pending_bytes - cut_bytes
        pending_bytes = dirtied(seconds)
        if cut_bytes:
            pending_bytes = min(pending_bytes + cut_bytes, most_bytes)
        passes.append(
            PassReport(
                number=number,
                kind=PassKind.FIRST if number == 1 else PassKind.DIRTY,
                seconds=seconds,
                pages=payload_bytes // PAGE_SIZE_BYTES,
                bytes_sent=wire_bytes,
                payload_bytes=payload_bytes,
                pending_pages=pending_bytes // PAGE_SIZE_BYTES,
                cut_pages=cut_bytes // PAGE_SIZE_BYTES,
                pending_packed_share=packed.dirtied if share < NOT_PACKED_SHARE else None,
            )
        )
        decision = decide(passes, request.downtime_limit_ms, mode, link_bytes_per_s)
        in_time = not cut_bytes and sum(each.seconds for each in passes) <= request.timeout_s
        if decision.kind is not DecisionKind.ITERATE or not in_time:
            return passes, decision, in_time
    raise AssertionError("unreachable")


def _wire_bytes(content_bytes: int, packed_share: float = 1.0) -> int:
    headers_bytes = content_bytes // PAGE_SIZE_BYTES * _PAGE_HEADER_BYTES
    return int(packed_share * content_bytes) + headers_bytes


def curve_of_passes(passes: Sequence[PassReport]) -> tuple[DirtyPoint, ...]:
    """The dirty curve that a migration's iterations have shown: each is one point of it."""
    points: list[DirtyPoint] = []
    running = [
        each
        for each in passes
        if each.kind is not PassKind.FINAL and each.seconds > 0.0 and not each.cut_pages
    ]
    for each in sorted(running, key=dirtied_s):
        found = each.pending_pages * PAGE_SIZE_BYTES
        most = points[-1].bytes if points else 0
        points.append(DirtyPoint(seconds=dirtied_s(each), bytes=max(most, found)))
    return tuple(points)


def zero_share_of_passes(passes: Sequence[PassReport]) -> float:
    """The share of pages of zeros in a migration's first iteration. 0.0 where there was none."""
    for each in passes:
        found = each.pages + each.zero_pages
        if each.kind is PassKind.FIRST and found:
            return each.zero_pages / found
    return 0.0


def packed_shares_of_passes(passes: Sequence[PassReport]) -> PackedShares | None:
    """What a migration's iterations left of a byte; None: they sent too little to tell, or so fast
    that little would have been packed in any case.
    """
    first = [each for each in passes if each.kind is PassKind.FIRST]
    dirty = [each for each in passes if each.kind is PassKind.DIRTY]
    memory = _packed_share(first) or _packed_share([*first, *dirty])
    if memory is None:
        return None
    sampled = [each.pending_packed_share for each in first if each.pending_packed_share is not None]
    dirtied = _packed_share(dirty) or next(iter(sampled), memory)
    return PackedShares(memory=memory, dirtied=dirtied)


def _packed_share(sending: Sequence[PassReport]) -> float | None:
    payload_bytes = sum(each.payload_bytes for each in sending)
    if payload_bytes < _PACKED_TOLD_BYTES or throughput(sending) > PACKED_LINK_BYTES_PER_S:
        return None
    if not any(each.compressors for each in sending):
        return 1.0
    return min(max(sum(each.bytes_sent for each in sending) / payload_bytes, 0.01), 1.0)


def after_first_pass(first: PassReport, request: MigrationRequest) -> Prediction:
    """The prediction of a migration of which nothing was known before its first iteration."""
    pages = first.pages + first.zero_pages + first.deferred_pages
    link = LinkSpeed(bytes_per_s=throughput([first]), origin=LinkOrigin.FIRST_PASS)
    figures = Figures(
        memory_in_use_bytes=pages * PAGE_SIZE_BYTES,
        curve=curve_of_passes([first]),
        link=link,
        zero_share=zero_share_of_passes([first]),
        packed=packed_shares_of_passes([first]) or PLAIN,
        dirty_rate_origin="this migration's first iteration",
    )
    return predict(figures, request)
