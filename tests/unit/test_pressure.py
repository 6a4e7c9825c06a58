"""Pressure: how long it has to last, what is moved for it, and how often."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.model import MaintenancePolicy
from node_agent.planner.model import DomainFacts, NodeFacts
from node_agent.pressure.policy import (
    COOLDOWN_S,
    FORGOTTEN_S,
    HIGH,
    LOW,
    REPORTS_MIN,
    SUSTAINED_S,
    History,
    PressureKind,
    PressureReport,
    Proposal,
    Standing,
    choose,
    weigh,
)

GIB = 1024**3
_S = Standing


def report(level: float) -> PressureReport:
    return PressureReport(node="n1", level=level)


@dataclass
class Told:
    """Reports over time, and what each came to."""

    history: History = field(default_factory=History)
    now_s: float = 1000.0

    def tell(self, level: float, after_s: float = 10.0) -> Standing:
        self.now_s += after_s
        self.history, standing = weigh(self.history, report(level), self.now_s)
        return standing

    def moved(self) -> None:
        self.history = History(
            since_s=self.history.since_s,
            last_s=self.history.last_s,
            reports=self.history.reports,
            moved_at_s=self.now_s,
        )


def test_a_history_of_the_future_holds_nothing_up_for_long() -> None:
    """Made by a node whose clock was a year ahead."""
    told = Told(history=History(since_s=4e7, last_s=4e7, reports=1, moved_at_s=4e7))
    standings = [told.tell(0.9) for _ in range(62)]
    assert standings[:3] == [_S.NOTED] * 3
    assert standings[10] is _S.RESTING
    assert standings[-1] is _S.PROPOSED


def test_it_has_to_last() -> None:
    told = Told()
    standings = [told.tell(0.95) for _ in range(5)]
    assert standings == [_S.NOTED, _S.NOTED, _S.NOTED, _S.PROPOSED, _S.PROPOSED]


def test_many_reports_in_a_moment_are_one_moment() -> None:
    told = Told()
    assert {told.tell(2.0, after_s=0.01) for _ in range(100)} == {_S.NOTED}


def test_between_the_thresholds_nothing_changes() -> None:
    told = Told()
    assert told.tell((HIGH + LOW) / 2) is _S.CALM
    for _ in range(4):
        told.tell(0.95)
    before = told.history.reports
    assert told.tell((HIGH + LOW) / 2) is _S.NOTED
    assert told.history.reports == before
    assert told.tell(0.95) is _S.PROPOSED


def test_calm_and_silence_make_it_begin_anew() -> None:
    for level, after_s in ((LOW / 2, 10.0), (0.95, FORGOTTEN_S + 1)):
        told = Told()
        for _ in range(4):
            told.tell(0.95)
        told.tell(level, after_s)
        assert told.tell(0.95) is _S.NOTED


def test_after_a_move_it_rests() -> None:
    told = Told()
    for _ in range(4):
        told.tell(0.95)
    told.moved()
    assert told.tell(0.95) is _S.RESTING
    for _ in range(int(COOLDOWN_S / 10.0)):
        last = told.tell(0.95)
    assert last is _S.PROPOSED


@given(
    reports=st.lists(
        st.tuples(st.floats(0, 3), st.floats(0.01, 2 * FORGOTTEN_S)), min_size=1, max_size=60
    )
)
def test_moves_are_never_closer_than_the_cooldown(reports: list[tuple[float, float]]) -> None:
    told, moves = Told(), list[float]()
    for level, after_s in reports:
        if told.tell(level, after_s) is _S.PROPOSED:
            assert told.history.reports >= REPORTS_MIN
            assert told.now_s - told.history.since_s >= SUSTAINED_S
            told.moved()
            moves.append(told.now_s)
    assert all(b - a >= COOLDOWN_S for a, b in itertools.pairwise(moves))


# --- which move ------------------------------------------------------------------------------


def node(name: str, cpus: int = 4) -> NodeFacts:
    return NodeFacts(name=name, memory_bytes=8 * GIB, cpus=cpus)


def domain(name: str, at: str = "n1", **more: Any) -> DomainFacts:
    values = {"memory_bytes": GIB, "content_bytes": GIB // 2, "vcpus": 2, **more}
    return DomainFacts(name=name, node=at, **values)


def chosen(domains: list[DomainFacts], **more: Any) -> Proposal | str:
    values: dict[str, Any] = {"kind": PressureKind.CPU, "domain": None, **more}
    return choose([node("n1"), node("n2")], domains, "n1", place=lambda each: ("n2", 5.0), **values)


def test_the_move_that_relieves_most_for_its_time() -> None:
    small, large = domain("small", content_bytes=GIB // 8), domain("large")
    proposal = chosen([large, small, domain("third")])
    assert isinstance(proposal, Proposal)
    assert (proposal.domain, proposal.source, proposal.destination) == ("small", "n1", "n2")


def test_only_domains_that_may_move_and_the_one_that_is_meant() -> None:
    domains = [
        domain("stuck", obstacle="it is paused"),
        domain("never", policy=MaintenancePolicy.NEVER),
        domain("off", policy=MaintenancePolicy.STOP),
        domain("there", at="n2", vcpus=1),
        domain("free"),
    ]
    proposal = chosen(domains)
    assert isinstance(proposal, Proposal)
    assert proposal.domain == "free"
    assert chosen(domains, domain="never") == "no domain of n1 may be migrated live now"


def test_load_isnt_carried_to_where_there_is_as_much() -> None:
    domains = [domain("one"), domain("two", at="n2")]
    said = chosen(domains)
    assert isinstance(said, str)
    assert "as loaded" in said


@pytest.mark.parametrize("kind", list(PressureKind))
def test_every_kind_of_load_can_be_relieved(kind: PressureKind) -> None:
    proposal = chosen([domain("one"), domain("two"), domain("three")], kind=kind)
    assert isinstance(proposal, Proposal)


def test_why_a_domain_has_no_place_is_told() -> None:
    said = choose(
        [node("n1"), node("n2")],
        [domain("one")],
        "n1",
        PressureKind.CPU,
        None,
        lambda each: "memory",
    )
    assert said == "one: memory"
