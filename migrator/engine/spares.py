"""A warm engine: started ahead, its imports done, waiting for `Configure`.

Starting an engine takes a quarter of a second of CPU, most of it imports. Of a migration that lasts
half a second, that is too much; so the agent keeps one engine waiting, and starts the next when a
migration has ended, not while one needs the cores.

Just then the guest needs them, whose connections recover at its new place. So the next one starts
with what nobody else wants of the cores (niceness 19), until it is taken. On two full cores it took
more of them than the guest, from 100 to 500 ms after its resume (measured).
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from migrator.engine.client import EngineProcess
from migrator.errors import FerryError

log = logging.getLogger(__name__)
STOP_S = 2.0
NICENESS_WAITING = 19


class EngineSpares:
    """Keeps at most one. `close` ends it, and whatever is being started."""

    def __init__(self, log_path: Path) -> None:
        self.log_path = log_path
        """Every engine of the node appends its output here."""
        self._spare: EngineProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def refill(self) -> None:
        """Start one in the background, if none waits. A failure costs time, nothing else."""
        if self._spare is None and self._task is None and not self._closed:
            self._task = asyncio.create_task(self._start(), name="engine-spare")

    def take(self) -> EngineProcess | None:
        """The waiting engine, now the caller's; None if there is none. `attach` it at once."""
        spare, self._spare = self._spare, None
        if spare is None or not spare.running:
            return None
        if not _share(spare.pid, os.getpriority(os.PRIO_PROCESS, 0)):
            log.warning("the engine that waits can't be given its share of the cores")
        return spare

    async def close(self) -> None:
        """Idempotent."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=STOP_S)
        spare = self.take()
        if spare is not None:
            await spare.stop(STOP_S)

    async def _start(self) -> None:
        try:
            spare = await EngineProcess.spawn(
                log_path=self.log_path, on_message=lambda _: None, on_exit=lambda _: None
            )
        except FerryError as error:
            log.warning("no engine could be started ahead: %s", error)
        else:
            _share(spare.pid, NICENESS_WAITING)
            self._spare = spare
        finally:
            self._task = None


def _share(pid: int, niceness: int) -> bool:
    """Of an engine, which is a session of its own, all threads; False: the kernel refuses."""
    try:
        os.setpriority(os.PRIO_PGRP, pid, niceness)
    except OSError:
        return False
    return True
