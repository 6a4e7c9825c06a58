"""A plan is put to the nodes before anything moves: what they say changes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import msgspec
import pytest

from migrator.errors import PeerError, RefusedError
from node_agent.cluster_calls import MIGRATION_CHECK, MigrationParams, Reasons
from node_agent.drain import vocabulary as v
from node_agent.drain.coordinator import Coordinator
from node_agent.drain.records import DrainRecords
from node_agent.drain.resources import CancelMode, Drain, DrainState, Move, Operation
from node_agent.drain.survey import Survey
from node_agent.drain.world import DrainWorld
from node_agent.planner.model import DomainFacts, NodeFacts, Plan, PlanOptions
from node_agent.state.memory import SimulatedData, SimulatedStore
from node_agent.state.typed import TypedStore, Versioned

GIB = 2**30


class Nodes:
    """What each source answers of a (domain, destination)."""

    def __init__(self, answers: Mapping[tuple[str, str], str]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str, str]] = []

    async def call(
        self, source: str, method: str, params: MigrationParams, kind: type[Reasons], **_: object
    ) -> Reasons:
        assert (method, kind) == (MIGRATION_CHECK, Reasons)
        domain, destination = str(params.domain), params.request.destination
        self.asked.append((source, domain, destination))
        answer = self.answers.get((domain, destination), self.answers.get((domain, "*"), ""))
        answer = answer.replace("NODE", f"node {destination}")
        if answer == "silent":
            raise PeerError(f"{source} doesn't answer")
        return kind(reasons=(answer,) if answer else ())


async def planned(
    answers: Mapping[tuple[str, str], str], *, nodes_count: int = 3, domains: int = 2
) -> tuple[Plan, Nodes]:
    """Of `domains` domains on n1: db, web, d2 and so on."""
    names = ["db", "web", *(f"d{number}" for number in range(2, domains))]
    nodes = Nodes(answers)
    rest: Any = None
    world = DrainWorld(rest, hub=cast(Any, nodes), nodes=rest, records=rest, ownership=rest)
    survey = Survey(
        nodes=tuple(
            NodeFacts(name=name, memory_bytes=8 * GIB, admits=name != "n1")
            for name in (f"n{number}" for number in range(1, nodes_count + 1))
        ),
        domains=tuple(
            DomainFacts(name=name, node="n1", memory_bytes=GIB, content_bytes=GIB // 2)
            for name in names
        ),
        links={},
        link="",
    )
    return await world.plan(survey, names, PlanOptions()), nodes


def places(plan: Plan) -> dict[str, str | None]:
    return {move.domain: move.destination for move in plan.moves}


async def test_a_node_that_refuses_a_domain_is_left_out_for_it() -> None:
    plan, _ = await planned({("web", "n2"): "node n2: its disk is full"})
    assert places(plan)["web"] == "n3"
    assert not plan.blockers


async def test_what_all_of_many_nodes_refuse_is_a_blocker_and_no_move() -> None:
    """A storage that is away: the drain used to begin, though the last node asked had refused."""
    plan, nodes = await planned({("web", "*"): "NODE: its storage is away"}, nodes_count=12)
    assert set(places(plan)) == {"db"}
    (blocker,) = plan.blockers
    assert blocker.domain == "web"
    assert "its storage is away" in blocker.reason
    asked = [destination for _, domain, destination in nodes.asked if domain == "web"]
    assert sorted(asked) == sorted(f"n{number}" for number in range(2, 13)), "each, and once"


async def test_the_one_node_that_takes_it_is_found_among_many() -> None:
    answers = {("web", "*"): "NODE: its disk is full", ("web", "n9"): ""}
    plan, _ = await planned(answers, nodes_count=12)
    assert places(plan)["web"] == "n9"
    assert not plan.blockers


async def test_no_plan_has_a_move_that_was_refused_however_many_there_are() -> None:
    answers = {(name, "*"): "NODE: full" for name in ["db", "web", *(f"d{n}" for n in range(40))]}
    plan, nodes = await planned(answers, nodes_count=40, domains=30)
    assert not plan.moves
    assert len(plan.blockers) == 30
    assert all("full" in each.reason for each in plan.blockers)
    assert len(nodes.asked) <= 5 * 64


async def test_what_its_own_node_cannot_send_is_a_blocker_and_no_move() -> None:
    full = "n1, where it runs: its disk is full"
    plan, nodes = await planned({("web", "*"): full})
    assert set(places(plan)) == {"db"}
    (blocker,) = plan.blockers
    assert (blocker.domain, blocker.reason) == ("web", full)
    assert "n1" in blocker.remedy
    assert {source for source, _, _ in nodes.asked} == {"n1"}


async def test_where_nothing_can_leave_there_is_no_move_at_all() -> None:
    full = "n1, where it runs: its disk is full"
    plan, _ = await planned({("web", "*"): full, ("db", "*"): full})
    assert not plan.moves
    assert [each.domain for each in plan.blockers] == ["db", "web"]


@pytest.mark.parametrize("answer", ["silent", "domain web: it is paused"])
async def test_what_is_not_about_a_node_is_left_to_the_migration(answer: str) -> None:
    plan, _ = await planned({("web", "*"): answer})
    assert set(places(plan)) == {"db", "web"}
    assert not plan.blockers


BARRED = "node n10: its certificate has ended"
"""Said of the source; the destination is n1."""


@pytest.mark.parametrize(
    ("reason", "elsewhere"),
    [(BARRED, False), ("node n1: full", True), ("node n1 is cordoned", True)],
)
async def test_what_is_said_of_n10_is_not_taken_for_a_word_of_n1(
    reason: str, elsewhere: bool
) -> None:
    """No other destination helps, and each that is sought for costs a try."""
    rest: Any = None
    nodes = Nodes({("web", "n1"): reason})
    world = DrainWorld(rest, hub=cast(Any, nodes), nodes=rest, records=rest, ownership=rest)
    refused, _ = await world._refused([("web", "n10", "n1")])
    assert bool(refused) is elsewhere

    class Refuses:
        async def owner(self, domain: str) -> str:
            return "n10"

        async def migrate(self, *_: object) -> None:
            raise RefusedError(f"domain web was not migrated: {reason}", [reason])

    refuses: Any = Refuses()
    refuses.cluster = refuses
    records, entry = await one_drain()
    web = Move(domain="web", source="n10", destination="n1")
    entry = Versioned(entry.key, msgspec.structs.replace(entry.value, moves=(web,)), entry.revision)
    work = Coordinator(entry, records=records, world=refuses, events=rest, hooks=rest, settle=rest)
    await work._begin(v.Begin(domain="web", destination="n1", bandwidth_bytes_per_s=None))
    heard = work._heard.get_nowait()
    assert isinstance(heard, v.Refused) and heard.elsewhere is elsewhere


async def one_drain() -> tuple[DrainRecords, Versioned[Drain]]:
    store = SimulatedStore(SimulatedData())
    await store.open()
    records = DrainRecords(TypedStore(store))
    drain = Drain(
        id="d",
        operation=Operation.DRAIN,
        node="n1",
        state=DrainState.RUNNING,
        created_at_s=0.0,
        started_at_s=0.0,
    )
    return records, await records.add(drain)


async def test_who_asks_that_moves_are_cancelled_is_heard_though_another_asks_for_less() -> None:
    """Both before the coordinator looks: the second would have undone what the first was told."""
    records, entry = await one_drain()
    await records.ask_cancel("d", CancelMode.LET_END, "user ann")
    await records.ask_cancel("d", CancelMode.ABORT, "user bob")
    told = await records.ask_cancel("d", CancelMode.LET_END, "user eve")
    assert (told.cancel, told.cancelled_by) == (CancelMode.ABORT, "user bob")
    _, heard = await records.save(entry.value, entry.revision)
    assert (heard.cancel, heard.cancelled_by) == (CancelMode.ABORT, "user bob")


async def test_a_wish_to_cancel_outlives_the_coordinator_s_next_write() -> None:
    """With whose it is: the coordinator hears of both by its own write."""
    records, entry = await one_drain()
    drain = entry.value
    await records.ask_cancel("d", CancelMode.ABORT, "user bob (operator, token 1)")
    _, written = await records.save(msgspec.structs.replace(drain, beat=2), entry.revision)
    kept = (await records.get("d")).value
    assert kept == written
    assert (kept.cancel, kept.cancelled_by) == (CancelMode.ABORT, "user bob (operator, token 1)")
    assert kept.beat == 2
