"""decide(): it always ends, judges no single pass, and keeps to the limits."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.model import PAGE_SIZE_BYTES, MigrationMode, PassKind, PassReport
from migrator.policy import (
    FIXED_BLACKOUT_MS,
    FLOOR_PAGES,
    MAX_ITERATIONS,
    TELLINGS_MAX,
    Decision,
    DecisionKind,
    decide,
    page_streams,
    predicted_blackout_ms,
    tells_again,
    throughput,
)

_PAGES_PER_S = 25_000.0
"""About 100 MB/s."""


def _pass(number: int, pages: int, pending: int, seconds: float) -> PassReport:
    return PassReport(
        number=number,
        kind=PassKind.FIRST if number == 1 else PassKind.DIRTY,
        seconds=seconds,
        pages=pages,
        bytes_sent=pages * PAGE_SIZE_BYTES,
        pending_pages=pending,
    )


def _migrate(
    pages: int, dirty_pages_per_s: Callable[[int], float], limit_ms: int
) -> tuple[Decision, list[PassReport]]:
    """Pre-copy of a guest of `pages`, with the dirty rate of each iteration; its last decision."""
    passes: list[PassReport] = []
    todo = pages
    while True:
        number = len(passes) + 1
        seconds = max(todo / _PAGES_PER_S, 0.0005)
        pending = min(int(dirty_pages_per_s(number) * seconds), pages)
        passes.append(_pass(number, todo, pending, seconds))
        decision = decide(passes, limit_ms)
        if decision.kind is not DecisionKind.ITERATE:
            return decision, passes
        todo = pending


_reports = st.lists(
    st.tuples(
        st.integers(0, 1 << 24),
        st.integers(0, 1 << 24),
        st.floats(0.0, 1e4, allow_nan=False),
    ),
    min_size=1,
    max_size=MAX_ITERATIONS,
).map(lambda rows: [_pass(i + 1, sent, left, s) for i, (sent, left, s) in enumerate(rows)])


@given(passes=_reports, limit_ms=st.integers(1, 60_000))
def test_every_figure_leads_to_a_valid_decision(passes: list[PassReport], limit_ms: int) -> None:
    decision = decide(passes, limit_ms)
    assert decision.kind is not DecisionKind.INVALID
    assert decision.reason
    assert decision.predicted_blackout_ms >= FIXED_BLACKOUT_MS


@given(
    rates=st.lists(st.floats(0.0, 1e6), min_size=MAX_ITERATIONS, max_size=MAX_ITERATIONS),
    pages=st.integers(1, 1 << 22),
    limit_ms=st.integers(1, 60_000),
)
def test_it_ends_within_the_most_iterations(rates: list[float], pages: int, limit_ms: int) -> None:
    decision, passes = _migrate(pages, lambda number: rates[number - 1], limit_ms)
    assert len(passes) <= MAX_ITERATIONS
    assert decision.kind in (DecisionKind.SWITCH_OVER, DecisionKind.GIVE_UP)


@given(passes=_reports, limit_ms=st.integers(1, 60_000))
def test_a_switchover_respects_the_limit(passes: list[PassReport], limit_ms: int) -> None:
    """The pages get the limit less the fixed cost; of a limit below that, half."""
    decision = decide(passes, limit_ms)
    budget_ms = max(limit_ms - FIXED_BLACKOUT_MS, limit_ms / 2)
    pages_ms = decision.predicted_blackout_ms - FIXED_BLACKOUT_MS
    if decision.kind is DecisionKind.SWITCH_OVER:
        assert pages_ms <= budget_ms * (1 + 1e-9)
    if decision.kind is DecisionKind.GIVE_UP:
        assert pages_ms > budget_ms * (1 - 1e-9)


@given(share=st.floats(0.0, 0.8), pages=st.integers(1 << 14, 1 << 22))
def test_what_is_dirtied_slower_than_sent_converges(share: float, pages: int) -> None:
    decision, _ = _migrate(pages, lambda number: share * _PAGES_PER_S, 300)
    assert decision.kind is DecisionKind.SWITCH_OVER


@pytest.mark.parametrize("high", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("period", [2, 3])
def test_an_oscillating_dirty_rate_is_not_taken_for_divergence(high: float, period: int) -> None:
    """Bursts above the link's rate every few passes; in between the guest is nearly idle."""

    def rate(number: int) -> float:
        return (high if number % period == 0 else 0.05) * _PAGES_PER_S

    decision, passes = _migrate(1 << 18, rate, 50)
    assert decision.kind is DecisionKind.SWITCH_OVER
    assert len(passes) > 1


