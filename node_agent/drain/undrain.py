"""Which domains an undrain brings back, and which it leaves where they are, and why.

A node may be drained again before its domains are back: while it is drained (nothing happens then),
after a drain that was cancelled or that left something, after an undrain that was. Such a drain
continues the one before it, and an undrain undoes them together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from migrator.errors import NotFoundError
from migrator.model import DomainName, DomainState, MaintenancePolicy
from node_agent.drain.neighbours import promised
from node_agent.drain.resources import (
    Drain,
    DrainState,
    Move,
    MoveState,
    Operation,
    PlanBlocker,
)
from node_agent.drain.survey import Survey, facts_when_off
from node_agent.drain.world import DrainWorld
from node_agent.planner.model import Blocker, DomainFacts, Plan

_LEFT: Final = frozenset({MoveState.LEFT, MoveState.FAILED})
_DELETED: Final = "it isn't defined any more"
_BACK: Final = "it is there already"
HOME: Final = "another node's undrain brings it home, to where it was before"
_NOTHING_LEFT: Final = frozenset({_DELETED, _BACK, HOME})
"""To be done, by this undrain or by a later one."""
_BLANK: Final = Plan(moves=())


def to_undo(drains: Sequence[Drain], node: str) -> tuple[Drain, ...]:
    """Of the node, newest first: its newest drain that has ended, and those that it continues, as
    far as nothing has undone them, each with what hasn't come back. `drains` newest first."""
    by_id = {each.id: each for each in drains}
    mine = (each for each in drains if each.node == node and each.operation is Operation.DRAIN)
    found: list[Drain] = []
    at = next((each for each in mine if each.ended), None)
    while at is not None and len(found) < len(drains):
        rest = _not_back(at, by_id)
        if rest is None:
            break
        found.append(msgspec.structs.replace(at, moves=rest))
        at = by_id.get(at.continues or "")
    return tuple(found)


def continued(drains: Sequence[Drain], node: str, cordoned_by: str | None) -> str | None:
    """The drain that a new one of the node continues. `cordoned_by`: what keeps it free now."""
    earlier = to_undo(drains, node)
    if not earlier:
        return None
    newest = earlier[0]
    still = newest.id == cordoned_by or newest.state is DrainState.CANCELLED
    return newest.id if still or newest.restored_by is not None else None


def _not_back(drain: Drain, by_id: Mapping[str, Drain]) -> tuple[Move, ...] | None:
    """Its moves that weren't undone; None: all of it was."""
    if drain.restored_by is None:
        return drain.moves
    by = by_id.get(drain.restored_by)
    left = {move.domain for move in by.moves if move.state in _LEFT} if by is not None else set()
    return tuple(move for move in drain.moves if move.domain in left) or None


async def plan(
    world: DrainWorld,
    node: str,
    drained: Sequence[Drain],
    sample_s: float,
    *,
    learned: tuple[float | None, float | None] = (None, None),
    others: Sequence[Drain] = (),
    ask: bool = True,
) -> tuple[Survey, Plan, tuple[PlanBlocker, ...]]:
    """The moves back to `node` of what `drained`, newest first, took away.

    `learned`: what earlier drains have shown (`Survey.experienced`). `others`: drains that may be
    under way, or have carried what comes back on. `ask`: whether the node is asked about each,
    which it refuses while it is kept free.
    """
    away = _away(drained)
    left: list[PlanBlocker] = []
    coming: dict[str, list[str]] = defaultdict(list)
    off: list[str] = []
    for move in away:
        where = carried_to(move, others)
        reason = await _changed(world, node, move, where) or in_other_hands(move, others)
        if reason:
            left.append(_left(move.domain, reason))
        elif move.is_off:
            off.append(move.domain)
        else:
            coming[where].append(move.domain)
    places = promised(others, {move.domain for move in away})
    survey = await world.survey(coming, sample_s=sample_s, places=places)
    survey = survey.experienced(*learned)
    survey = _as_it_left(survey, away, off, node, await _stopped(world, off))
    names = [name for each in coming.values() for name in each] + off
    if not names:
        return survey, _BLANK, tuple(left)
    wanted = tuple((name, node) for name in names)
    found = await world.plan(survey, names, survey.options(wanted=wanted), ask=ask)
    left += [_left_by(each) for each in found.blockers]
    return survey, msgspec.structs.replace(found, blockers=()), tuple(left)


def _away(drained: Sequence[Drain]) -> list[Move]:
    """Each domain by its newest move."""
    found: dict[str, Move] = {}
    for drain in drained:
        for move in drain.moves:
            if move.state is MoveState.MOVED or move.is_off:
                found.setdefault(move.domain, move)
    return list(found.values())


