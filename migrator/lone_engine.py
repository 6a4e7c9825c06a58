"""An engine process that connects nowhere: it watches what one guest writes, or ends the watching.

agent ── Configure ──► engine: registers, or takes over what another one has registered
      ◄─ Configured ──┤
      ── Stop ───────►│ unregisters, ends
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from migrator import engine_messages as m
from migrator.engine.client import EngineProcess
from migrator.errors import EngineError, FerryError, NotFoundError
from migrator.model import DomainName, Role
from migrator.ports import GuestMemory, MemoryRegion

log = logging.getLogger(__name__)
T = TypeVar("T")
OpenMemory = Callable[[DomainName], Awaitable[GuestMemory]]

ENGINE_S: Final = 15.0
"""What an engine may need for its start, on a busy host, and until another one is gone."""
STOP_S: Final = 2.0


class LoneEngine:
    """One engine process, and its first answer of a kind. Whoever spawned it stops `process`."""

    def __init__(self) -> None:
        self.process: EngineProcess
        self.status: int | None = None
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
        return self.status is not None and self.status < 0

    async def configure(
        self, memory: GuestMemory, domain: DomainName, *, clears: bool = False
    ) -> None:
        """When this returns, it tracks the guest; or it has what it will clear when it stops.

        EngineError if not. The memory stays the caller's.
        """
        message = m.Configure(
            role=Role.SOURCE,
            migration_id=f"alone-{domain}",
            secret=secrets.token_bytes(32),
            pid=memory.pid,
            regions=layout_of(memory.regions),
            clears=clears,
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
                raise EngineError(f"the engine ended with status {self.status}")

    def _hear(self, message: m.FromEngine) -> None:
        with contextlib.suppress(asyncio.QueueFull):  # It says three things at most.
            self._heard.put_nowait(message)

    def _end(self, status: int) -> None:
        self.status = status
        with contextlib.suppress(asyncio.QueueFull):
            self._heard.put_nowait(None)


async def clear_tracking(open_memory: OpenMemory, domain: DomainName, log_path: Path) -> None:
    """Unregister what an engine that was killed has left, which slows the guest's first writes.

    Returns after ENGINE_S + STOP_S at the latest. Where it can't be done the log says so, and the
    next migration or sampling does it. A guest that is gone has none.
    """
    try:
        async with asyncio.timeout(ENGINE_S):
            memory = await open_memory(domain)
            try:
                await _clear(memory, domain, log_path)
            finally:
                memory.close()
    except NotFoundError:
        pass
    except (FerryError, OSError) as error:  # TimeoutError is among them.
        reason = str(error) or f"it took longer than {ENGINE_S:g} s"
        log.warning("the write tracking of %s isn't ended: %s", domain, reason)


async def _clear(memory: GuestMemory, domain: DomainName, log_path: Path) -> None:
    engine = await LoneEngine.spawn(log_path)
    try:
        await engine.configure(memory, domain, clears=True)
    finally:
        await engine.process.stop(STOP_S)


def layout_of(regions: Sequence[MemoryRegion]) -> tuple[m.RegionLayout, ...]:
    return tuple(
        m.RegionLayout(
            name=region.name,
            size_bytes=region.size_bytes,
            page_size_bytes=region.page_size_bytes,
            mappings=region.mappings,
        )
        for region in regions
    )