def test_a_guest_faster_than_the_link_is_given_up_on_with_the_figures() -> None:
    decision, passes = _migrate(1 << 18, lambda number: 3 * _PAGES_PER_S, 50)
    assert decision.kind is DecisionKind.GIVE_UP
    assert len(passes) < MAX_ITERATIONS
    for figure in ("MB/s", "limit is 50 ms", "iterations"):
        assert figure in decision.reason


def test_an_idle_guest_needs_one_pass() -> None:
    decision, passes = _migrate(1 << 18, lambda number: 0.0, 50)
    assert decision.kind is DecisionKind.SWITCH_OVER
    assert len(passes) == 1


def test_the_floor_is_not_iterated_on() -> None:
    last = _pass(2, 1000, FLOOR_PAGES, 0.04)
    assert decide([_pass(1, 10**6, 1000, 40.0), last], 50).kind is DecisionKind.SWITCH_OVER


def test_the_prediction_is_pages_over_throughput_plus_the_fixed_cost() -> None:
    passes = [_pass(1, 25_000, 250, 1.0)]
    assert throughput(passes) == 25_000 * PAGE_SIZE_BYTES
    predicted = predicted_blackout_ms(250 * PAGE_SIZE_BYTES, throughput(passes))
    assert predicted == pytest.approx(FIXED_BLACKOUT_MS + 10.0)


@pytest.mark.parametrize(
    ("cores", "link", "plain", "tls"),
    [
        (1, None, 1, 1),
        (2, None, 1, 2),
        (2, 0.12e9, 1, 1),
        (16, 1.2e9, 1, 2),
        (16, 12e9, 8, 8),
        (64, None, 8, 8),
    ],
)
def test_as_many_streams_as_fill_the_link_and_the_cores_feed(
    cores: int, link: float | None, plain: int, tls: int
) -> None:
    assert page_streams(cores, link, tls=False) == plain
    assert page_streams(cores, link, tls=True) == tls


def test_a_cap_holds_back_the_passes_and_not_the_last_pages() -> None:
    """40 MB pending: 4 s at the cap's rate, 40 ms at what the link was measured to carry."""
    passes = [_pass(1, 20_000, 9766, 8.192)]
    slow = decide(passes, 50)
    assert slow.predicted_blackout_ms > 3000.0
    fast = decide(passes, 50, link_bytes_per_s=1e9)
    assert fast.predicted_blackout_ms == pytest.approx(8 + 40, rel=0.05)
    assert fast.throughput_bytes_per_s == slow.throughput_bytes_per_s


def test_what_a_pass_left_for_later_says_nothing_of_how_fast_the_guest_writes() -> None:
    """0.6 and 0.4 of what the link carries, whether it leaves out what was written already."""
    for deferred in (0, 25_000):
        first = msgspec.structs.replace(_pass(1, 50_000, 30_000, 2.0), deferred_pages=deferred)
        assert decide([first], 50, MigrationMode.HYBRID).kind is DecisionKind.POST_COPY
        slower = msgspec.structs.replace(first, pending_pages=20_000)
        assert decide([slower], 50, MigrationMode.HYBRID).kind is DecisionKind.ITERATE


def test_a_pass_that_was_compressed_had_to_send_what_it_was_of_the_guests_memory() -> None:
    first = msgspec.structs.replace(
        _pass(1, 50_000, 20_000, 2.0), bytes_sent=25_000 * PAGE_SIZE_BYTES
    )
    assert decide([first], 50, MigrationMode.HYBRID).kind is DecisionKind.POST_COPY
    packed = msgspec.structs.replace(first, payload_bytes=50_000 * PAGE_SIZE_BYTES)
    assert decide([packed], 50, MigrationMode.HYBRID).kind is DecisionKind.ITERATE


