"""Warm engines: started ahead, their imports done, waiting for `Configure`.

Starting an engine takes a quarter of a second of CPU, most of it imports. Of a migration that lasts
half a second, that is too much; so the agent keeps engines waiting.

Two: where guests leave a node one after the other, as in a drain, one is set up while another's
pages travel, and there is no moment without a migration. The next ones are started some time after
the last migration has ended, or as soon as none waits; a migration that is alone finds the second,
and has nothing started beside it.

When a migration has ended the guest needs the cores, whose connections recover at its new place;
while it travels, everybody does. So it is left alone for RECOVERY_S, and what is started ahead
comes after everybody else (`migrator.cores`), until it is taken.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from pathlib import Path
from typing import Final

from migrator import cores
from migrator.engine.client import EngineProcess
from migrator.errors import FerryError

log = logging.getLogger(__name__)
STOP_S: Final = 2.0
SPARES: Final = 2
RECOVERY_S: Final = 2.0
"""A TCP stream has its rate again after 0.2 s, and 1.0 at worst where engines started beside it."""


class EngineSpares:
    """Keeps at most `SPARES`. `close` ends them, and whatever is being started."""

    def __init__(self, log_path: Path) -> None:
        self.log_path = log_path
        """Every engine of the node appends its output here."""
        self._waiting: deque[EngineProcess] = deque()
        self._task: asyncio.Task[None] | None = None
        self._wanted = SPARES
        self._later: asyncio.TimerHandle | None = None
        self._failure = ""
        """Of the last start, which has been told."""
        self._closed = False

    @property
    def waiting(self) -> tuple[int, ...]:
        """Their process ids, in the order in which they are taken."""
        return tuple(each.pid for each in self._waiting)

    def refill(self) -> None:
        """Start those that lack, one after the other, in the background.

        A failure costs time, nothing else.
        """
        self._refill_in(0.0)

    def refill_later(self) -> None:
        """The same in RECOVERY_S: a migration has ended."""
        self._refill_in(RECOVERY_S)

    def _refill_in(self, seconds: float) -> None:
        if self._later is not None:
            self._later.cancel()
        self._later = asyncio.get_running_loop().call_later(seconds, self._refill_now)

    async def take(self) -> EngineProcess | None:
        """A waiting engine, now the caller's; None if there is none. `attach` it at once."""
        taken = None
        while taken is None and self._waiting:
            spare = self._waiting.popleft()
            taken = spare if spare.running else None
        if not self._waiting:
            self._fill_to(1)
        if taken is not None and not await _share(taken, cores.usual()):
            log.warning("the engine that waits can't be given its share of the cores")
        return taken

    async def close(self) -> None:
        """Idempotent."""
        self._closed = True
        if self._later is not None:
            self._later.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=STOP_S)
        while self._waiting:
            spare = self._waiting.popleft()
            if spare.running:
                await spare.stop(STOP_S)

    def _refill_now(self) -> None:
        self._later = None
        self._fill_to(SPARES)

    def _fill_to(self, number: int) -> None:
        self._wanted = number if self._task is None else max(number, self._wanted)
        # One that was killed, for want of memory say, is none.
        self._waiting = deque(each for each in self._waiting if each.running)
        if len(self._waiting) < number and self._task is None and not self._closed:
            self._task = asyncio.create_task(self._start(), name="engine-spare")

    async def _start(self) -> None:
        try:
            while len(self._waiting) < self._wanted:
                spare = await EngineProcess.spawn(
                    log_path=self.log_path, on_message=lambda _: None, on_exit=lambda _: None
                )
                await _share(spare, cores.WAITING)
                self._waiting.append(spare)
                self._failure = ""
        except FerryError as error:
            if str(error) != self._failure:
                self._failure = str(error)
                log.warning("no engine could be started ahead: %s", error)
        finally:
            self._task = None


async def _share(engine: EngineProcess, niceness: int) -> bool:
    """False: the kernel refuses."""
    try:
        return await asyncio.to_thread(cores.set_niceness, engine.pid, niceness)
    except BaseException:
        engine.kill()  # Nobody knows it now.
        raise
