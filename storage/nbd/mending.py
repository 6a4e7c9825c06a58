"""Exports that are down are begun again: until it works, ever more rarely, volume by volume."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from migrator.errors import FerryError, NotFoundError

RESTART_PAUSE_S: Final = 1.0
RESTART_PAUSE_S_MAX: Final = 10.0
"""Between tries: their guests wait."""

log = logging.getLogger(__name__)


class Mending:
    """`later` from the event loop; `close` ends what goes on."""

    def __init__(self, try_now: Callable[[str], Awaitable[bool]]) -> None:
        """`try_now`: whether the volume's exports are as they should be now. FerryErrors say why
        they can't be; NotFoundError: there is no such volume any more.
        """
        self._try_now = try_now
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._troubles: dict[str, str] = {}

    def later(self, volume: str, trouble: str = "") -> None:
        """Begin soon, unless it is at it. `trouble`: why it didn't work just now."""
        if trouble:
            self._note(volume, trouble)
        if volume not in self._tasks:
            self._tasks[volume] = asyncio.create_task(self._mend(volume), name=f"mend-{volume}")

    def why(self, volume: str) -> str:
        """Of the last try; "": there was none, or it worked."""
        return self._troubles.get(volume, "")

    async def close(self) -> None:
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _mend(self, volume: str) -> None:
        pause_s = RESTART_PAUSE_S
        try:
            while True:
                await asyncio.sleep(pause_s)
                if await self._try(volume):
                    return
                pause_s = min(2.0 * pause_s, RESTART_PAUSE_S_MAX)
        finally:
            del self._tasks[volume]

    async def _try(self, volume: str) -> bool:
        try:
            well = await self._try_now(volume)
        except NotFoundError:
            well = True
        except FerryError as error:
            self._note(volume, str(error))
            return False
        self._troubles.pop(volume, None)
        return well

    def _note(self, volume: str, trouble: str) -> None:
        if self._troubles.get(volume) != trouble:
            log.error("volume %s: %s; it is tried until it works", volume, trouble)
        self._troubles[volume] = trouble