def _packed_pass(number: int, payload_pages: int, pending: int, share: float) -> PassReport:
    """At 100 MB/s on the wire, of pages of which `share` is left."""
    sent = int(share * payload_pages) * PAGE_SIZE_BYTES
    return msgspec.structs.replace(
        _pass(number, payload_pages, pending, share * payload_pages / _PAGES_PER_S),
        bytes_sent=sent,
        payload_bytes=payload_pages * PAGE_SIZE_BYTES,
        compressors=("zstd-1",),
        pending_packed_share=share,
    )


def test_what_packing_has_saved_hybrid_spends_on_iterations() -> None:
    """A guest of 100,000 pages: 4 s plain, 1.2 packed. It writes 0.6 of what a pass sends."""
    passes = [_packed_pass(1, 100_000, 60_000, 0.3)]
    decision = decide(passes, 50, MigrationMode.HYBRID)
    assert decision.kind is DecisionKind.ITERATE
    assert "time that packing has saved" in decision.reason
    for share in (None, 1.0):  # What it has rewritten can't be packed, or isn't known.
        noise = msgspec.structs.replace(passes[0], pending_packed_share=share)
        assert decide([noise], 50, MigrationMode.HYBRID).kind is DecisionKind.POST_COPY
    mixed = msgspec.structs.replace(passes[0], pending_pages=60_000, pending_packed_share=0.97)
    assert decide([mixed], 50, MigrationMode.HYBRID).kind is DecisionKind.POST_COPY
    faster = msgspec.structs.replace(passes[0], pending_pages=80_000)
    assert decide([faster], 50, MigrationMode.HYBRID).kind is DecisionKind.POST_COPY


def test_hybrid_with_packed_pages_ends_within_the_time_of_plain_ones() -> None:
    for share in (0.2, 0.3, 0.5, 0.7, 0.9):
        for leaves in (0.55, 0.65, 0.74):
            passes = [_packed_pass(1, 100_000, int(100_000 * leaves), share)]
            while decide(passes, 50, MigrationMode.HYBRID).kind is DecisionKind.ITERATE:
                todo = passes[-1].pending_pages
                passes.append(_packed_pass(len(passes) + 1, todo, int(todo * leaves), share))
            rest_s = share * passes[-1].pending_pages / _PAGES_PER_S
            assert sum(each.seconds for each in passes) + rest_s <= 4.0 or len(passes) == 1


def test_what_was_dirtied_before_a_pass_is_not_held_against_it() -> None:
    """200 pages a second: 50 for the pass after leave that took 15 s, in which 3,000 came."""
    passes = [
        _pass(1, 50_000, 400, 2.0),
        _pass(2, 400, 60, 0.016),
        _pass(3, 60, 50, 0.003),
        msgspec.structs.replace(_pass(4, 50, 3_000, 0.002), dirtied_s=15.002),
    ]
    late = decide(passes, 50, MigrationMode.HYBRID)
    assert late.kind is DecisionKind.ITERATE
    assert late.dirty_rate_bytes_per_s == pytest.approx(200 * PAGE_SIZE_BYTES, rel=0.01)
    for mode in (MigrationMode.HYBRID, MigrationMode.PRECOPY):
        after = [*passes, _pass(5, 3_000, 1_000, 0.12)]
        assert decide(after, 50, mode).kind is DecisionKind.ITERATE
    unknown = msgspec.structs.replace(passes[-1], dirtied_s=0.0)  # An older engine's.
    assert decide([*passes[:-1], unknown], 50, MigrationMode.HYBRID).kind is DecisionKind.POST_COPY


def test_a_guest_that_writes_too_fast_is_not_excused_by_a_wait() -> None:
    first = _pass(1, 50_000, 40_000, 2.0)
    waited = msgspec.structs.replace(_pass(2, 40_000, 50_000, 1.6), dirtied_s=4.0)
    assert decide([first, waited], 50, MigrationMode.HYBRID).kind is DecisionKind.ITERATE
    again = _pass(3, 50_000, 40_000, 2.0)
    assert decide([first, waited, again], 50, MigrationMode.HYBRID).kind is DecisionKind.POST_COPY


def test_telling_ends_though_the_guest_goes_on_writing() -> None:
    passes: list[PassReport] = []
    while not passes or tells_again(passes):
        passes.append(
            PassReport(
                number=len(passes) + 1,
                kind=PassKind.STALE,
                seconds=0.1,
                pages=1_000_000,
                bytes_sent=1_000,
                pending_pages=499_999,
            )
        )
    assert len(passes) == TELLINGS_MAX
