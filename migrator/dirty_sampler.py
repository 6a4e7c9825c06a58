"""Samples the dirty rate of a running guest, by an engine process that connects nowhere.

    agent ── Configure, SampleDirty ──► engine: registers, watches, answers
          ◄─────────── DirtySampled ──┤
          ── Stop ───────────────────►│ unregisters, ends

The dirty log belongs to one engine at a time: whoever calls sees to it that no migration of the
guest runs, and cancels a sampling for the sake of one. However it ends, the tracking is gone when
`sample` is: by the engine's own hand; if it was killed, by another engine's.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from migrator import engine_messages as m
from migrator.errors import EngineError
from migrator.lone_engine import ENGINE_S, STOP_S, LoneEngine, OpenMemory, clear_tracking
from migrator.model import DomainName


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
            async with asyncio.timeout(seconds + ENGINE_S):
                memory = await self._memory(domain)
                try:
                    await engine.configure(memory, domain)
                finally:
                    memory.close()
                engine.process.send(m.SampleDirty(seconds=seconds))
                return await engine.answer(m.DirtySampled)
        except TimeoutError as error:
            raise EngineError(
                f"sampling the dirty log of {domain} took longer than {seconds + ENGINE_S:g} s"
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
        await engine.process.stop(STOP_S)
        if engine.killed:
            await clear_tracking(self._memory, domain, self._log_path)
