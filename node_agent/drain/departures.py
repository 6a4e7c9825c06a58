"""Domains that are leaving a node already when its drain begins. Pure.

By a migration that somebody else has asked for: the drain neither plans nor asks for another one,
which would be refused. It waits for that one, and counts the domain as done with it; if it comes to
nothing the domain is planned again (`move_course`). The destination counts it as its own meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from migrator.model import Migration
from node_agent.drain.resources import DrainPolicy, LeavingAlready, Move, MoveState
from node_agent.drain.survey import Survey, asked_policy


def places(leaving: Mapping[str, Migration]) -> dict[str, str]:
    """Where they are going. `leaving` by domain."""
    return {domain: migration.destination for domain, migration in leaving.items()}


def shown(leaving: Iterable[Migration]) -> tuple[LeavingAlready, ...]:
    """As a dry run tells of them."""
    return tuple(
        LeavingAlready(
            domain=each.domain,
            destination=each.destination,
            migration=each.id,
            eta_s=each.progress.eta_s,
        )
        for each in leaving
    )


def moves(
    leaving: Sequence[Migration], survey: Survey, policy: DrainPolicy, now_s: float
) -> tuple[Move, ...]:
    """As a drain keeps them. `policy`: what the drain's user asks for, should they be planned."""
    facts = {each.name: each for each in survey.domains}
    known = [(each, facts[each.domain]) for each in leaving if each.domain in facts]
    return tuple(
        Move(
            domain=each.domain,
            source=each.source,
            destination=each.destination,
            policy=asked_policy(domain, policy),
            state=MoveState.MOVING,
            priority=domain.priority,
            planned_s=round(each.progress.eta_s or 0.0, 3),
            migration=each.id,
            started_at_s=now_s,
            already=True,
        )
        for each, domain in known
    )


def longest_s(leaving: Iterable[Migration]) -> float:
    """Until the pages of all of them are across, as far as they tell."""
    return max((each.progress.eta_s or 0.0 for each in leaving), default=0.0)