def carried_to(move: Move, drains: Sequence[Drain]) -> str:
    """Where that domain is by what drains and undrains did: its destination may have been drained,
    too. `drains` newest first. What an operator or a balancing has moved is at home there.

    "": an undrain has brought it to where it was before that move, so nothing is left to undo.
    """
    places: list[str] = []
    depth = 0
    for drain in reversed(drains):
        for each in drain.moves:
            if each.domain != move.domain or drain.operation is Operation.BALANCE:
                continue
            if each == move:
                places = [*_up_to(places, each.source), each.destination or ""]
                depth = len(places)
            elif each.state is MoveState.MOVED:
                places = _after(places, each, drain.operation, followed=depth > 0)
            if len(places) < depth or _is_of(each, move, drain.operation):
                return ""
    return places[-1] if depth else move.destination or ""


def _after(places: list[str], hop: Move, operation: Operation, *, followed: bool) -> list[str]:
    """The places of a domain, each left for the next one, once it has made that hop as well.

    `followed`: it is known to be at the last of them, so a hop from elsewhere isn't one of these.
    """
    source, destination = hop.source, hop.destination or ""
    if places and places[-1] != source and followed:
        return places
    before = _up_to(places, source)
    if operation is Operation.UNDRAIN and destination in before:
        return _up_to(before, destination)
    return [*before, destination]


def _up_to(places: list[str], place: str) -> list[str]:
    """Without what came after that one; it alone where it isn't among them."""
    while places and places[-1] != place:
        places = places[:-1]
    return places or [place]


def _is_of(hop: Move, move: Move, operation: Operation) -> bool:
    """Whether the drain's move was another node's undrain, which was under way."""
    same = move.migration is not None and hop.migration == move.migration
    return same and operation is Operation.UNDRAIN


def in_other_hands(move: Move, others: Sequence[Drain]) -> str:
    """Why an undrain that is under way keeps this one from bringing the domain back; "": none."""
    for drain in others:
        if drain.operation is not Operation.UNDRAIN or drain.ended:
            continue
        if all(each.domain != move.domain or each.state.ended for each in drain.moves):
            continue
        moved = tuple(msgspec.structs.replace(each, state=MoveState.MOVED) for each in drain.moves)
        then = msgspec.structs.replace(drain, moves=moved)
        if not carried_to(move, [then if each is drain else each for each in others]):
            return HOME
        then_type = f"`ferry undrain {move.source}`"
        return f"undrain {drain.id} brings it to {drain.node} first; then {then_type}"
    return ""


def complete(drain: Drain, drained: Sequence[Drain], left: tuple[PlanBlocker, ...]) -> Drain:
    """The undrain, with what it leaves among its moves."""
    stays = tuple(
        Move(
            domain=each.domain,
            source="",
            destination=drain.node,
            state=MoveState.GONE if each.reason in _NOTHING_LEFT else MoveState.LEFT,
            error=each.reason,
            ended_at_s=drain.created_at_s,
        )
        for each in left
    )
    return msgspec.structs.replace(
        drain,
        moves=drain.moves + stays,
        restores=drained[0].id if drained else None,
    )


async def _changed(world: DrainWorld, node: str, move: Move, where: str) -> str:
    """Why it isn't brought back, whatever the node is like; "": it might be. `where`: it should be
    there; "": an undrain has brought it home."""
    try:
        domain = await world.cluster.get_domain(DomainName(move.domain))
    except NotFoundError:
        return _DELETED
    stopped = domain.state is DomainState.STOPPED
    if move.is_off:
        return "" if stopped else f"it has been started on {domain.node} meanwhile"
    if stopped:
        return "it has been stopped meanwhile"
    if domain.node == node:
        return _BACK
    if not where:
        return HOME
    if domain.node != where:
        return f"it was moved on to {domain.node} meanwhile"
    if move.policy is not MaintenancePolicy.LIVE:
        return (
            f"it would have to be powered off again; it runs on {domain.node}, and goes back by "
            f"`ferry migrate` or by a stop and a start"
        )
    if domain.spec.maintenance is MaintenancePolicy.NEVER:
        return "its maintenance policy is never now"
    return ""


async def _stopped(world: DrainWorld, off: list[str]) -> tuple[DomainFacts, ...]:
    """The facts of domains that the drain powered off: they wait to be started again."""
    return tuple([facts_when_off(await world.cluster.get_domain(DomainName(name))) for name in off])


def _as_it_left(
    survey: Survey,
    away: list[Move],
    off: list[str],
    node: str,
    stopped: tuple[DomainFacts, ...],
) -> Survey:
    """With the policies that the drain used, and the node open whatever its cordon says now."""
    policies = {move.domain: move.policy for move in away}
    domains = tuple(
        msgspec.structs.replace(each, policy=policies.get(each.name, each.policy))
        for each in survey.domains
        if each.name not in off
    )
    nodes = tuple(
        msgspec.structs.replace(each, admits=True, why_not="")
        if each.name == node and not each.why_not.startswith("it is unreachable")
        else each
        for each in survey.nodes
    )
    return msgspec.structs.replace(survey, domains=domains + stopped, nodes=nodes)


def _left(domain: str, reason: str) -> PlanBlocker:
    return PlanBlocker(domain=domain, reason=reason, remedy="")


def _left_by(blocker: Blocker) -> PlanBlocker:
    return PlanBlocker(domain=blocker.domain, reason=blocker.reason, remedy=blocker.remedy)
