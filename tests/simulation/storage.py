"""The simulated storage: volumes that check who writes, on every write, and each node's driver.

A volume behaves as the port says: a fence leaves the writing to what the winner's node has opened
last, and shuts out everybody else. One that doesn't enforce (a shared folder) takes every write:
there the handoff alone must keep the old writer quiet, and takeovers are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn

from migrator.errors import FenceError, StorageError
from migrator.model import (
    BlockSource,
    DiskFormat,
    Fencing,
    FencingToken,
    FileSource,
    NodeName,
    PoolHealth,
    VolumeInfo,
    VolumeName,
)
from migrator.ports import VolumeDriver
from tests.simulation.guests import Guest
from tests.simulation.world import STORE_LATE_S, World

if TYPE_CHECKING:
    from tests.simulation.agent import Agent

CALL_S = 0.002
STALLED_S = 4.0
"""After which a driver gives a stalled storage up."""
SOURCE = FileSource(path="/simulated", format=DiskFormat.RAW)
INFO = VolumeInfo(
    pool="default",
    name="v",
    format=DiskFormat.RAW,
    capacity_bytes=1 << 20,
    allocated_bytes=0,
)


class Volume:
    """What the storage knows of one volume."""

    def __init__(self, world: World, *, enforces: bool) -> None:
        self.world = world
        self.enforces = enforces
        self.newest = FencingToken(0)
        self.writer: NodeName | None = None
        self.identity = 0
        """The token under which the writer's node had opened it when it fenced."""
        self.opened: dict[NodeName, int] = {}
        self.last_writer_token = 0
        self._late: list[Callable[[], None]] = []

    def fence(self, node: NodeName, token: FencingToken) -> None:
        if token < self.newest:
            raise FenceError(f"fenced by token {self.newest}, not {token}")
        if token > self.newest:
            self.newest = token
            self.writer = node
            self.identity = self.opened.get(node, 0)

    def fence_late(self, node: NodeName, token: FencingToken, seconds: float) -> None:
        """Who asked for it isn't told."""

        def arrive() -> None:
            if arrive in self._late:
                self._late.remove(arrive)
                if token >= self.newest:
                    self.fence(node, token)

        self._late.append(arrive)
        self.world.after(seconds, arrive)

    def settle(self) -> None:
        """What is on its way arrives now, or never."""
        for arrive in tuple(self._late):
            if self.world.random.random() < 0.5:
                arrive()
        self._late.clear()

    def accepts(self, guest: Guest) -> bool:
        """Whether a write of that process reaches the volume."""
        if not self.enforces or self.writer is None:
            return True
        return guest.node == self.writer and guest.opened_token == self.identity


class SimulatedVolumes(VolumeDriver):
    """One agent's pool: every domain has one volume, which is called as it is."""

    name: ClassVar[str] = "simulated"

    def __init__(self, agent: Agent, volumes: dict[str, Volume], *, enforces: bool) -> None:
        self._agent = agent
        self._volumes = volumes
        self._enforces = enforces
        self.forget_fences = False
        """A mutant's: it says that it fenced, and didn't."""

    @property
    def fencing(self) -> Fencing:
        return Fencing(remote_writers=self._enforces, method="simulated")

    async def _reach(self) -> None:
        """One round trip. StorageError if the storage doesn't answer this node."""
        agent = self._agent
        await agent.trip(CALL_S)
        if agent.node.storage_stalled:
            await agent.trip(STALLED_S)
            if agent.node.storage_stalled:
                raise StorageError("the storage doesn't answer")

    async def open(
        self, volume: VolumeName, token: FencingToken, *, read_only: bool
    ) -> BlockSource:
        await self._reach()
        found = self._volumes[volume]
        if token < found.newest:
            raise FenceError(f"fenced by token {found.newest}, not {token}")
        found.opened[self._agent.node.name] = token
        return SOURCE

    async def close(self, volume: VolumeName, token: FencingToken) -> None:
        await self._reach()
        opened = self._volumes[volume].opened
        if opened.get(self._agent.node.name, token + 1) <= token:
            del opened[self._agent.node.name]

    async def fence(self, volume: VolumeName, token: FencingToken) -> None:
        await self._reach()
        if self.forget_fences:
            return
        world, found, node = self._agent.world, self._volumes[volume], self._agent.node.name
        if world.chance(world.faults.fence_failure):
            if token >= found.newest:
                found.fence_late(node, token, world.delay(STORE_LATE_S))
            raise FenceError("unconfirmed")
        found.fence(node, token)

    async def verify(self, volume: VolumeName) -> FencingToken | None:
        await self._reach()
        return self._volumes[volume].newest or None

    async def inspect(self, volume: VolumeName) -> VolumeInfo:
        await self._reach()
        return INFO

    async def health(self) -> PoolHealth:
        raise NotImplementedError

    async def create(
        self,
        volume: VolumeName,
        *,
        capacity_bytes: int,
        format: DiskFormat,
        image: Path | None = None,
    ) -> VolumeInfo:
        _not_simulated()

    async def list_volumes(self) -> Sequence[VolumeInfo]:
        _not_simulated()

    async def delete(self, volume: VolumeName) -> None:
        _not_simulated()

    async def resize(self, volume: VolumeName, capacity_bytes: int) -> VolumeInfo:
        _not_simulated()

    async def clone(
        self, volume: VolumeName, new: VolumeName, *, linked: bool = False
    ) -> VolumeInfo:
        _not_simulated()


def _not_simulated() -> NoReturn:
    raise NotImplementedError("volumes are made before the story begins")
