"""How long a drain still takes, by what its own moves have taken so far. Pure.

A plan knows what lone migrations took, or an earlier drain. How late the moves are that are over,
or overdue, tells of this one: what is left is taken to be as late, with one move that is as planned
thrown in, so that the first one doesn't decide alone. What was waited for while nothing moved (a
hook, a new coordinator) is in no move, and prolongs nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final

from node_agent.drain.resources import STOP_S, Drain, DrainState, Move, MoveState

_TIMED: Final = frozenset({DrainState.RUNNING, DrainState.CANCELLING})
_OVER: Final = frozenset({MoveState.MOVED, MoveState.STOPPED})
_NEARLY: Final = 0.95
"""Of a move whose pages are across: the rest is its end."""
_BOOT_S: Final = 3.0
"""What a start elsewhere takes, roughly: its QEMU's; nobody waits for the guest's own."""


def left_s(drain: Drain, now_s: float) -> float | None:
    """Seconds, of the drain's time; None: no plan tells, or only the look at the node is left."""
    if drain.state not in _TIMED:
        return None
    live = [move for move in drain.moves if move.live]
    stops = [move for move in drain.moves if not move.live]
    found = [left for each in (live, stops) if (left := _left_of(each, now_s)) is not None]
    return max(found, default=None)


def _left_of(moves: Sequence[Move], now_s: float) -> float | None:
    """Of moves that are made alike."""
    planned = [move.planned_s for move in moves if move.planned_s > 0.0]
    if not planned:
        return None
    usual_s = statistics.median(planned)
    at_once = sum(planned) / max(move.planned_start_s + move.planned_s for move in moves)
    late = lateness(moves, usual_s, now_s)
    rest = [
        min((move.planned_s or usual_s) * late * (1.0 - done(move)), _at_most_s(move, now_s))
        for move in moves
        if not move.state.ended
    ]
    return max(max(rest, default=0.0), sum(rest) / at_once)


def lateness(moves: Sequence[Move], usual_s: float, now_s: float) -> float:
    """How much longer moves take than planned, as a factor."""
    actual_s, planned_s = usual_s, usual_s
    for move in moves:
        if move.started_at_s is None or move.attempts != 1 or move.planned_s <= 0.0:
            continue
        over = move.state in _OVER and move.ended_at_s is not None
        took_s = (move.ended_at_s or now_s) - move.started_at_s
        if over or (move.state.active and took_s > move.planned_s):
            actual_s += took_s
            planned_s += move.planned_s
    return actual_s / planned_s


def _at_most_s(move: Move, now_s: float) -> float:
    """A guest that doesn't power itself off makes nothing later than its end by force."""
    if move.state is MoveState.STOPPING and move.started_at_s is not None:
        boots_s = _BOOT_S if move.destination is not None else 0.0
        return max(move.started_at_s + STOP_S - now_s, 0.0) + boots_s
    return _BOOT_S if move.state is MoveState.BOOTING else math.inf


def done(move: Move) -> float:
    """How much of it, 0 to 1; never 1 before it has ended."""
    if move.state.ended:
        return 1.0
    if move.state is not MoveState.MOVING or move.remaining_bytes is None:
        return 0.0
    return min(_NEARLY, move.bytes_sent / max(move.bytes_sent + move.remaining_bytes, 1))
