"""Where a test may hold a migration's side, to do something to it in exactly that moment.

Inert unless the environment of the agent names a folder in `FERRY_HOLD_POINTS`; production never
does. Then a side waits at the step `ROLE-STEP` for as long as a file of that name is there. STEP is
a command of `migrator.session.vocabulary` that is performed by a driver, or the name of a message
that is about to be sent, or `arrive`: the destination's hypervisor is up. `ROLE-STEP.reached`
appears when the step waits. Whatever ends a step in its midst (a cancel, a timeout) ends the
waiting, too, as it would end a slow driver's work.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Final

VARIABLE: Final = "FERRY_HOLD_POINTS"
_POLL_S: Final = 0.005
_folder: Final = os.environ.get(VARIABLE)


async def hold(role: str, step: str) -> None:
    """Wait here if a test says so; the caller's own time limit bounds it."""
    if _folder is None:
        return
    point = Path(_folder) / f"{role}-{step}"
    while await asyncio.to_thread(_held_a_while, point):
        pass


def _held_a_while(point: Path) -> bool:
    """False at once if the point isn't held; else True, a moment later."""
    if not point.exists():
        return False
    point.with_suffix(".reached").touch()
    time.sleep(_POLL_S)
    return True
