"""How a sampling ends; its engine is made up."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from migrator import dirty_sampler
from migrator.dirty_sampler import DirtySampler
from migrator.model import DomainName
from migrator.ports import GuestMemory

WEB = DomainName("web")


class _Engine:
    """Begins, never answers, and ends when it is let."""

    killed = False

    def __init__(self) -> None:
        self.process = self
        self.begun, self.stopping, self.may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def spawn(self, log_path: Path) -> _Engine:
        return self

    async def configure(self, memory: GuestMemory, domain: DomainName) -> None:
        self.begun.set()
        await asyncio.Event().wait()

    async def stop(self, timeout_s: float) -> bool:
        self.stopping.set()
        await self.may_end.wait()
        return True


async def no_memory(domain: DomainName) -> GuestMemory:
    return GuestMemory(pid=1, regions=(), uffd=os.eventfd(0), pagemap_fd=os.eventfd(0))


async def test_it_is_over_when_its_engine_is_however_often_it_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whoever asked for it, and again by a migration that has to have the dirty log."""
    engine = _Engine()
    monkeypatch.setattr(dirty_sampler, "LoneEngine", engine)
    sampling = asyncio.create_task(DirtySampler(no_memory, tmp_path / "log").sample(WEB, 1.0))
    await engine.begun.wait()
    sampling.cancel()
    await engine.stopping.wait()
    sampling.cancel()
    await asyncio.wait([sampling], timeout=0.05)
    assert not sampling.done()
    engine.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await sampling
