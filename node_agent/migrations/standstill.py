"""An agent that ends in order leaves no guest standing still, where that takes no longer than this.

What moves is taken up by the next agent, which begins in a second, or when somebody starts it. A
guest that is paused for its switchover would stand still until then, or wait for the pages of its
post-copy. Both are over soon, as a rule: so an agent that is told to end lets them end first.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Final

from migrator.model import ENDED, MigrationState

LIMIT_S: Final = 5.0
"""systemd kills an agent that has not ended after 20 s (`TimeoutStopSec=`)."""
_RUNS: Final = ENDED | {MigrationState.CREATED, MigrationState.SETUP, MigrationState.PRECOPY}


class Standstill:
    """See the module. `states`: of the migrations that this node is a side of."""

    def __init__(self, states: Callable[[], Iterable[MigrationState]]) -> None:
        self._states = states
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """A state may have."""
        self._changed.set()

    async def over(self, most_s: float = LIMIT_S) -> None:
        """Return when no guest stands still for its migration, or after `most_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                while any(state not in _RUNS for state in self._states()):
                    self._changed.clear()
                    await self._changed.wait()
