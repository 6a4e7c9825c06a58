"""When pre-copy has converged, when it goes on, and when it won't: pure functions of figures.

Let p be the bytes that are pending after a pass, r the measured throughput, and d the dirty rate
(pending bytes over the pass's duration). The blackout that a switchover now would cost is predicted
as p / r (r without a bandwidth cap, where it is known) plus a fixed cost for stopping, device
state and handoff. Another pass is worth
its time while it shrinks p; p shrinks geometrically by d / r, so it stops where d >= r.

Hybrid ends pre-copy sooner: as soon as a pass doesn't leave far less than it sent. Where pages are
packed it goes on for as long as the guest's memory would have taken unpacked (`_fits_saved_time`).

A guest's dirty rate oscillates, so one pass that didn't shrink is no verdict (other systems kill
migrations by such timers): the best of the last `WINDOW` passes is held against the best before.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Final

from migrator.model import PAGE_SIZE_BYTES, MigrationMode, PassKind, PassReport
from migrator.ports import Struct

FIXED_BLACKOUT_MS: Final = 8.0
"""Stop, device state and handoff without any page: the prototype's median."""
FLOOR_PAGES: Final = 64
"""Pending pages that no further pass can usefully shrink: they go in well under a millisecond."""
SHRINK_FACTOR: Final = 0.85
"""A pass that leaves more than this share of the best before it did not shrink."""
NOT_PACKED_SHARE: Final = 0.95
"""Pages of which more is left go as they are."""
WINDOW: Final = 3
WAITED_S: Final = 0.1
"""A shorter wait before a pass is of no account: as long an answer about leave may take."""
MAX_ITERATIONS: Final = 30
HYBRID_GAIN_SHARE: Final = 0.5
"""Hybrid: after a pass that leaves more than this share of what it sent the next doesn't pay."""
SAVED_TIME_SHARE: Final = 0.75
"""The same, where packing has saved time for it: three seconds for each that post-copy is shorter.
"""
STREAM_BYTES_PER_S: Final = 1.4e9
"""What one page stream carries into cold memory, plain (measured on a slow core)."""
TLS_STREAM_BYTES_PER_S: Final = 0.7e9
STREAMS_MAX: Final = 8
"""By default. More never were faster, and each has a thread on both sides."""
DEFAULT_THROUGHPUT_BYTES_PER_S: Final = 100e6
"""Assumed until a pass was measured: a 1 Gbit/s link less its overhead."""
TOLD: Final = frozenset({PassKind.STALE, PassKind.MISSING})
"""What these passes count isn't sent by them, but told as missing."""
TELL_FLOOR_PAGES: Final = 128
"""So few pages that the destination wasn't told of yet can be told in the blackout: each costs it
7 to 14 us, for it has to make a hole (docs/measurements.md)."""
TELL_SHARE: Final = 0.5
"""A telling that leaves more than this share of what it told won't be followed by a shorter one."""
TELLINGS_MAX: Final = 6


