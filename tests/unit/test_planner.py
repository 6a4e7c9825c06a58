"""Plans of drains: right by the independent validator, near the bound, fast enough, explained."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrator.model import MaintenancePolicy
from node_agent.planner.model import (
    DomainFacts,
    NodeFacts,
    Plan,
    PlanOptions,
    wire_bytes,
)
from node_agent.planner.plan import plan_moves
from node_agent.planner.shares import share_links
from tests.unit.plan_validator import problems

GIB = 1024**3
KINDS = frozenset({"machine:q35", "cpu:qemu64"})


def node(name: str, **changes: object) -> NodeFacts:
    values: dict[str, object] = {"memory_bytes": 64 * GIB, "kinds": KINDS} | changes
    return NodeFacts(name=name, **values)  # type: ignore[arg-type]


def domain(name: str, at: str = "n1", **changes: object) -> DomainFacts:
    values: dict[str, object] = {"memory_bytes": GIB, "content_bytes": GIB // 2} | changes
    return DomainFacts(name=name, node=at, needs=KINDS, **values)  # type: ignore[arg-type]


def plan_of(nodes: list[NodeFacts], domains: list[DomainFacts], **options: object) -> Plan:
    """The plan of emptying n1, which is right."""
    leaving = [each.name for each in domains if each.node == "n1"]
    chosen = PlanOptions(**options)  # type: ignore[arg-type]
    plan = plan_moves(nodes, domains, leaving, chosen)
    assert problems(nodes, domains, leaving, plan, chosen) == []
    return plan


def where(plan: Plan) -> dict[str, str | None]:
    return {move.domain: move.destination for move in plan.moves}


def test_ten_equal_guests_leave_over_one_link() -> None:
    """As long as the link takes for their bytes, and one setup and one finish."""
    nodes = [node("n1", admits=False), node("n2"), node("n3")]
    plan = plan_of(nodes, [domain(f"g{number}") for number in range(10)])
    assert len(plan.moves) == 10
    assert plan.over_bound < 1.1
    assert sorted(set(where(plan).values()), key=str) == ["n2", "n3"]
    assert plan.parallel >= 2, "one at a time would leave the link idle in each setup"


def test_a_slow_link_means_fewer_at_a_time() -> None:
    def parallel(link_bytes_per_s: float) -> int:
        nodes = [
            node(name, admits=name != "n1", link_bytes_per_s=link_bytes_per_s)
            for name in ("n1", "n2", "n3")
        ]
        guests = [domain(f"g{number}", content_bytes=100 * 2**20) for number in range(6)]
        return plan_of(nodes, guests).parallel

    assert parallel(1e6) == 1 < parallel(1e9)


def test_a_fast_writer_gets_a_share_that_it_converges_with() -> None:
    nodes = [node("n1", admits=False, link_bytes_per_s=100e6), node("n2"), node("n3")]
    guests = [domain(f"g{n}", dirty_bytes_per_s=40e6, working_set_bytes=GIB // 4) for n in range(4)]
    assert plan_of(nodes, guests).parallel == 1


def test_priority_leaves_first_and_the_user_s_limit_holds() -> None:
    nodes = [node("n1", admits=False), node("n2"), node("n3")]
    guests = [domain(f"g{n}") for n in range(5)] + [domain("vip", priority=900)]
    plan = plan_of(nodes, guests, parallel=1)
    assert plan.moves[0].domain == "vip"
    assert plan.parallel == 1


def test_anti_affinity_holds_both_ways_and_affinity_keeps_together() -> None:
    nodes = [node(f"n{n}", admits=n != 1) for n in range(1, 5)]
    guests = [
        domain("web-1", labels=frozenset({"app=web"}), anti_affinity=("app=web",)),
        domain("web-2", labels=frozenset({"app=web"})),
        domain("web-3", "n3", labels=frozenset({"app=web"})),
        domain("db", affinity=("cache",)),
        domain("cache"),
        domain("tied", affinity=("web-3",)),
    ]
    found = where(plan_of(nodes, guests))
    assert found["web-1"] not in (found["web-2"], "n3")
    assert found["db"] == found["cache"]
    assert found["tied"] == "n3"


@pytest.mark.parametrize(
    ("guest", "changes", "expected", "remedy"),
    [
        (domain("g", policy=MaintenancePolicy.NEVER), {}, "policy is never", "stop it"),
        (domain("g", obstacle="it is paused", cure="resume it"), {}, "it is paused", "resume it"),
        (
            domain("g", memory_bytes=100 * GIB),
            {},
            "102400 MiB needed, 64512 MiB left",
            "add a node with 102400 MiB",
        ),
        (
            domain("g", memory_bytes=GIB),
            {"memory_bytes": GIB},
            "1024 MiB needed, 0 MiB left",
            "free 1024 MiB on n2",
        ),
        (domain("g", pinned=("n1",)), {}, "pinned to n1", "change its placement rules"),
        (domain("g", anti_affinity=("other",)), {}, "anti-affinity to other", "change its"),
        (domain("g"), {"admits": False, "why_not": "it is cordoned"}, "it is cordoned", "open n2"),
        (
            domain("g", pinned=("n1",)),
            {"admits": False, "why_not": "it is cordoned"},
            "it is cordoned",
            "change its placement rules, or leave",
        ),
        (
            domain("g"),
            {"kinds": frozenset({"machine:q35"})},
            "it has no cpu qemu64",
            "give n2 cpu qemu64",
        ),
    ],
)
def test_a_blocker_is_named_with_reason_and_remedy(
    guest: DomainFacts, changes: dict[str, object], expected: str, remedy: str
) -> None:
    nodes = [node("n1", admits=False, why_not="it is draining"), node("n2", **changes)]
    plan = plan_of(nodes, [guest, domain("other", "n2")])
    assert plan.moves == ()
    (blocker,) = plan.blockers
    assert expected in blocker.reason
    assert blocker.remedy.startswith(remedy), "what doesn't help is no remedy"


def test_rules_that_contradict_each_other_are_told() -> None:
    nodes = [node("n1", admits=False), node("n2"), node("n3")]
    guests = [domain("a", affinity=("b",)), domain("b", anti_affinity=("a",))]
    plan = plan_of(nodes, guests)
    assert [each.domain for each in plan.blockers] == ["a", "b"]
    assert all("contradict" in each.reason for each in plan.blockers)


def test_a_stopped_domain_needs_a_place_only_if_it_starts_again() -> None:
    nodes = [node("n1", admits=False), node("n2", memory_bytes=GIB)]
    stop = MaintenancePolicy.STOP
    guests = [domain("again", policy=stop), domain("off", policy=stop, restart=False)]
    assert where(plan_of(nodes, guests)) == {"again": "n2", "off": None}


def test_what_boots_elsewhere_needs_nothing_of_the_processor_that_it_ran_on() -> None:
    avx = frozenset({"feature:avx512f"})
    nodes = [node("n1", admits=False, kinds=KINDS | avx), node("n2")]
    guests = [
        domain("boots", features=avx, policy=MaintenancePolicy.STOP),
        domain("migrates", features=avx),
    ]
    plan = plan_of(nodes, guests)
    assert where(plan) == {"boots": "n2"}
    (blocker,) = plan.blockers
    assert blocker.domain == "migrates"
    assert "feature avx512f" in blocker.reason


def test_tight_memory_is_packed() -> None:
    """The fastest arrival would put the small ones where the large one must go."""
    nodes = [
        node("n1", admits=False),
        node("n2", memory_bytes=8 * GIB, link_bytes_per_s=1e9),
        node("n3", memory_bytes=4 * GIB, link_bytes_per_s=1e8),
    ]
    guests = [domain("large", memory_bytes=6 * GIB)]
    guests += [domain(f"s{n}", memory_bytes=2 * GIB) for n in range(3)]
    assert len(plan_of(nodes, guests).moves) == 4


def test_wire_bytes_count_what_is_dirtied_meanwhile() -> None:
    guest = domain("g", content_bytes=100_000_000, working_set_bytes=GIB)
    busy = domain("g", content_bytes=100_000_000, working_set_bytes=GIB, dirty_bytes_per_s=50e6)
    assert wire_bytes(guest, 100e6) == 100_000_000
    assert 180_000_000 < wire_bytes(busy, 100e6) < 200_000_000  # 100 + 50 + 25 + ...
    assert wire_bytes(busy, 1e9) < 110_000_000


def test_shares_are_fair_and_fill_the_links() -> None:
    links = {"a": 100.0, "b": 100.0, "c": 30.0, "d": 100.0}
    moves = [("a", "c"), ("a", "d"), ("b", "c")]
    # The second one of a gets a quarter of what the first does, and what that can't use.
    assert share_links(moves, links, links, 1e9) == pytest.approx([15.0, 85.0, 15.0])
    both = [("a", "d"), ("a", "b"), ("b", "c")]
    assert share_links(both, links, links, 1e9) == pytest.approx([80.0, 20.0, 30.0])
    assert share_links([("a", "d")], links, links, 40.0) == [40.0]
    assert share_links([], links, links, 1.0) == []


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[NodeFacts], list[DomainFacts], list[str]]:
    """Small clusters with every kind of rule; some nodes are emptied."""
    count = draw(st.integers(2, 7))
    closed = draw(st.integers(1, max(1, count - 1)))
    nodes = [
        node(
            f"n{n}",
            memory_bytes=draw(st.sampled_from([4, 8, 16])) * GIB,
            admits=n >= closed,
            link_bytes_per_s=draw(st.sampled_from([1e7, 1e8, 1e9])),
            kinds=KINDS
            | draw(st.sampled_from([frozenset(), frozenset({"pool:fast"})]))
            | draw(st.sampled_from([frozenset(), frozenset({"feature:avx2"})])),
        )
        for n in range(count)
    ]
    names = [f"d{n}" for n in range(draw(st.integers(0, 14)))]
    selectors = st.lists(st.sampled_from([*names, "app=web", "app=db"]), max_size=1).map(tuple)
    domains = [
        DomainFacts(
            name=name,
            node=f"n{draw(st.integers(0, count - 1))}",
            memory_bytes=(memory := draw(st.sampled_from([1, 2, 3]))) * GIB,
            content_bytes=memory * GIB // draw(st.sampled_from([2, 8])),
            dirty_bytes_per_s=draw(st.sampled_from([0.0, 1e6, 3e7])),
            working_set_bytes=GIB // 8,
            priority=draw(st.sampled_from([500, 500, 900])),
            policy=draw(st.sampled_from(list(MaintenancePolicy))),
            restart=draw(st.booleans()),
            labels=draw(st.sampled_from([frozenset(), frozenset({"app=web"})])),
            affinity=draw(selectors),
            anti_affinity=draw(selectors),
            pinned=draw(st.sampled_from([(), (), ("n1", "n2")])),
            needs=KINDS | draw(st.sampled_from([frozenset(), frozenset({"pool:fast"})])),
            features=draw(st.sampled_from([frozenset(), frozenset({"feature:avx2"})])),
        )
        for name in names
    ]
    leaving = [each.name for each in domains if int(each.node[1:]) < closed]
    return nodes, domains, leaving


@settings(max_examples=150, deadline=None)
@given(clusters(), st.sampled_from([None, 1, 3]))
def test_every_plan_is_right(
    cluster: tuple[list[NodeFacts], list[DomainFacts], list[str]], parallel: int | None
) -> None:
    nodes, domains, leaving = cluster
    options = PlanOptions(parallel=parallel)
    plan = plan_moves(nodes, domains, leaving, options)
    found = problems(nodes, domains, leaving, plan, options)
    assert found == [], plan


def rack(
    dice: random.Random, count: int, racks: int, per_node: int, cpus: Sequence[int] = (4, 16, 64)
) -> tuple[list[NodeFacts], list[DomainFacts], list[str]]:
    """`count` nodes, of which the first `racks` are emptied."""
    speed, cores = dice.choice([118e6, 1.18e9, 2.9e9]), dice.choice(cpus)
    nodes = [
        node(
            f"n{n}",
            memory_bytes=256 * GIB,
            admits=n >= racks,
            link_bytes_per_s=speed,
            cpus=cores,
        )
        for n in range(count)
    ]
    domains = [
        domain(
            f"d{n}",
            f"n{n % count}",
            memory_bytes=(memory := dice.choice([1, 2, 4, 8])) * GIB,
            content_bytes=int(memory * GIB * dice.uniform(0.2, 0.9)),
            dirty_bytes_per_s=dice.choice([0.0, 1e6, 1e7]),
            working_set_bytes=GIB // 8,
            labels=frozenset({f"app=a{n % 997}"}),
            anti_affinity=(f"app=a{n % 997}",) if n % 5 == 0 else (),
        )
        for n in range(count * per_node)
    ]
    return nodes, domains, [each.name for each in domains if int(each.node[1:]) < racks]


@pytest.mark.parametrize(
    ("cpus", "limit"),
    [((4, 16, 64), 1.1), ((1, 2), 1.3)],
    ids=["servers", "two moves at once, whatever the link"],
)
def test_random_drains_are_near_the_bound(cpus: Sequence[int], limit: float) -> None:
    """With two lanes a handful of moves don't fill them evenly, which the bound doesn't know."""
    worst = 1.0
    for seed in range(60):
        dice = random.Random(seed)
        nodes, domains, leaving = rack(
            dice, dice.randint(4, 40), dice.randint(1, 3), dice.randint(4, 12), cpus
        )
        plan = plan_moves(nodes, domains, leaving)
        assert problems(nodes, domains, leaving, plan, PlanOptions()) == [], f"seed {seed}"
        worst = max(worst, plan.over_bound)
    assert worst <= limit


def test_no_node_takes_part_in_more_moves_than_its_processors_feed() -> None:
    """Two sources, one destination: the arrivals are bounded, too."""
    nodes = [node("n1", cpus=2)]
    nodes += [node(name, cpus=16, admits=False) for name in ("n2", "n3")]
    guests = [domain(f"g{n}", f"n{2 + n % 2}", content_bytes=10**7) for n in range(12)]
    plan = plan_moves(nodes, guests, [each.name for each in guests])
    assert problems(nodes, guests, [each.name for each in guests], plan, PlanOptions()) == []
    assert plan.lanes == {"n1": 2, "n2": 8, "n3": 8}
    assert most_at_once(plan) == 2


def most_at_once(plan: Plan) -> int:
    """Moves under way at the same time, anywhere."""
    starts = [move.start_s for move in plan.moves]
    return max(
        sum(each.start_s <= at + 1e-6 < each.end_s - 1e-6 for each in plan.moves) for at in starts
    )


def test_moves_end_one_after_the_other() -> None:
    """Equal guests would end together, if they had equal shares: their blackouts, too."""
    nodes = [node("n1", admits=False, cpus=4), node("n2", cpus=4), node("n3", cpus=4)]
    plan = plan_of(nodes, [domain(f"g{number}") for number in range(8)], parallel=3)
    ends = sorted(move.end_s for move in plan.moves)
    mean_s = plan.makespan_s / len(ends)
    assert min(after - before for before, after in itertools.pairwise(ends)) > mean_s / 4


def test_planning_grows_with_the_cluster_not_with_its_square() -> None:
    """Of a quarter of the cluster, and of all of it: 1,000 nodes, 20,000 domains, 20 nodes drained.

    Both in one run, by processor time: `make bench` says how long it takes.
    """

    def seconds(count: int, emptied: int) -> float:
        nodes, domains, leaving = rack(random.Random(5), count, emptied, 20)
        began_s = time.process_time()
        plan = plan_moves(nodes, domains, leaving)
        took_s = time.process_time() - began_s
        assert len(plan.moves) == len(leaving) == 20 * emptied
        assert plan.over_bound <= 1.1
        return took_s

    quarter = min(seconds(250, 5) for _ in range(3))
    whole = min(seconds(1000, 20) for _ in range(2))
    assert whole / quarter < 4 * 2.5, f"{quarter:.2f} s for a quarter, {whole:.2f} s for all"


def test_a_node_s_own_words_and_what_would_open_it_are_told() -> None:
    nodes = [
        node("n1", admits=False, why_not="it is draining"),
        node("n2"),
        node("n3", admits=False, why_not="it is cordoned"),
        node("n4", admits=False, why_not="it is unreachable", silent=True),
    ]
    refused = ("g", "n2")
    plan = plan_of(
        nodes, [domain("g")], forbidden=frozenset({refused}), refusals={refused: "its disk is full"}
    )
    (blocker,) = plan.blockers
    assert "n2: its disk is full" in blocker.reason
    assert blocker.remedy.startswith("open n3, or start the agent of n4, or mend that on n2, or ")


def test_in_a_large_cluster_one_rule_doesn_t_hide_why_the_others_can_t() -> None:
    """The first six nodes were told with their reasons, and of the rest how many they are."""
    nodes = [node("n1", admits=False), *(node(f"n{number}") for number in range(2, 12))]
    plan = plan_of(
        nodes, [domain("g", pinned=("n11",), anti_affinity=("other",)), domain("other", "n11")]
    )
    assert [each.reason for each in plan.blockers] == [
        "no node can take it: n2, n3, n4, n5 and 5 more: the domain is pinned to n11; "
        "n11: its anti-affinity to other, which runs there"
    ]
    different = [
        node(f"n{number}", admits=False, why_not=f"it is drained by {number}")
        for number in range(2, 12)
    ]
    (blocker,) = plan_of([nodes[0], *different], [domain("g")]).blockers
    assert blocker.reason.endswith("n7: it is drained by 7; and 4 more nodes")


def test_what_is_to_go_to_one_node_only_is_told_that_one_s_reason() -> None:
    """An undrain's: those that aren't meant told that, and hid it."""
    nodes = [node(f"n{number}") for number in range(1, 12)]
    guests = [domain("g", anti_affinity=("other",)), domain("other", "n9")]
    plan = plan_of(nodes, guests, wanted=(("g", "n9"),))
    assert [each.reason for each in plan.blockers] == [
        "n9 can't take it: its anti-affinity to other, which runs there"
    ]
