"""What stands in for parts of an agent that a simulated one doesn't have, or has in its own way."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, cast

from migrator.errors import HypervisorError, StoreError
from migrator.model import DomainName, DomainSpec, FencingToken, NodeName
from node_agent.events import EventKind, EventLog
from node_agent.hooks.model import HookReport
from node_agent.migrations.arrivals import Arrivals
from node_agent.migrations.checks import DestinationCheck
from node_agent.migrations.storage_check import StorageCheck
from node_agent.peers.hub import PeerHub
from node_agent.restart_notes import RestartNotes, RestartStore

if TYPE_CHECKING:
    from tests.simulation.agent import Agent
    from tests.simulation.side import Side

WRITE_S = 0.005
ASK_S = 0.01
EARLY_IN_EACH = 10
"""One in so many seeds: the others stay what they were when they were found to show something."""
EARLY = 0.8
UP_S = (0.05, 2.0)
"""From the first page that may come to the hypervisor's answer, at most."""


class QuietEvents(EventLog):
    """Events go into the transcript."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def emit(
        self,
        kind: EventKind,
        message: str,
        *,
        domain: str | None = None,
        migration: str | None = None,
        **data: str | int | float | bool | None,
    ) -> None:
        if self._agent.alive:
            self._agent.world.log("{}: {}: {}", self._agent.node.name, kind.value, message)
            if domain is not None and (data.get("left") or kind is EventKind.DOMAIN_STOPPED):
                self._agent.node.cluster.domains[DomainName(domain)].left_stopped()


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


class NoStorageLooks(StorageCheck):
    """The worse storage: it fails only when nobody looks any more."""

    async def wait(self, spec: DomainSpec, destination: NodeName, token: FencingToken) -> None: ...


class SimulatedArrivals(Arrivals):
    """A source sees what the other agent knows, by the simulated network."""

    def __init__(self, agent: Agent) -> None:
        super().__init__(cast(PeerHub, None))
        self._agent = agent

    async def wait(self, destination: NodeName, migration_id: str) -> None:
        node = self._agent.node
        side = node.cluster.migrations[migration_id].source
        while side.session is not None:
            target = node.cluster.nodes[destination]
            there = target.agent
            reached = node.cluster.reaches(node.name, destination) and target.held is None
            if reached and there is not None and not there.arrivals.is_preparing(migration_id):
                return
            await self._agent.call(_nothing, ASK_S)


def takes_pages_early(agent: Agent) -> bool:
    """Some destinations can, before they are up, or have so much as a process."""
    world = agent.world
    dice = random.Random(f"memory {world.seed} {agent.node.name} {world.now_s}")
    return world.seed % EARLY_IN_EACH == 0 and dice.random() < EARLY


def memory_of(side: Side) -> list[int] | None:
    """Its guest's here, or what was made for it ahead."""
    if side.guest is not None:
        return side.guest.memory
    agent = side.node.agent
    return None if agent is None else agent.hypervisor.memory_ahead.get(side.domain.name)


async def come_up(agent: Agent, name: str) -> None:
    """A destination whose process was just made, and whose memory was there before."""
    world, node = agent.world, agent.node
    dice = random.Random(f"early {world.seed} {node.name} {world.now_s}")
    fails = dice.random() < world.faults.command_failure
    domain = node.cluster.domains[DomainName(name)]

    def effect() -> None:
        if fails or node.name not in domain.guests:
            raise HypervisorError("simulated: it didn't come up")

    await agent.call(effect, dice.random() * dice.choice(UP_S))


def _nothing() -> None:
    pass


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
