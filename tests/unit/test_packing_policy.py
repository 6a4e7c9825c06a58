"""When pages are compressed, and by what: by figures alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.engine.codecs import LADDER, Codec, usable
from migrator.engine.frames import PACKED_BYTES_MAX
from migrator.engine.packing_policy import (
    COMPARED_BYTES,
    CORES_FACTOR,
    IDLE_MIN,
    PACK_BYTES_MAX,
    PACK_BYTES_MIN,
    PLAN_KEPT_S,
    SPEED_MARGIN,
    THREADS_MAX,
    CoreBudget,
    Offer,
    Order,
    PackingPolicy,
    Plan,
    StreamPlan,
    Trial,
    choose,
    cores_needed,
    frame_bytes,
    packed_rate,
)

FRAME = 512 * 1024
SLOW, FAST, FASTEST = 12.5e6, 300e6, 1.25e9
"""Bytes a second: 100 Mbit/s, 2.4 and 10 Gbit/s."""
ZSTD_ONLY = usable(("zstd",))


def _assumed() -> list[Offer]:
    return [Offer(codec, 1 / codec.speed_assumed, codec.share_assumed) for codec in LADDER]


class _Source:
    """Packs frame after frame, as the policy orders, as fast and as small as told."""

    def __init__(self, idle: float = 8.0, *, slower: float = 1.0) -> None:
        self.idle, self.slower = idle, slower
        self.now = 0.0
        self.policy = PackingPolicy(lambda: self.idle, clock=lambda: self.now)

    def share(self, codec: Codec, content: float) -> float:
        """`content`: 1.0 for what is as assumed, above for less compressible pages."""
        return min(1.0, content * codec.share_assumed)

    def frame(
        self,
        link: float | None,
        content: float = 1.0,
        known: tuple[Codec, ...] = LADDER,
        share: Callable[[Codec, float], float] | None = None,
    ) -> tuple[Plan | None, Order | None]:
        """0.1 s later."""
        self.now += 0.1
        plan = self.policy.plan(link, known)
        if plan is None or not self.policy.affordable:
            return plan, None
        order = self.policy.order(plan, FRAME, hashing=plan.hashing)

        def trial(codec: Codec) -> Trial:
            left = int(FRAME * (share or self.share)(codec, content))
            return Trial(codec, FRAME, left, FRAME / codec.speed_assumed * self.slower)

        sent = None if order.codec is None else trial(order.codec)
        compared = [trial(codec) for codec in order.compared]
        self.policy.note(FRAME, sent, compared, copy_seconds=1e-4, hash_seconds=6e-4)
        return plan, order

    def codec(self, link: float | None, content: float = 1.0, frames: int = 40) -> str:
        """What it ends with; "" for none."""
        for _ in range(frames):
            plan, _ = self.frame(link, content)
        return "" if plan is None else plan.codec.name


def test_the_slower_the_link_the_smaller_and_the_faster_the_quicker() -> None:
    order = {codec.name: number for number, codec in enumerate(LADDER)}
    found = [_Source().codec(mbit * 125e3) for mbit in (100, 1000, 3000, 4500, 10_000)]
    assert found[0] == "zstd-3"
    assert found[-1] == ""
    numbers = [order.get(name, -1) for name in found]
    assert numbers == sorted(numbers, reverse=True)
    assert len(set(numbers)) >= 3


def test_nothing_is_packed_where_the_link_isnt_the_bottleneck_or_no_core_is_idle() -> None:
    assert _Source().codec(None) == ""
    assert _Source(idle=0.0).codec(125e6) == ""
    assert _Source(idle=0.05).codec(125e6) == ""
    assert _Source(idle=0.05).codec(1e6) != ""  # 8 Mbit/s: a hundredth of a core does.


def test_busy_cores_may_be_idle_later_but_a_fast_link_stays_fast() -> None:
    policy = PackingPolicy(lambda: 0.0)
    assert policy.plan(SLOW, LADDER) is None
    assert policy.could_pay(SLOW, LADDER)
    assert not policy.could_pay(FASTEST, LADDER)
    assert not policy.could_pay(None, LADDER)
    assert not policy.could_pay(SLOW, ())


def test_fewer_idle_cores_a_cheaper_codec() -> None:
    names = [_Source(idle=idle).codec(125e6) for idle in (2.0, 1.0, 0.4, 0.2)]
    assert names[0] in ("zstd-1", "zstd-3")
    assert names[2] in ("lz4", "zstd-fast-3")
    assert names[3] == ""


def test_cores_are_shared_among_streams() -> None:
    alone = PackingPolicy(lambda: 1.0)
    one_of_eight = PackingPolicy(lambda: 1.0, sharers=lambda: 8)
    assert alone.plan(125e6, LADDER) is not None
    assert one_of_eight.plan(125e6, LADDER) is None


def test_packing_stops_paying_where_it_is_slower_than_the_link() -> None:
    source = _Source(slower=12.0)
    packed = [source.frame(125e6)[1] is not None for _ in range(500)]
    assert sum(packed) < 50  # Now and then it looks again.
    assert source.codec(3e6) != ""


def test_the_codec_follows_what_is_measured() -> None:
    """Where Zstandard gains no more than LZ4, or takes much longer here."""
    source = _Source()
    for _ in range(200):
        plan, _ = source.frame(SLOW, share=lambda codec, _: 0.4)
    assert plan is not None
    assert plan.codec == LADDER[0]


def test_an_older_destination_gets_lz4() -> None:
    source = _Source()
    for _ in range(40):
        plan, order = source.frame(SLOW, known=usable(("lz4",)))
        assert plan is not None and order is not None
        assert order.codec is not None
        assert {codec.family for codec in (order.codec, *order.compared)} == {"lz4"}
    assert source.frame(SLOW, known=())[0] is None


def test_pages_that_become_tiny_dont_end_it() -> None:
    """Packing them as fast as the link carries them would take more cores than are idle.

    A policy that stopped there saw no frame any more that could have changed its mind: of 141 MiB
    over 1 Gbit/s 133 were sent.
    """
    source = _Source(idle=0.9)
    packed = 0
    for _ in range(100):
        plan, order = source.frame(125e6, content=0.02)
        assert plan is not None
        packed += order is not None
    assert packed > 90
    assert source.codec(125e6) in ("lz4", "zstd-fast-3", "zstd-1")


def test_a_bad_measurement_isnt_for_ever() -> None:
    source = _Source(idle=0.6, slower=8.0)
    assert source.codec(125e6, frames=10) == ""
    source.slower = 1.0
    assert source.codec(125e6, frames=300) != ""


def test_where_nothing_is_gained_only_now_and_then_one_tries() -> None:
    source = _Source(slower=1.2)
    assert source.codec(FAST, content=9.0, frames=20) != ""  # What it takes is known then.
    tries = 0
    for _ in range(400):
        plan, order = source.frame(FAST, content=9.0)
        assert plan is not None and order is not None and not plan.cheap
        tries += order.codec is not None
    assert 20 < tries < 150
    for _ in range(40):
        source.frame(FAST)
    assert source.frame(FAST)[1] not in (None, Order(None))


def test_where_trying_is_cheap_one_always_tries() -> None:
    source = _Source()
    for _ in range(100):
        plan, order = source.frame(SLOW, content=9.0)
        assert plan is not None and plan.cheap
        assert order is not None and order.codec is not None


def test_each_codec_is_tried_on_the_same_frame_now_and_then() -> None:
    source = _Source()
    orders = [source.frame(125e6)[1] for _ in range(330)]
    compared = [order for order in orders if order is not None and order.compared]
    assert all(order.compared == LADDER for order in compared)
    assert len(compared) == 19
    assert not any(order is None or order.compared for order in orders[:8])


def test_until_something_was_compared_the_quickest_codec_is_taken() -> None:
    source = _Source(idle=1.0)
    assert source.codec(125e6, frames=8) == "lz4"
    assert source.codec(125e6, frames=4) == "zstd-1"


def test_on_a_slow_link_there_is_time_to_compare_first() -> None:
    source = _Source()
    _, order = source.frame(SLOW)
    assert order is not None
    assert order.codec is LADDER[-1]
    assert order.compared == LADDER


def test_where_it_is_doubtful_whether_packing_pays_that_is_found_out_first() -> None:
    source = _Source()
    orders = [source.frame(2700 * 125e3)[1] for _ in range(8)]
    assert [order is not None and bool(order.compared) for order in orders] == [True, *7 * [False]]


def test_a_host_that_is_partly_busy_packs_in_what_is_left() -> None:
    """With 0.7 of a core idle nothing was packed: a usual page takes 0.8 at 1 Gbit/s."""
    source = _Source(idle=0.5, slower=2.0)
    packed = [source.frame(125e6)[1] is not None for _ in range(100)]
    assert all(packed)


def test_what_packing_took_is_told() -> None:
    told: list[float] = []
    policy = PackingPolicy(lambda: 8.0, used=told.append)
    sent = Trial(LADDER[0], FRAME, 99, 0.001)
    policy.note(FRAME, sent, [sent, sent], copy_seconds=0.1, hash_seconds=0.01)
    policy.note(FRAME, None, copy_seconds=0.5)
    assert told == [pytest.approx(0.113), 0.5]


def test_frames_are_small_where_the_link_is_slow() -> None:
    sizes = [frame_bytes(mbit * 125e3) for mbit in (1, 100, 500, 900, 10_000)]
    assert sizes == [PACK_BYTES_MIN, PACK_BYTES_MIN, PACK_BYTES_MIN, PACK_BYTES_MAX, PACK_BYTES_MAX]
    assert PACK_BYTES_MAX <= PACKED_BYTES_MAX


class _Counted(PackingPolicy):
    planned = 0
    rates: tuple[float | None, ...] = ()

    def plan(self, link_bytes_per_s: float | None, usable: Sequence[Codec]) -> Plan | None:
        self.planned += 1
        self.rates += (link_bytes_per_s,)
        return super().plan(link_bytes_per_s, usable)


def test_a_stream_plans_now_and_then_or_when_its_link_is_another() -> None:
    now = 0.0
    policy = _Counted(lambda: 8.0, clock=lambda: now)
    plan = StreamPlan(policy, lambda: now)
    first = plan(125e6, LADDER)
    assert first is not None
    now += 0.5 * PLAN_KEPT_S
    assert plan(125e6, LADDER) is first
    assert policy.planned == 1
    assert plan(12.5e6, LADDER) is not None
    assert policy.planned == 2
    now += PLAN_KEPT_S
    assert plan(12.5e6, LADDER) is not None
    assert policy.planned == 3
    for planned in (4, 5):  # Who doesn't pack looks at each frame whether it pays by now.
        assert plan(None, LADDER) is None
        assert policy.planned == planned


@pytest.mark.parametrize(
    ("expected", "found", "by", "packs"),
    [
        (None, None, None, False),
        (None, 100e6, 100e6, True),
        (100e6, None, 100e6, True),
        (350e6, None, 350e6, False),  # It might not pay.
        (
            100e6,
            600e6,
            100e6,
            True,
        ),  # That is a cap.
        (100e6, 10e6, 10e6, True),
    ],
)
def test_packing_begins_by_what_earlier_streams_found(
    expected: float | None, found: float | None, by: float | None, packs: bool
) -> None:
    policy = _Counted(lambda: 8.0)
    plan = StreamPlan(policy)(found, LADDER, expected)
    assert (plan is not None) is packs
    assert policy.rates == (by,)


def test_telling_pages_apart_needs_idle_cores_of_its_own() -> None:
    plans = [PackingPolicy(lambda cores=cores: cores).plan(125e6, LADDER) for cores in (0.4, 4.0)]  # type: ignore[misc]
    assert [plan.hashing for plan in plans if plan is not None] == [False, True]


def test_packing_takes_no_more_than_what_is_idle() -> None:
    """By the time that frames take; one may be too many."""
    source = _Source(idle=0.7)
    spent = 0.0
    for _ in range(2000):
        source.now += 0.001
        plan = source.policy.plan(125e6, LADDER)
        assert plan is not None
        while source.policy.affordable:
            order = source.policy.order(plan, FRAME, hashing=plan.hashing)
            assert order.codec is not None
            sent, *compared = [
                Trial(codec, size, size // 9, size / codec.speed_assumed)
                for size, tried in ((FRAME, (order.codec,)), (COMPARED_BYTES, order.compared))
                for codec in tried
            ]
            spent += CORES_FACTOR * (1e-4 + sum(each.core_seconds for each in (sent, *compared)))
            spent += CORES_FACTOR * 6e-4 * plan.hashing
            hashed = 6e-4 if plan.hashing else None
            source.policy.note(FRAME, sent, compared, copy_seconds=1e-4, hash_seconds=hashed)
    assert 0.9 * 0.7 * 2.0 < spent < 1.1 * 0.7 * 2.0


def test_a_budget_keeps_little_and_pays_its_debts() -> None:
    budget = CoreBudget()
    assert budget.empty
    budget.refill(10.0, 1.0)
    budget.refill(70.0, 1.0)
    assert not budget.empty
    budget.spend(0.06)  # Of a minute a twentieth of a second is kept.
    assert budget.empty
    budget.refill(70.02, 1.0)
    assert not budget.empty


OFFERS = st.lists(
    st.builds(
        Offer,
        st.sampled_from(LADDER),
        st.floats(0.2e-9, 50e-9),
        st.floats(0.002, 1.0),
    ),
    max_size=5,
)
LINKS = st.floats(1e5, 5e9)
IDLE = st.floats(0.0, 16.0)


@given(OFFERS, LINKS, IDLE)
def test_the_cores_of_what_is_chosen_are_idle(
    offers: list[Offer], link: float, idle: float
) -> None:
    chosen = choose(offers, link, idle)
    if chosen is None:
        return
    usually = cores_needed(chosen.seconds_a_byte, chosen.codec.share_assumed, link)
    assert idle >= min(usually, IDLE_MIN)
    assert 1.0 / chosen.seconds_a_byte >= SPEED_MARGIN * link
    assert packed_rate(chosen, link, min(idle, THREADS_MAX)) >= link


@given(OFFERS, LINKS, IDLE)
def test_nothing_that_could_be_taken_is_much_sooner_done(
    offers: list[Offer], link: float, idle: float
) -> None:
    chosen = choose(offers, link, idle)
    cores = min(idle, THREADS_MAX)
    for offer in offers:
        alone = choose([offer], link, idle)
        assert (alone is None) or (chosen is not None)
        if alone is not None and chosen is not None:
            # Each step to a dearer one may have forgone three hundredths.
            rate = packed_rate(chosen, link, cores)
            assert rate * 1.03 >= packed_rate(offer, link, cores) * (1 - 1e-9)


@given(OFFERS, LINKS, IDLE, st.floats(1.0, 50.0))
def test_more_idle_cores_or_a_slower_link_never_end_it(
    offers: list[Offer], link: float, idle: float, times: float
) -> None:
    if choose(offers, link, idle) is not None:
        assert choose(offers, link, idle * times) is not None
        assert choose(offers, link / times, idle) is not None


@given(st.sampled_from(LADDER), st.floats(0.002, 1.0), LINKS, IDLE)
def test_packing_is_never_predicted_to_be_slower_than_sending(
    codec: Codec, share: float, link: float, cores: float
) -> None:
    rate = packed_rate(Offer(codec, 1e-9, share), link, cores)
    assert link <= rate <= link / share * (1 + 1e-9)


@pytest.mark.parametrize("link", [SLOW, FAST])
def test_by_what_is_assumed_each_rung_of_the_ladder_is_some_links(link: float) -> None:
    chosen = choose(_assumed(), link, 8.0)
    assert chosen is not None
    assert chosen.codec in ZSTD_ONLY
    assert choose(_assumed(), FASTEST, 8.0) is None
