"""At most one move because of pressure in the whole cluster, whichever agents hear of it.

    look at the turn ──► at drains and migrations ──► take it, by compare-and-set, as it was seen
                                                       └──► begin the move ──► end it

Two reports, of two targets, may come to two agents at once: each would see that nothing is under
way, and begin. Who has taken the turn looked at the migrations after the last one ended, whose
move was among them by then; and nobody takes one that hasn't ended.

One whose agent died, or doesn't know what became of its move, ends by itself, after `TURN_S`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from migrator.errors import StoreError
from migrator.model import Value
from node_agent.state.typed import TypedStore, Versioned

log = logging.getLogger(__name__)

TURN: Final = "pressure-turn"
TURN_S: Final = 120.0
"""Beginning a migration takes 30 s at most; the agents' clocks may differ by the rest."""


class Turn(Value, frozen=True, kw_only=True):
    """`pressure-turn` in the store."""

    taken_at_s: float = 0.0
    """0: nobody has it."""


class Turns:
    """See the module. Errors: StoreError."""

    def __init__(self, store: TypedStore, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    async def look(self) -> Versioned[Turn]:
        """As it is; at revision 0, it never was."""
        return await self._store.get(TURN, Turn) or Versioned(TURN, Turn(), 0)

    def taken(self, turn: Versioned[Turn]) -> bool:
        """Whether somebody is beginning a move. One from far in the future is a clock's fault."""
        at_s = turn.value.taken_at_s
        return at_s > 0.0 and abs(self._clock() - at_s) < TURN_S

    async def take(self, turn: Versioned[Turn]) -> Versioned[Turn] | None:
        """None: somebody has been faster since it was looked at."""
        return await self._write(turn, Turn(taken_at_s=self._clock()))

    async def end(self, mine: Versioned[Turn]) -> None:
        """Never raises: it ends by itself, too."""
        try:
            await self._write(mine, Turn())
        except StoreError as error:
            log.warning("the turn to move because of pressure isn't given back yet: %s", error)

    async def _write(self, before: Versioned[Turn], turn: Turn) -> Versioned[Turn] | None:
        revision = await self._store.put_if(TURN, turn, before.revision or None)
        return None if revision is None else Versioned(TURN, turn, revision)