def page_streams(cores: int, link_bytes_per_s: float | None, *, tls: bool) -> int:
    """How many page streams to use: as many as fill the link, but no more than the cores feed.

    Plain, a stream takes two cores (the other is the guest's); encryption is a core's work at
    each end. `link_bytes_per_s` None: unknown.
    """
    by_cores = max(1, cores if tls else cores // 2)
    if link_bytes_per_s is not None:
        each = TLS_STREAM_BYTES_PER_S if tls else STREAM_BYTES_PER_S
        by_cores = min(by_cores, max(1, math.ceil(link_bytes_per_s / each)))
    return min(by_cores, STREAMS_MAX)


class DecisionKind(enum.Enum):
    INVALID = 0
    ITERATE = 1
    SWITCH_OVER = 2
    GIVE_UP = 3
    """It doesn't converge. The request says whether that means cancel or force."""
    POST_COPY = 4
    """Hybrid: another pass costs more than it gains."""


class Decision(Struct, frozen=True, kw_only=True):
    """What to do after a pass, with the figures that it was made from."""

    kind: DecisionKind
    reason: str
    pending_bytes: int
    throughput_bytes_per_s: float
    dirty_rate_bytes_per_s: float
    predicted_blackout_ms: float


def throughput(passes: Sequence[PassReport]) -> float:
    """Bytes a second of the passes so far, the larger ones weighing more.

    A pass of a few pages measures latency, not throughput, so the sum over all is taken; of one
    that only tells what is missing not even that.
    """
    sending = [each for each in passes if each.kind not in TOLD]
    seconds = sum(each.seconds for each in sending)
    sent = sum(each.bytes_sent for each in sending)
    if seconds <= 0.0 or sent <= 0:
        return DEFAULT_THROUGHPUT_BYTES_PER_S
    return sent / seconds


def dirtied_s(one: PassReport) -> float:
    """In which what a pass left was dirtied: it may have had to wait before it began."""
    return max(one.seconds, one.dirtied_s)


def dirty_rate(last: PassReport) -> float:
    """Bytes a second that the guest dirtied until the last pass's end; at least, if it was cut."""
    seconds = dirtied_s(last)
    if seconds <= 0.0:
        return 0.0
    return (last.pending_pages - last.cut_pages) * PAGE_SIZE_BYTES / seconds


def predicted_blackout_ms(pending_bytes: int, throughput_bytes_per_s: float) -> float:
    return FIXED_BLACKOUT_MS + 1000.0 * pending_bytes / throughput_bytes_per_s


def within_limit(blackout_ms: float, downtime_limit_ms: int) -> bool:
    """Whether a switchover that is predicted to cost `blackout_ms` may be made."""
    # The fixed cost is not the pages' fault: a limit below it is held against the pages alone.
    page_budget_ms = max(downtime_limit_ms - FIXED_BLACKOUT_MS, 0.5 * downtime_limit_ms)
    return blackout_ms - FIXED_BLACKOUT_MS <= page_budget_ms


def final_rate(passes: Sequence[PassReport], link_bytes_per_s: float | None) -> float:
    """Bytes a second of a final pass. No bandwidth cap holds it back, as it did the passes before:
    `link_bytes_per_s` is what the link was measured to carry without one, if that is known.
    """
    return max(throughput(passes), link_bytes_per_s or 0.0)


def decide(
    passes: Sequence[PassReport],
    downtime_limit_ms: int,
    mode: MigrationMode = MigrationMode.PRECOPY,
    link_bytes_per_s: float | None = None,
) -> Decision:
    """What to do after the last of `passes` (at least one). `link_bytes_per_s`: `final_rate`."""
    last = passes[-1]
    rate = throughput(passes)
    pending_bytes = last.pending_pages * PAGE_SIZE_BYTES
    blackout_ms = predicted_blackout_ms(pending_bytes, final_rate(passes, link_bytes_per_s))
    fits = within_limit(blackout_ms, downtime_limit_ms)

    def decision(kind: DecisionKind, reason: str) -> Decision:
        return Decision(
            kind=kind,
            reason=reason,
            pending_bytes=pending_bytes,
            throughput_bytes_per_s=rate,
            dirty_rate_bytes_per_s=dirty_rate(last),
            predicted_blackout_ms=blackout_ms,
        )

    if last.pending_pages <= FLOOR_PAGES and fits:
        return decision(DecisionKind.SWITCH_OVER, f"{last.pending_pages} pages left")
    saved_time = ""
    if mode is MigrationMode.HYBRID and not fits and not _pays(last):
        if not _fits_saved_time(passes, rate):
            return decision(
                DecisionKind.POST_COPY,
                f"{pending_bytes / 1e6:.1f} MB are left of {_went_bytes(last) / 1e6:.1f} MB sent: "
                "another iteration doesn't pay (the guest dirties "
                f"{dirty_rate(last) / 1e6:.1f} MB/s, the link carries {rate / 1e6:.1f} MB/s)",
            )
        saved_time = ", in time that packing has saved"
    shrinks = _shrinks(_since_wait(passes), window=1 if fits else WINDOW)
    if len(passes) >= MAX_ITERATIONS:
        shrinks = False
    if shrinks:
        return decision(
            DecisionKind.ITERATE, f"{last.pending_pages} pages left, and shrinking{saved_time}"
        )
    if fits:
        return decision(
            DecisionKind.SWITCH_OVER,
            f"{last.pending_pages} pages left, within {downtime_limit_ms} ms",
        )
    return decision(
        DecisionKind.POST_COPY if mode is MigrationMode.HYBRID else DecisionKind.GIVE_UP,
        f"after {len(passes)} iterations {pending_bytes / 1e6:.1f} MB are left and don't shrink: "
        f"the guest dirties {dirty_rate(last) / 1e6:.1f} MB/s, the link carries "
        f"{rate / 1e6:.1f} MB/s; the blackout would be {blackout_ms:.0f} ms, "
        f"the limit is {downtime_limit_ms} ms",
    )


def tells_again(passes: Sequence[PassReport]) -> bool:
    """Post-copy, after a pass that told what is missing: whether to tell again before the pause.

    What the guest writes for the first time while it is told of the rest would be told in the
    blackout. It is little where telling took little, so another round has far less to tell.
    """
    last = passes[-1]
    rounds = sum(each.kind is PassKind.STALE for each in passes)
    few = last.pending_pages <= TELL_FLOOR_PAGES
    return rounds < TELLINGS_MAX and not few and last.pending_pages <= TELL_SHARE * last.pages


def _pays(last: PassReport) -> bool:
    """Whether the next pass would leave clearly less than it has to send.

    By how much was written while this one sent what it did, and not while it waited to begin. What
    it left out, because the guest had written it already, took none of its time: a guest that
    writes twice as fast as the link carries would seem to write slower the more is left out.
    """
    seconds = dirtied_s(last)
    meanwhile_bytes = last.pending_pages * PAGE_SIZE_BYTES
    if seconds > 0.0:
        meanwhile_bytes = int(meanwhile_bytes * last.seconds / seconds)
    return meanwhile_bytes <= HYBRID_GAIN_SHARE * _went_bytes(last)


def _went_bytes(one: PassReport) -> int:
    """Of guest memory. Packed, it is fewer on the wire; where nothing is known of that, as many."""
    return max(one.bytes_sent, one.payload_bytes)


def _fits_saved_time(passes: Sequence[PassReport], rate: float) -> bool:
    """Whether another pass, and the post-copy after it, end before the guest's memory would have
    crossed the link once without being packed; and whether it leaves less than is pending now.

    So what packing saves is spent on the guest: what follows it is less, and it waits for less. Of
    pages that can't be packed nothing was saved, and each further pass would only take longer.
    """
    last = passes[-1]
    share = last.pending_packed_share
    if share is None or share >= NOT_PACKED_SHARE:
        return False
    pending_bytes = last.pending_pages * PAGE_SIZE_BYTES
    pass_s = share * pending_bytes / rate
    left_bytes = dirty_rate(last) * pass_s
    spent_s = sum(each.seconds for each in passes)
    plain_s = (_went_bytes(passes[0]) + passes[0].deferred_pages * PAGE_SIZE_BYTES) / rate
    shrinks = left_bytes <= SAVED_TIME_SHARE * pending_bytes
    return shrinks and spent_s + pass_s + share * left_bytes / rate <= plain_s


def _since_wait(passes: Sequence[PassReport]) -> Sequence[PassReport]:
    """From the last pass on of which most of what it left was dirtied while none ran, as leave was
    waited for, say: what converged before that has to converge again.
    """
    for at in range(len(passes) - 1, 0, -1):
        if passes[at].dirtied_s > 2.0 * passes[at].seconds + WAITED_S:
            return passes[at:]
    return passes


def _shrinks(passes: Sequence[PassReport], window: int) -> bool:
    """Whether the best of the last `window` passes beats the best before by SHRINK_FACTOR."""
    if len(passes) <= window:
        return True
    recent = min(each.pending_pages for each in passes[-window:])
    before = min(each.pending_pages for each in passes[:-window])
    return recent < before * SHRINK_FACTOR
