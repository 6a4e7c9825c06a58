"""Predictions: against a loop of their own around the policy, and their order under change."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from migrator.engine.codecs import LADDER
from migrator.engine.packing_policy import PackingPolicy
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
from migrator.policy import MAX_ITERATIONS, DecisionKind, decide
from migrator.prediction import (
    PACKED_LINK_BYTES_PER_S,
    PASS_OVERHEAD_S,
    PLAIN,
    Figures,
    PackedShares,
    after_first_pass,
    curve_of_passes,
    dirtied_bytes,
    packed_shares_of_passes,
    predict,
    zero_share_of_passes,
)

MIB = 1024**2
MEMORY = st.integers(min_value=PAGE_SIZE_BYTES, max_value=64 * 1024 * MIB)
LINK = st.floats(min_value=1e5, max_value=1e10)
RATE = st.floats(min_value=0.0, max_value=1e10)
LIMIT_MS = st.integers(min_value=1, max_value=5000)
CURVE = st.lists(
    st.tuples(st.floats(min_value=0.01, max_value=10.0), st.integers(0, 2**34)), max_size=6
)


def request(**changes: object) -> MigrationRequest:
    values: dict[str, object] = {
        "destination": "b",
        "timeout_s": 86_400.0,
        "mode": MigrationMode.PRECOPY,
    }
    return MigrationRequest(**(values | changes))  # type: ignore[arg-type]


def steady(rate: float) -> tuple[DirtyPoint, ...]:
    """A guest that writes to new pages all the time."""
    return (DirtyPoint(seconds=100.0, bytes=int(100.0 * rate)),)


def curve_of(raw: list[tuple[float, int]], factor: float = 1.0) -> tuple[DirtyPoint, ...]:
    found = 0
    points = []
    for seconds, count in sorted(raw):
        found = max(found, int(factor * count))
        points.append(DirtyPoint(seconds=seconds, bytes=found))
    return tuple(points)


def figures(memory: int, curve: tuple[DirtyPoint, ...], link: float) -> Figures:
    return Figures(
        memory_in_use_bytes=memory,
        curve=curve,
        link=LinkSpeed(bytes_per_s=link, origin=LinkOrigin.PROBE),
    )


def play(memory: int, dirty_rate: float, link: float, limit_ms: int) -> tuple[bool, int, float]:
    """The plainest pre-copy: whether it converges, the passes, and their seconds."""
    pending = float(memory)
    passes: list[PassReport] = []
    while True:
        seconds = pending / link + PASS_OVERHEAD_S
        sent, pending = pending, min(memory, dirty_rate * seconds)
        passes.append(
            PassReport(
                number=len(passes) + 1,
                kind=PassKind.DIRTY,
                seconds=seconds,
                pages=0,
                bytes_sent=int(sent),
                pending_pages=int(pending) // PAGE_SIZE_BYTES,
            )
        )
        decision = decide(passes, limit_ms)
        if decision.kind is not DecisionKind.ITERATE:
            converges = decision.kind is DecisionKind.SWITCH_OVER
            return converges, len(passes), sum(each.seconds for each in passes)


@pytest.mark.parametrize("memory_mib", [16, 200, 8192])
@pytest.mark.parametrize("link", [12.5e6, 1e8, 1e9])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 1.5])
@pytest.mark.parametrize("limit_ms", [10, 50, 300])
def test_it_agrees_with_a_plain_loop_around_the_policy(
    memory_mib: int, link: float, share: float, limit_ms: int
) -> None:
    memory = memory_mib * MIB
    converges, passes, seconds = play(memory, share * link, link, limit_ms)
    found = predict(
        figures(memory, steady(share * link), link), request(downtime_limit_ms=limit_ms)
    )
    assert found.converges is converges
    assert abs(found.iterations - (passes + converges)) <= 1
    assert found.total_s == pytest.approx(seconds, rel=0.1, abs=1.0)


@given(memory=MEMORY, rate=RATE, slower=LINK, faster=LINK, limit_ms=LIMIT_MS)
def test_a_faster_link_never_takes_longer(
    memory: int, rate: float, slower: float, faster: float, limit_ms: int
) -> None:
    slower, faster = sorted((slower, faster))
    one, other = (
        predict(figures(memory, steady(rate), link), request(downtime_limit_ms=limit_ms))
        for link in (slower, faster)
    )
    if _same_course(one, other):
        assert other.total_s <= one.total_s * (1 + 1e-9)
        assert other.bytes_sent <= one.bytes_sent


@given(memory=MEMORY, raw=CURVE, factor=st.floats(1.0, 100.0), link=LINK, limit_ms=LIMIT_MS)
def test_a_guest_that_dirties_more_never_needs_fewer_bytes(
    memory: int, raw: list[tuple[float, int]], factor: float, link: float, limit_ms: int
) -> None:
    wanted = request(downtime_limit_ms=limit_ms)
    less = predict(figures(memory, curve_of(raw), link), wanted)
    more = predict(figures(memory, curve_of(raw, factor), link), wanted)
    if _same_course(less, more):
        assert more.bytes_sent >= less.bytes_sent
        assert more.total_s >= less.total_s * (1 - 1e-9)
        assert more.blackout_ms >= less.blackout_ms


def _same_course(one: Prediction, other: Prediction) -> bool:
    """Also: neither was cut off by its time, in which a faster link sends more."""
    cut_off = any("not done within" in each.reason for each in (one, other))
    same = (one.iterations, one.converges) == (other.iterations, other.converges)
    return same and not cut_off


@given(memory=MEMORY, rate=RATE, slower=LINK, faster=LINK, limit_ms=LIMIT_MS)
def test_what_converges_over_a_slow_link_converges_over_a_fast_one(
    memory: int, rate: float, slower: float, faster: float, limit_ms: int
) -> None:
    slower, faster = sorted((slower, faster))
    assume(faster > 1.05 * slower)  # Rounding to pages decides between equals.
    wanted = request(downtime_limit_ms=limit_ms)
    if predict(figures(memory, steady(rate), slower), wanted).converges:
        assert predict(figures(memory, steady(rate), faster), wanted).converges


def test_the_policy_itself_is_why_the_course_must_be_the_same() -> None:
    """Dirtying a little faster: what fits is not made smaller any more, and fewer bytes go."""
    wanted = request(downtime_limit_ms=5000)
    calm, busy = (
        predict(figures(400 * MIB, steady(share * 1e8), 1e8), wanted) for share in (0.83, 0.87)
    )
    assert calm.iterations > busy.iterations
    assert calm.bytes_sent > busy.bytes_sent


@given(memory=MEMORY, raw=CURVE, link=LINK, limit_ms=LIMIT_MS, timeout_s=st.floats(0.001, 100.0))
def test_every_prediction_is_finite_and_bounded(
    memory: int, raw: list[tuple[float, int]], link: float, limit_ms: int, timeout_s: float
) -> None:
    wanted = request(downtime_limit_ms=limit_ms, timeout_s=timeout_s)
    found = predict(figures(memory, curve_of(raw), link), wanted)
    assert 1 <= found.iterations <= MAX_ITERATIONS + 1
    assert 0 <= found.bytes_sent <= (MAX_ITERATIONS + 1) * 1.01 * memory
    assert 0.0 < found.total_s < float("inf")
    assert found.reason


def test_a_cap_counts_for_the_iterations_and_not_for_the_blackout() -> None:
    free = predict(figures(100 * MIB, steady(1e6), 1e9), request())
    capped = predict(figures(100 * MIB, steady(1e6), 1e9), request(bandwidth_bytes_per_s=10**7))
    assert capped.total_s > 10.0 > free.total_s
    assert capped.blackout_ms < 12.0


def test_a_cap_doesnt_keep_what_the_link_would_carry_from_converging() -> None:
    """Each iteration leaves 5 MB: half a second of the cap, 5 ms of the link."""
    guest = (DirtyPoint(seconds=0.01, bytes=5_000_000), DirtyPoint(seconds=100.0, bytes=5_000_000))
    asked = request(bandwidth_bytes_per_s=10_000_000, downtime_limit_ms=50)
    found = predict(figures(50 * MIB, guest, 1e9), asked)
    assert found.converges
    assert found.blackout_ms < 20.0
    # An interface says what it could do, not what the way carries.
    claimed = LinkSpeed(bytes_per_s=1e9, origin=LinkOrigin.INTERFACE)
    unsure = Figures(memory_in_use_bytes=50 * MIB, curve=guest, link=claimed)
    assert not predict(unsure, asked).converges


def test_what_hybrid_leaves_follows_the_guest() -> None:
    """It writes 200 of its 400 MB all the time: they go twice, and what is left once more."""
    guest = (DirtyPoint(seconds=1.0, bytes=200 * 10**6), DirtyPoint(seconds=9.0, bytes=200 * 10**6))
    found = predict(figures(400 * 10**6, guest, 1e8), request(mode=MigrationMode.HYBRID))
    assert found.post_copy
    assert not found.converges
    assert found.bytes_sent == pytest.approx(800e6, rel=0.01)
    assert found.total_s == pytest.approx(8.5, rel=0.05)
    assert found.blackout_ms < 10.0
    quick = request(mode=MigrationMode.HYBRID, timeout_s=1.0)
    soon = predict(figures(400 * 10**6, guest, 1e8), quick)
    assert (soon.post_copy, soon.iterations) == (True, 2)
    assert 400e6 < soon.bytes_sent < 610e6, "100 MB before its time, and what is left then once"
    assert soon.total_s < 0.5 + 1.0 + 4.1
    calm = predict(figures(400 * 10**6, steady(0), 1e8), request(mode=MigrationMode.HYBRID))
    assert calm.converges
    assert not calm.post_copy


def test_the_requests_time_is_a_limit() -> None:
    found = predict(figures(1024 * MIB, steady(0), 1e7), request(timeout_s=5.0))
    assert not found.converges
    assert found.reason == "not done within 5 s"
    assert found.total_s == pytest.approx(5.0, abs=1.0)
    assert found.bytes_sent == 50_000_000
    forced = predict(
        figures(1024 * MIB, steady(0), 1e7), request(timeout_s=5.0, on_timeout=OnTimeout.FORCE)
    )
    assert not forced.converges
    assert forced.bytes_sent >= 1024 * MIB
    assert forced.total_s > 100.0


def test_zero_pages_cost_nothing_and_figures_of_the_link_win_over_defaults() -> None:
    known = LinkSpeed(
        bytes_per_s=1e8, origin=LinkOrigin.MIGRATIONS, overhead_s=0.1, fixed_blackout_ms=20.0
    )
    found = predict(
        Figures(memory_in_use_bytes=100_000_000, curve=(), link=known, zero_share=0.9), request()
    )
    assert found.bytes_sent == pytest.approx(10_000_000, rel=0.01)
    assert found.total_s == pytest.approx(0.1 + 0.1 + 0.02, abs=0.01)
    assert found.blackout_ms == 20.0


def packing(share: float, dirty_rate: float = 0.0) -> Figures:
    return msgspec.structs.replace(
        figures(400 * 10**6, steady(dirty_rate), 1e8),
        packed=PackedShares(memory=share, dirtied=share),
    )


def test_pages_that_are_packed_take_less_of_the_link() -> None:
    plain, packed = predict(packing(1.0), request()), predict(packing(0.5), request())
    assert packed.bytes_sent == pytest.approx(plain.bytes_sent / 2, rel=0.01)
    assert packed.total_s == pytest.approx(0.5 + 2.0, abs=0.1)
    assert (plain.packed_share, packed.packed_share) == (1.0, 0.5)
    native = predict(packing(0.5), request(engine=EngineKind.NATIVE))
    assert native == plain
    fast = msgspec.structs.replace(
        packing(0.5), link=LinkSpeed(bytes_per_s=1e9, origin=LinkOrigin.PROBE)
    )
    assert predict(fast, request()).packed_share == 1.0
    assert predict(fast, request(bandwidth_bytes_per_s=10**7)).packed_share == 0.5


def test_what_writes_faster_than_plain_pages_travel_converges_if_they_are_packed() -> None:
    hybrid = request(mode=MigrationMode.HYBRID)
    assert predict(packing(1.0, 80e6), hybrid).post_copy
    found = predict(packing(0.4, 80e6), hybrid)
    assert found.converges
    assert found.blackout_ms <= 8.0 + 50.0
    left = predict(packing(0.4, 400e6), hybrid)
    assert left.post_copy
    assert left.bytes_sent == pytest.approx(0.4 * 800e6, rel=0.01), "what is left is packed, too"


def test_what_the_guest_dirties_may_pack_worse_than_its_memory() -> None:
    noise = msgspec.structs.replace(
        packing(0.4, 80e6), packed=PackedShares(memory=0.4, dirtied=1.0)
    )
    found = predict(noise, request())
    assert (found.packed_share, found.dirtied_packed_share) == (0.4, 1.0)
    assert found.bytes_sent > predict(packing(0.4, 80e6), request()).bytes_sent
    first = PassReport(
        number=1,
        kind=PassKind.FIRST,
        seconds=1.6,
        pages=100_000,
        bytes_sent=160_000_000,
        payload_bytes=100_000 * PAGE_SIZE_BYTES,
        pending_pages=31_250,
        compressors=("zstd-1",),
        pending_packed_share=0.9,
    )
    sampled = packed_shares_of_passes([first])
    assert sampled is not None
    assert sampled.memory == pytest.approx(0.39, abs=0.01)
    assert sampled.dirtied == 0.9
    second = msgspec.structs.replace(
        first, number=2, kind=PassKind.DIRTY, pages=31_250, payload_bytes=128_000_000
    )
    shares = packed_shares_of_passes([first, msgspec.structs.replace(second, bytes_sent=10**8)])
    assert shares is not None
    assert shares.dirtied == pytest.approx(0.78, abs=0.01), "measured, and no sample's word"


def test_a_guest_that_clears_its_memory_is_predicted_too() -> None:
    """Of pages of zeros nothing is left: that divided by nothing where its time was over."""
    zeros = msgspec.structs.replace(
        packing(0.4, 80e6), packed=PackedShares(memory=0.4, dirtied=0.0)
    )
    for timeout_s in (0.5, 1.61, 1.7, 2.0, 30.0):
        found = predict(zeros, request(mode=MigrationMode.HYBRID, timeout_s=timeout_s))
        assert found.bytes_sent > 0


def test_noise_in_packable_memory_is_predicted_as_it_is_decided() -> None:
    """Three of five pages are left by each iteration, and packing would have time for more."""
    noise = msgspec.structs.replace(
        figures(400 * 10**6, steady(6e6), 1e7), packed=PackedShares(memory=0.25, dirtied=1.0)
    )
    assert predict(noise, request(mode=MigrationMode.HYBRID)).post_copy


def test_what_packs_well_travels_no_faster_than_a_core_packs() -> None:
    found = predict(packing(0.02, 700e6), request())
    assert not found.converges, "575 MB/s, of which the link carries 100"
    assert predict(packing(0.02), request()).total_s == pytest.approx(0.5 + 400 / 590, abs=0.05)


def test_a_link_too_fast_for_packing_is_the_policys() -> None:
    policy = PackingPolicy(lambda: 2.0)
    assert policy.could_pay(PACKED_LINK_BYTES_PER_S, LADDER)
    assert not policy.could_pay(1.1 * PACKED_LINK_BYTES_PER_S, LADDER)


def test_iterations_tell_how_small_pages_become() -> None:
    first = PassReport(
        number=1,
        kind=PassKind.FIRST,
        seconds=1.0,
        pages=24_000,
        bytes_sent=40_000_000,
        payload_bytes=24_000 * PAGE_SIZE_BYTES,
        compressors=("zstd-1",),
    )
    last = PassReport(number=2, kind=PassKind.FINAL, seconds=0.01, pages=9, bytes_sent=40_000)
    shares = packed_shares_of_passes([first, last])
    assert shares is not None
    assert shares.memory == shares.dirtied == pytest.approx(0.407, abs=0.001)
    plain = msgspec.structs.replace(first, compressors=(), bytes_sent=98_500_000)
    assert packed_shares_of_passes([plain, last]) == PLAIN
    fast = msgspec.structs.replace(plain, seconds=0.1)
    assert packed_shares_of_passes([fast, last]) is None, "nothing is packed that fast"
    assert packed_shares_of_passes([last]) is None
    found = after_first_pass(first, request())
    assert found.packed_share == shares.memory
    assert found.total_s == pytest.approx(0.5 + 1.0, abs=0.05), "as that pass has shown"


def test_what_was_dirtied_before_an_iteration_is_no_point_of_its_time() -> None:
    waited = PassReport(
        number=2,
        kind=PassKind.DIRTY,
        seconds=0.001,
        pages=49,
        bytes_sent=200_000,
        pending_pages=2_972,
        dirtied_s=15.0,
    )
    assert curve_of_passes([waited]) == (DirtyPoint(seconds=15.0, bytes=2_972 * PAGE_SIZE_BYTES),)


def test_post_copy_from_the_start_is_predicted_as_hybrid_is() -> None:
    figures_of_it = figures(400 * 10**6, steady(400e6), 1e8)
    found = predict(figures_of_it, request(mode=MigrationMode.POSTCOPY))
    assert found.post_copy
    assert found == predict(figures_of_it, request(mode=MigrationMode.HYBRID))


@given(raw=CURVE, first=st.floats(0, 50), second=st.floats(0, 50), limit=MEMORY)
def test_more_time_never_dirties_less(
    raw: list[tuple[float, int]], first: float, second: float, limit: int
) -> None:
    curve = curve_of(raw)
    shorter, longer = sorted((first, second))
    assert dirtied_bytes(curve, shorter, limit) <= dirtied_bytes(curve, longer, limit) <= limit


def test_the_curve_is_met_at_its_points_and_goes_on_with_its_last_slope() -> None:
    page = PAGE_SIZE_BYTES
    curve = (DirtyPoint(seconds=0.1, bytes=100 * page), DirtyPoint(seconds=1.0, bytes=190 * page))
    found = [dirtied_bytes(curve, at, 2**40) // page for at in (0.0, 0.05, 0.1, 0.55, 1.0, 2.0)]
    assert found == [0, 50, 100, 145, 190, 290]
    assert dirtied_bytes(curve, 1e9, 200 * page) == 200 * page
    assert dirtied_bytes((), 5.0, 2**40) == 0


def test_iterations_tell_a_curve_and_a_share_of_zeros() -> None:
    passes = [
        PassReport(
            number=1,
            kind=PassKind.FIRST,
            seconds=1.0,
            pages=300,
            bytes_sent=300 * PAGE_SIZE_BYTES,
            zero_pages=100,
            pending_pages=50,
        ),
        PassReport(
            number=2, kind=PassKind.DIRTY, seconds=0.1, pages=50, bytes_sent=1, pending_pages=9
        ),
        PassReport(number=3, kind=PassKind.FINAL, seconds=0.01, pages=9, bytes_sent=1),
    ]
    points = [(each.seconds, each.bytes // PAGE_SIZE_BYTES) for each in curve_of_passes(passes)]
    assert points == [(0.1, 9), (1.0, 50)]
    assert zero_share_of_passes(passes) == 0.25
    assert zero_share_of_passes(()) == 0.0
    found = after_first_pass(passes[0], request())
    assert found.memory_in_use_bytes == 400 * PAGE_SIZE_BYTES
    assert found.link.origin is LinkOrigin.FIRST_PASS
