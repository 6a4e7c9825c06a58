"""A source's `EngineDriver` with a real engine and a guest's stand-in, and what it told."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

from migrator.engine.spares import EngineSpares
from migrator.engine_driver import EngineDriver, EngineSettings
from migrator.errors import NotFoundError
from migrator.model import DomainName
from migrator.ports import GuestMemory, HypervisorDriver
from migrator.session import vocabulary as v
from migrator.session.source import SourceSession
from tests.integration.engine_lab.lab import Guest, engines_of


class OneGuest:
    """In the place of a hypervisor."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.gone = False

    async def memory(self, domain: DomainName) -> GuestMemory:
        if self.gone:
            raise NotFoundError(f"domain {domain} has no process here")
        return self.guest.memory()


class SourceDriver:
    """What drives a source's engine, and what it tells its session."""

    def __init__(self, guest: Guest, folder: Path, session: SourceSession) -> None:
        self.hypervisor = OneGuest(guest)
        self.heard: list[v.Event] = []
        self.driver = EngineDriver(
            session,
            settings=EngineSettings(
                run_directory=folder,
                spares=EngineSpares(folder / "engines.log"),
                bind_address="127.0.0.1",
            ),
            hypervisor=cast(HypervisorDriver, self.hypervisor),
            device_channel=folder / "device",
            feed=self.heard.append,
        )

    def perform(self, command: v.EngineCommand) -> None:
        self.driver.perform(command)

    async def end(self) -> None:
        self.perform(v.StopEngine())
        await self.driver.drained()

    async def close(self) -> None:
        await self.driver.close()
        await self.driver._settings.spares.close()


def signalled(guest: Guest, number: int) -> None:
    """To the one engine that there is."""
    (pid,) = engines_of(guest)
    os.kill(pid, number)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110  What it looks at has no event.
            await asyncio.sleep(0.01)
