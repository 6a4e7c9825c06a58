"""What becomes of a drain whose coordination ends by an error inside an agent. Pure.

It goes on as after a coordinator's death: from what was written down, every move looked at first.
An error that comes again and again, whichever agent coordinates, would go on so for good; so the
drain counts them, and after `ERRORS_MAX` it ends, partial, and says why. Migrations that are under
way then go on by themselves.
"""

from __future__ import annotations

from typing import Final

import msgspec

from node_agent.drain.resources import HISTORY_MAX, Drain, DrainState, MoveState, Note

ERRORS_MAX: Final = 5


def after_error(drain: Drain, error: Exception, now: float) -> tuple[Drain, str]:
    """The resource as it goes on, or has ended, and what the event log is told of it.

    `drain` as it was saved last; `now` by its own time.
    """
    count = drain.errors + 1
    over = count >= ERRORS_MAX
    what = f"an error inside the agent {drain.coordinator}, whose log has more: {error!r}"
    then = "the drain is given up" if over else f"it goes on ({count} of {ERRORS_MAX} such errors)"
    text = f"{what}; {then}"
    ended_at = now + drain.unattended_s
    note = Note(at_s=ended_at, text=text)
    drain = msgspec.structs.replace(
        drain, errors=count, history=(*drain.history, note)[-HISTORY_MAX:]
    )
    if not over:
        return drain, text
    moves = tuple(
        move
        if move.state.ended
        else msgspec.structs.replace(
            move, state=MoveState.LEFT, ended_at_s=now, eta_s=None, error=_what_of(move.migration)
        )
        for move in drain.moves
    )
    return msgspec.structs.replace(
        drain, state=DrainState.PARTIAL, ended_at_s=ended_at, error=what, moves=moves
    ), text


def _what_of(migration: str | None) -> str:
    if migration is None:
        return "the drain was given up before it was moved"
    return f"the drain was given up; `ferry migration show {migration}` says what has become of it"
