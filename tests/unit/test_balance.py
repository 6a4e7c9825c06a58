"""Evening nodes out: by few moves, against no rule, only where it pays; and what is measured."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrator.model import DomainState, DomainStatus, MaintenancePolicy
from node_agent.drain.usage import Reading, merged, read_all
from node_agent.planner.balance import TARGET, TRIGGER, Usage, balance
from node_agent.planner.model import DomainFacts, NodeFacts

GIB = 1024**3
KINDS = frozenset({"machine:q35"})


def node(name: str, **changes: object) -> NodeFacts:
    values: dict[str, object] = {"memory_bytes": 32 * GIB, "cpus": 8, "kinds": KINDS} | changes
    return NodeFacts(name=name, **values)  # type: ignore[arg-type]


def domain(name: str, at: str, **changes: object) -> DomainFacts:
    values: dict[str, object] = {"memory_bytes": GIB, "content_bytes": GIB // 2} | changes
    return DomainFacts(name=name, node=at, needs=KINDS, **values)  # type: ignore[arg-type]


def busy(cpus: float) -> Usage:
    return Usage(cpus=cpus, seconds=300.0)


def test_one_move_evens_out_what_one_move_can() -> None:
    nodes = [node("n1"), node("n2")]
    guests = [domain("a", "n1"), domain("b", "n1"), domain("c", "n1"), domain("d", "n2")]
    usage = {"a": busy(2.0), "b": busy(2.0), "c": busy(2.0), "d": busy(2.0)}
    found = balance(nodes, guests, usage)
    assert len(found.moves) == 1
    assert found.moves[0].destination == "n2"
    assert found.before["cpu"] == pytest.approx(0.5)
    assert found.after["cpu"] == pytest.approx(0.0)
    assert found.moves[0].gain > 0
    assert found.moves[0].cost_s > 0


def test_even_enough_is_left_alone() -> None:
    nodes = [node("n1"), node("n2")]
    found = balance(nodes, [domain("a", "n1")], {"a": busy(8 * TRIGGER * 0.9)})
    assert found.moves == ()
    assert "even enough" in found.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"policy": MaintenancePolicy.NEVER},
        {"pinned": ("n1",)},
        {"obstacle": "it is paused"},
        {"anti_affinity": ("other",)},
        {"memory_bytes": 33 * GIB},
    ],
)
def test_who_may_not_move_stays(changes: dict[str, object]) -> None:
    nodes = [node("n1", memory_bytes=64 * GIB), node("n2")]
    guests = [domain("a", "n1", **changes), domain("other", "n2")]
    assert balance(nodes, guests, {"a": busy(6.0)}).moves == ()


def test_who_has_moved_lately_rests_and_closed_nodes_take_nothing() -> None:
    guests = [domain(name, "n1") for name in "abc"]
    usage = {name: busy(2.0) for name in "abc"}
    nodes = [node("n1"), node("n2")]
    assert balance(nodes, guests, usage, resting=frozenset("abc")).moves == ()
    closed = [node("n1"), node("n2", admits=False), node("n3")]
    assert {move.destination for move in balance(closed, guests, usage).moves} == {"n3"}


def test_a_move_that_costs_more_than_it_gains_is_not_made() -> None:
    nodes = [node(name, link_bytes_per_s=1e6) for name in ("n1", "n2")]
    guests = [domain("a", "n1", content_bytes=8 * GIB), domain("b", "n1")]
    found = balance(nodes, guests, {"a": busy(1.0), "b": busy(1.0)})
    assert "a" not in [move.domain for move in found.moves]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.0, 4.0), st.integers(1, 4)), max_size=16))
def test_it_never_gets_worse_and_no_move_is_idle(guests: list[tuple[int, float, int]]) -> None:
    nodes = [node(f"n{n}") for n in range(4)]
    domains = [
        domain(f"d{n}", f"n{at}", memory_bytes=gib * GIB) for n, (at, _, gib) in enumerate(guests)
    ]
    usage = {f"d{n}": busy(cpus) for n, (_, cpus, _) in enumerate(guests)}
    found = balance(nodes, domains, usage)
    names = [move.domain for move in found.moves]
    assert len(set(names)) == len(names), "a domain moves once"
    if found.moves:
        assert max(found.before.values()) > TRIGGER
        assert max(found.after.values()) <= max(found.before.values()) + 1e-9
    # What it makes of the nodes is, moved, even enough or the best that it finds.
    where = {each.name: each.node for each in domains}
    where |= {move.domain: move.destination for move in found.moves}
    moved = [
        domain(each.name, where[each.name], memory_bytes=each.memory_bytes) for each in domains
    ]
    again = balance(nodes, moved, usage)
    if max(found.after.values()) <= TARGET:
        assert again.moves == ()


def test_the_mean_forgets_slowly() -> None:
    mean: Usage | None = None
    last = Reading(pid=1, at_s=0.0, cpu_s=0.0, network_bytes=0)
    for number in range(1, 121):  # Ten minutes of one busy CPU.
        now = Reading(pid=1, at_s=5.0 * number, cpu_s=5.0 * number, network_bytes=5000 * number)
        mean, last = merged(mean, last, now), now
    assert mean is not None
    assert mean.cpus == pytest.approx(1.0)
    assert mean.network_bytes_per_s == pytest.approx(1000.0)
    idle = Reading(pid=1, at_s=last.at_s + 5.0, cpu_s=last.cpu_s, network_bytes=last.network_bytes)
    assert merged(mean, last, idle).cpus > 0.97


def test_counters_are_read_from_proc(tmp_path: Path) -> None:
    """Of this very process, and of a made-up tap that a made-up process holds."""
    own = DomainStatus(name="me", state=DomainState.RUNNING, pid=os.getpid())
    gone = DomainStatus(name="gone", state=DomainState.RUNNING, pid=None)
    found = read_all([own, gone])
    assert set(found) == {"me"}
    assert found["me"].cpu_s > 0
    fdinfo = tmp_path / "7" / "fdinfo"
    fdinfo.mkdir(parents=True)
    (tmp_path / "7" / "stat").write_text("7 (a b) c) S " + " ".join(["0"] * 10 + ["150", "50"]))
    (fdinfo / "3").write_text("pos:\t0\niff:\ttap0\n")
    counters = tmp_path / "net" / "tap0" / "statistics"
    counters.mkdir(parents=True)
    (counters / "rx_bytes").write_text("100\n")
    (counters / "tx_bytes").write_text("20\n")
    seven = DomainStatus(name="seven", state=DomainState.RUNNING, pid=7)
    reading = read_all([seven], proc=tmp_path, net=tmp_path / "net")["seven"]
    assert reading.cpu_s == pytest.approx(200 / os.sysconf("SC_CLK_TCK"))
    assert reading.network_bytes == 120
