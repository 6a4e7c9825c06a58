"""What earlier drains have shown: how long a move takes beside its transfer. Pure.

A migration that runs alone tells its own set-up and end (`migrations.link_speed`). In a drain the
nodes are asked first, its end is noticed later, and other moves share the processors: a drain's
moves tell that, as the difference between how long each took and what its plan said.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Final

from migrator.model import MaintenancePolicy
from node_agent.drain.resources import Drain, Move, MoveState, Operation

KNOWN_FOR_S: Final = 86_400.0
MOVES_MIN: Final = 2
"""Fewer tell of chance."""


def overhead_s(drains: Iterable[Drain], now_s: float) -> float | None:
    """By the newest drain, undrain or balancing that tells; None: none does. `drains` newest first.

    At least 0; a plan bounds it further (`Survey.options`).
    """
    for drain in drains:
        if drain.ended_at_s is None or not drain.overhead_s:
            continue
        if now_s - drain.ended_at_s > KNOWN_FOR_S:
            continue
        late = [
            move.ended_at_s - move.started_at_s - move.planned_s
            for move in drain.moves
            if _tells(move) and move.ended_at_s is not None and move.started_at_s is not None
        ]
        if len(late) >= MOVES_MIN:
            return max(0.0, drain.overhead_s + statistics.median(late))
    return None


def stop_s(drains: Iterable[Drain], operation: Operation, now_s: float) -> float | None:
    """How long a domain takes that is powered off and started elsewhere, or, in an undrain, only
    started; by the newest such that tells. None: none does. `drains` newest first."""
    for drain in drains:
        if drain.operation is not operation or drain.ended_at_s is None:
            continue
        if now_s - drain.ended_at_s > KNOWN_FOR_S:
            continue
        took = [
            move.ended_at_s - move.started_at_s
            for move in drain.moves
            if move.policy is MaintenancePolicy.STOP
            and move.state in (MoveState.MOVED, MoveState.STOPPED)
            and move.attempts == 1
            and move.ended_at_s is not None
            and move.started_at_s is not None
        ]
        if took:
            return statistics.median(took)
    return None


def _tells(move: Move) -> bool:
    """Whether it went as it was planned: live, to where it was to go, at once."""
    live = move.policy is MaintenancePolicy.LIVE and move.state is MoveState.MOVED
    return live and move.attempts == 1 and move.planned_s > 0.0
