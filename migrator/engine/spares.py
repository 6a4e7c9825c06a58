"""A warm engine: started ahead, its imports done, waiting for `Configure`.

Starting an engine takes a quarter of a second of CPU, most of it imports. Of a migration that lasts
half a second, that is too much; so the agent keeps one engine waiting, and starts the next when a
migration has ended, not while one needs the cores.

Just then the guest needs them, whose connections recover at its new place. So the next one starts
with what nobody else wants of the cores, until it is taken. On two full cores it took more of them
than the guest, from 100 to 500 ms after its resume (measured).

An engine is a session of its own, and where the kernel shares the cores out among sessions
(autogroup, sched(7)), a niceness counts inside of its session only: 0.2 s of a core took 0.41 s
beside two others with niceness 19 as without, and 3.6 to 14 s where the session has it, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import Final

from migrator.engine.client import EngineProcess
from migrator.errors import FerryError

log = logging.getLogger(__name__)
STOP_S: Final = 2.0
NICENESS_WAITING: Final = 15
"""A thirtieth of a core that others want: bounded, since a migration may begin at any time."""


class EngineSpares:
    """Keeps at most one. `close` ends it, and whatever is being started."""

    def __init__(self, log_path: Path) -> None:
        self.log_path = log_path
        """Every engine of the node appends its output here."""
        self._spare: EngineProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._own_session = 0

    def refill(self) -> None:
        """Start one in the background, if none waits. A failure costs time, nothing else."""
        if self._spare is None and self._task is None and not self._closed:
            self._task = asyncio.create_task(self._start(), name="engine-spare")

    def take(self) -> EngineProcess | None:
        """The waiting engine, now the caller's; None if there is none. `attach` it at once."""
        spare, self._spare = self._spare, None
        if spare is None or not spare.running:
            return None
        if not _share(spare.pid, os.getpriority(os.PRIO_PROCESS, 0), self._own_session):
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
            own = await asyncio.to_thread(session_niceness, os.getpid())
            self._own_session = own or 0
            spare = await EngineProcess.spawn(
                log_path=self.log_path, on_message=lambda _: None, on_exit=lambda _: None
            )
        except FerryError as error:
            log.warning("no engine could be started ahead: %s", error)
        else:
            if not _share(spare.pid, NICENESS_WAITING, NICENESS_WAITING):
                log.warning("the engine that waits takes its full share of the cores")
            self._spare = spare
        finally:
            self._task = None


def session_niceness(pid: int) -> int | None:
    """Of the process's session among all others; None: this kernel doesn't tell them apart."""
    try:
        told = _autogroup(pid).read_text()
    except OSError:
        return None
    return int(told.rpartition(" nice ")[2])


def _share(pid: int, niceness: int, of_session: int) -> bool:
    """Of an engine, which is a session of its own, all threads; False: the kernel refuses."""
    try:
        os.setpriority(os.PRIO_PGRP, pid, niceness)
        with contextlib.suppress(FileNotFoundError):  # a kernel without autogroups
            fd = os.open(_autogroup(pid), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(fd, str(of_session).encode())  # no disk: microseconds
            finally:
                os.close(fd)
    except OSError:
        return False
    return True


def _autogroup(pid: int) -> Path:
    return Path(f"/proc/{pid}/autogroup")
