"""Samples the dirty rate of a running guest, by an engine process that connects nowhere.

    agent ── Configure, SampleDirty ──► engine: registers, watches, answers
          ◄─────────── DirtySampled ──┤
          ── Stop ───────────────────►│ unregisters, ends

The dirty log belongs to one engine at a time: whoever calls sees to it that no migration of the
guest runs, and cancels a sampling for the sake of one. However it ends, the tracking is gone when
`sample` is: by the engine's own hand; if it was killed, by the agent's.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from pathlib import Path
from typing import Final, TypeVar

from migrator import engine_messages as m
from migrator.engine.client import EngineProcess
from migrator.errors import EngineError
from migrator.left_tracking import OpenMemory, clear_tracking
from migrator.model import DomainName, Role
from migrator.ports import GuestMemory

T = TypeVar("T")

_ENGINE_S: Final = 15.0
"""What an engine may need for its start, on a busy host, and until another one is gone."""
_STOP_S: Final = 2.0


class DirtySampler:
    """See the module. Any number of samplings at once, one a guest."""

    def __init__(self, memory: OpenMemory, log_path: Path) -> None:
        """`memory` opens a guest's memory; each engine appends its output to `log_path`."""
        self._memory = memory
        self._log_path = log_path

    async def sample(self, domain: DomainName, seconds: float) -> m.DirtySampled:
        """Watch for `seconds`. HypervisorError, EngineError; the guest is as it was, always."""
        engine = await LoneEngine.spawn(self._log_path)
        try:
            async with asyncio.timeout(seconds + _ENGINE_S):
                memory = await self._memory(domain)
                try:
                    await engine.configure(memory, domain)
                finally:
                    memory.close()
                engine.process.send(m.SampleDirty(seconds=seconds))
                return await engine.answer(m.DirtySampled)
        except TimeoutError as error:
            raise EngineError(
                f"sampling the dirty log of {domain} took longer than {seconds + _ENGINE_S:g} s"
            ) from error
        finally:
            await self._end_certainly(engine, domain)

    async def _end_certainly(self, engine: LoneEngine, domain: DomainName) -> None:
        """Also if who waits is cancelled once more: the log is another's when this returns."""
        ending = asyncio.create_task(self._end(engine, domain))
        cancelled: asyncio.CancelledError | None = None
        while not ending.done():
            try:
                await asyncio.wait([ending])
            except asyncio.CancelledError as error:
                cancelled = error
        ending.result()
        if cancelled is not None:
            raise cancelled

    async def _end(self, engine: LoneEngine, domain: DomainName) -> None:
        await engine.process.stop(_STOP_S)
        if engine.killed:
            await clear_tracking(self._memory, domain)


class LoneEngine:
    """One engine process, and its first answer of a kind. Whoever spawned it stops `process`."""

    def __init__(self) -> None:
        self.process: EngineProcess
        self._status: int | None = None
        self._heard: asyncio.Queue[m.FromEngine | None] = asyncio.Queue(maxsize=64)

    @classmethod
    async def spawn(cls, log_path: Path) -> LoneEngine:
        engine = cls()
        engine.process = await EngineProcess.spawn(
            log_path=log_path, on_message=engine._hear, on_exit=engine._end
        )
        return engine

    @property
    def killed(self) -> bool:
        """By a signal that left it no time; otherwise it has unregistered its tracking."""
        return self._status is not None and self._status < 0

    async def configure(self, memory: GuestMemory, domain: DomainName) -> None:
        """When this returns, it tracks the guest. EngineError if not. The memory isn't closed."""
        message = m.Configure(
            role=Role.SOURCE,
            migration_id=f"alone-{domain}",
            secret=secrets.token_bytes(32),
            pid=memory.pid,
            regions=m.layout_of(memory.regions),
        )
        self.process.send(message, fds=memory.fds)
        await self.answer(m.Configured)

    async def answer(self, kind: type[T]) -> T:
        """The next message of that kind. EngineError if it fails or ends instead."""
        while True:
            message = await self._heard.get()
            if isinstance(message, kind):
                return message
            if isinstance(message, m.EngineFailed):
                raise EngineError(message.reason)
            if message is None:
                raise EngineError(f"the engine ended with status {self._status}")

    def _hear(self, message: m.FromEngine) -> None:
        with contextlib.suppress(asyncio.QueueFull):  # It says three things at most.
            self._heard.put_nowait(message)

    def _end(self, status: int) -> None:
        self._status = status
        with contextlib.suppress(asyncio.QueueFull):
            self._heard.put_nowait(None)
