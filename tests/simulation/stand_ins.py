"""What stands in for parts of an agent that a simulated one doesn't have, or has in its own way."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from migrator.errors import StoreError
from migrator.model import DomainName
from node_agent.hooks.model import HookReport
from node_agent.migrations.checks import DestinationCheck
from node_agent.restart_notes import RestartNotes, RestartStore

if TYPE_CHECKING:
    from tests.simulation.agent import Agent

WRITE_S = 0.005


class UnencryptedCheck(DestinationCheck):
    """Without a look at files."""

    async def _encryption(self, source: bool | None) -> list[str]:
        return []

    async def _room(self) -> list[str]:
        return []


class NoHooks:
    """Instead of `MigrationMoments`: nobody has to be asked."""

    async def before_switchover(self, _: object) -> HookReport:
        return HookReport()


class NoNetwork:
    """Instead of `CutoverService`: guests without NICs."""

    async def prepare_arrival(self, _: object) -> None: ...

    def gone(self, _: object) -> None: ...


class SimulatedRestarts(RestartStore):
    """On the node's disk: a write is there when it returns, and isn't if the agent died before."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._writing = asyncio.Lock()
        world = agent.node.world
        self._dice = random.Random(f"restarts {world.seed} {agent.node.name} {world.now_s}")

    async def load(self) -> RestartNotes:
        return self._agent.node.restarts

    async def save(self, notes: RestartNotes) -> None:
        agent = self._agent
        fails = self._dice.random() < agent.world.faults.journal_failure and not agent.world.healed

        def effect() -> None:
            if fails:
                for name in notes.wanted:  # If this agent dies now, nobody knows of them.
                    agent.node.cluster.domains[DomainName(name)].must_start = False
                raise StoreError("simulated: the disk is full")
            if agent.alive:
                agent.node.note_restarts(notes)

        async with self._writing:
            await agent.call(effect, self._dice.random() * WRITE_S)
