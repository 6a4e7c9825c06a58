"""What a drain's machine writes down: the resource, the commands of this turn. Pure."""

from __future__ import annotations

import msgspec

from node_agent.drain import vocabulary as v
from node_agent.drain.moves import Moves
from node_agent.drain.resources import HISTORY_MAX, Drain, Move, MoveState, Note


class Ledger:
    """The state of a `DrainMachine`, and the ways to change it."""

    def __init__(self, drain: Drain) -> None:
        self._base = drain
        self._moves = Moves(drain)
        self._out: list[v.Command] = []
        self.changes = 0
        """Grows with each decision. Progress alone is none: it needn't be saved at once."""

    @property
    def drain(self) -> Drain:
        """The resource as it stands."""
        return msgspec.structs.replace(self._base, moves=self._moves.all())

    def _put(self, move: Move, **changes: object) -> None:
        self.changes += 1
        self._moves.put(msgspec.structs.replace(self._moves.now(move), **changes))

    def _end(self, move: Move, state: MoveState, now: float, **changes: object) -> None:
        self._put(move, state=state, ended_at_s=now, eta_s=None, **changes)

    def _set(self, **changes: object) -> None:
        self.changes += 1
        self._base = msgspec.structs.replace(self._base, **changes)

    def _note(self, text: str, now: float, domain: str | None = None) -> None:
        note = Note(at_s=now + self._base.unattended_s, text=text, domain=domain)
        history = (*self._base.history, note)
        self._set(history=history[-HISTORY_MAX:])
        self._out.append(v.Tell(text=text, domain=domain))
