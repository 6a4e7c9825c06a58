"""What other drains that are under way mean for one: their places are taken, and their links. Pure.

Two nodes may be drained at once, towards the same destinations. What the first one's plan has given
away is no room for the second one; and moves that send to one node share its link, whichever drain
they belong to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from node_agent.drain.resources import Drain, Move, MoveState


def promised(drains: Iterable[Drain], besides: Collection[str]) -> dict[str, str]:
    """Where domains are going by the drains under way. `besides`: those that are planned anew."""
    return {
        move.domain: move.destination
        for drain in drains
        if not drain.ended
        for move in drain.moves
        if move.destination
        and move.domain not in besides
        and not move.state.ended
        and move.state is not MoveState.SEEKING
    }


def under_way(drains: Iterable[Drain], besides: str) -> tuple[Move, ...]:
    """The live moves that are being made now by other drains than `besides`."""
    return tuple(
        move
        for drain in drains
        if drain.id != besides and not drain.ended
        for move in drain.moves
        if move.live and move.state in (MoveState.STARTING, MoveState.MOVING) and move.destination
    )
