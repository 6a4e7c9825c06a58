"""Two nodes in one process: everything of an agent but its migrations, on simulated drivers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from hypervisor.simulated.driver import SimulatedHypervisor
from hypervisor.simulated.host import SimulatedChannels, SimulatedHost
from migrator.errors import ConflictError, NotFoundError, RefusedError, WrongStateError
from migrator.figures import DirtyPoint, DirtyRate, LinkOrigin, LinkSpeed, Prediction
from migrator.model import (
    DiskFormat,
    DomainSpec,
    DomainStatus,
    Migration,
    MigrationProgress,
    MigrationRequest,
    MigrationState,
    NodeInfo,
    NodeName,
    PoolName,
    VolumeName,
)
from migrator.prediction import Figures, PackedShares, predict
from netfabric.simulated.driver import SimulatedFabric, SimulatedNetwork
from node_agent.closings import Closings
from node_agent.cluster import ClusterService
from node_agent.cluster_calls import ClusterCalls, guests_of
from node_agent.domain_records import DomainRecords
from node_agent.domain_restart import RestartPolicy
from node_agent.domain_takeover import DomainTakeover
from node_agent.domains import DomainService
from node_agent.events import EventLog
from node_agent.hooks.service import HookService
from node_agent.machines import MachinePinner
from node_agent.memory_room import MemoryRoom
from node_agent.migrations.endings import too_late
from node_agent.migrations.engine_choice import EngineChoice, choose
from node_agent.migrations.outline import MigrationOutline, outline_of
from node_agent.migrations.service import MigrationService
from node_agent.nodes import NodeRegistry
from node_agent.older_store import OtherNodes
from node_agent.peers.hub import PeerHub
from node_agent.pools import PoolSet
from node_agent.restart_notes import RestartNotes, RestartStore
from node_agent.state.memory import SimulatedData, SimulatedStore
from node_agent.state.ownership import StoreOwnership
from node_agent.state.typed import TypedStore
from node_agent.volume_works import VolumeWorks
from node_agent.volumes import VolumeService
from storage.settings import PoolSettings, SimulatedSettings
from storage.simulated import SharedVolumes, SimulatedPool

MAC = "52:54:00:00:00:01"


class VolatileRestarts(RestartStore):
    """Notes in memory, which outlive an agent and no test."""

    def __init__(self) -> None:
        self.notes = RestartNotes()

    async def load(self) -> RestartNotes:
        return self.notes

    async def save(self, notes: RestartNotes) -> None:
        self.notes = notes


class FakeMigrations(MigrationService):
    """Migrations that only a test moves on. `known` is shared by all nodes."""

    def __init__(self, node: NodeName, known: dict[str, Migration]) -> None:
        self.node = node
        self.known = known
        self.reasons: list[str] = []
        self.unpredictable: str | None = None

    async def create(self, domain: str, request: MigrationRequest) -> Migration:
        if reasons := list(await self.check(domain, request)):
            raise RefusedError(f"domain {domain} can't be migrated: {reasons[0]}", reasons)
        migration = Migration(
            id=f"m-{len(self.known) + 1}",
            domain=domain,
            source=self.node,
            destination=request.destination,
            request=request,
            state=MigrationState.PRECOPY,
            progress=MigrationProgress(state=MigrationState.PRECOPY, iteration=1),
            created_at_s=time.time(),
        )
        self.known[migration.id] = migration
        return migration

    async def check(self, domain: str, request: MigrationRequest) -> Sequence[str]:
        return self.reasons

    async def choose_engine(self, domain: str, request: MigrationRequest) -> EngineChoice:
        return choose(request, not_paged=(), not_native=())

    async def dirty_rate(self, domain: str, seconds: float) -> DirtyRate:
        if self.unpredictable is not None:
            raise ConflictError(self.unpredictable)
        return DirtyRate(
            domain=domain,
            node=self.node,
            sampled_at_s=time.time(),
            seconds=seconds,
            pages_per_s=2000.0,
            bytes_per_s=2000.0 * 4096,
            working_set_bytes=8 * 1024**2,
            memory_in_use_bytes=100 * 1024**2,
            zero_share=0.25,
            packed_share=0.5,
            curve=(DirtyPoint(seconds=seconds, bytes=8 * 1024**2),),
        )

    async def stop_in_post_copy(self, domain: str, timeout_s: float) -> bool:
        return False

    async def predict(
        self, domain: str, request: MigrationRequest, sample_seconds: float
    ) -> Prediction:
        rate = await self.dirty_rate(domain, sample_seconds)
        figures = Figures(
            memory_in_use_bytes=rate.memory_in_use_bytes,
            curve=rate.curve,
            link=LinkSpeed(bytes_per_s=1e8, origin=LinkOrigin.PROBE, detail="1.0 MB in 10 ms"),
            zero_share=rate.zero_share,
            packed=PackedShares(memory=rate.packed_share, dirtied=rate.packed_share),
            dirty_rate_origin=f"sampled over {rate.seconds:.1f} s",
        )
        return predict(figures, request)

    async def get(self, id: str) -> Migration:
        if id not in self.known:
            raise NotFoundError(f"there is no migration {id}")
        return self.known[id]

    async def list_migrations(self) -> Sequence[Migration]:
        return list(reversed(self.known.values()))

    async def list_outlines(self) -> Sequence[MigrationOutline]:
        return [outline_of(each) for each in await self.list_migrations()]

    async def list_own(self) -> Sequence[MigrationOutline]:
        return [each for each in await self.list_outlines() if each.source == self.node]

    async def limit(self, id: str, bandwidth_bytes_per_s: int | None) -> Migration:
        migration = await self.get(id)
        if migration.ended:
            raise WrongStateError(f"migration {id}", migration.state, "under way")
        request = msgspec.structs.replace(
            migration.request, bandwidth_bytes_per_s=bandwidth_bytes_per_s
        )
        self.known[id] = msgspec.structs.replace(migration, request=request)
        return self.known[id]

    async def cancel(self, id: str, by: str = "") -> Migration:
        migration = await self.get(id)
        if migration.ended:
            raise too_late(migration, "cancel")
        self.known[id] = msgspec.structs.replace(migration, cancelled_by=by)
        return self.end(id, MigrationState.CANCELLED)

    def end(self, id: str, state: MigrationState, error: str | None = None) -> Migration:
        self.known[id] = msgspec.structs.replace(
            self.known[id],
            state=state,
            error=error,
            ended_at_s=time.time(),
            total_s=1.0,
            blackout_ms=7.5,
        )
        return self.known[id]


class SimulatedNode:
    """One agent's parts, wired as the agent wires them."""

    def __init__(
        self, name: str, world: World, consoles: Path, memory_bytes: int = 4 * 1024**3
    ) -> None:
        self.name = NodeName(name)
        self.memory_bytes = memory_bytes
        self.host = SimulatedHost(world.channels, time.time)
        self.hypervisor = SimulatedHypervisor(self.host, consoles / name)
        self.world = world
        self.pool = SimulatedPool(PoolName("default"), world.volumes, self.name)
        self.fabric = SimulatedFabric(self.name, world.network)
        self.store = SimulatedStore(world.data)
        self.typed = TypedStore(self.store)
        self.pools = PoolSet([SimulatedSettings(name="default")], self._make_pool, self.typed, name)
        self.ownership = StoreOwnership(self.store)
        self.records = DomainRecords(self.typed, self.pools.first_name)
        self.events = EventLog(self.typed, name)
        self.registry = NodeRegistry(self.typed, self._describe, interval_s=0.05, settle_s=0.0)
        self.works = VolumeWorks(self.typed, self.name, self.pools)
        self.restarts = VolatileRestarts()
        self.clock: Callable[[], float] = time.time
        self.domains = self.make_domains()
        self.takeover = DomainTakeover(
            self.name,
            domains=self.domains,
            pools={PoolName("default"): self.pool},
            ownership=self.ownership,
            records=self.records,
            nodes=self.registry.read,
            reach=self._reach,
            events=self.events,
        )
        self.migrations = FakeMigrations(self.name, world.migrations)
        self.hub = PeerHub(self.name, ("127.0.0.1", 0), {}, "test")
        ClusterCalls(self.domains, self.takeover, self.migrations).register(self.hub)
        self.cluster = ClusterService(
            self.name,
            hub=self.hub,
            domains=self.domains,
            records=self.records,
            ownership=self.ownership,
            migrations=self.migrations,
            nodes=self.registry,
            volumes=VolumeService(
                self.pools, self.records, self.events, self.works, self.registry.names
            ),
            events=self.events,
            hooks=HookService(self.typed, self.events),
        )

    def _wall(self) -> float:
        return self.clock()

    def make_domains(self, boot_id: str = "boot-1", *, restart: bool = True) -> DomainService:
        """An agent's, in that boot of the host."""
        return DomainService(
            self.name,
            hypervisor=self.hypervisor,
            pools=self.pools,
            fabric=self.fabric,
            ownership=self.ownership,
            records=self.records,
            events=self.events,
            pin_machine=MachinePinner(self.registry),
            claim=self.pools.claim,
            others=OtherNodes(self.name, self.registry.read, self._guests_of),
            closings=Closings(self.pools, self.hypervisor.launched_all),
            works=self.works,
            room=MemoryRoom(self.name, self.hypervisor, self.records, self.memory_bytes),
            restart=RestartPolicy(
                boot_id=boot_id, store=self.restarts, enabled=restart, clock=self._wall
            ),
        )

    async def _guests_of(self, node: NodeName) -> Sequence[DomainStatus]:
        return await guests_of(self.hub, node)

    def _make_pool(self, settings: PoolSettings) -> SimulatedPool:
        if settings.name == self.pool.pool:
            return self.pool
        shared = self.world.shared_volumes.setdefault(settings.name, SharedVolumes())
        return SimulatedPool(PoolName(settings.name), shared, self.name)

    async def _reach(self, node: NodeName) -> None:
        await self.hub.reach(node)

    async def _describe(self) -> NodeInfo:
        return NodeInfo(
            name=self.name,
            api_address="127.0.0.1:1",
            peer_address="127.0.0.1:2",
            migration_address="127.0.0.1",
            memory_bytes=self.memory_bytes,
            cpus=2,
            capabilities=await self.hypervisor.capabilities(),
            heartbeat_at_s=0,
            agent_version="test",
            pools=tuple(sorted(self.pools)),
        )

    async def open(self) -> None:
        await self.store.open()
        await self.pools.open()
        await self.events.open()
        await self.registry.open()
        await self.hub.start()
        await self.domains.open(await self.hypervisor.open())

    async def close(self) -> None:
        await self.domains.close()
        await self.hypervisor.close()
        await self.hub.close()
        await self.registry.close()
        await self.events.close()
        await self.fabric.close()
        for domain in tuple(self.host.guests):
            self.host.kill(domain)
        await self.pools.close()
        await self.store.close()


class World:
    """What the nodes share, and the nodes `a` and `b`."""

    def __init__(self, consoles: Path) -> None:
        self.channels = SimulatedChannels()
        self.volumes = SharedVolumes()
        self.shared_volumes = {"default": self.volumes}
        self.network = SimulatedNetwork()
        self.data = SimulatedData()
        self.migrations: dict[str, Migration] = {}
        self.a = SimulatedNode("a", self, consoles)
        self.b = SimulatedNode("b", self, consoles)


@asynccontextmanager
async def open_world(consoles: Path) -> AsyncIterator[World]:
    """A world that runs, with one volume `root`."""
    world = World(consoles)
    try:
        for node in (world.a, world.b):
            await node.open()
        for node, other in ((world.a, world.b), (world.b, world.a)):
            node.hub.set_peers({other.name: other.hub.address})
        await world.a.pool.create(VolumeName("root"), capacity_bytes=1024**2, format=DiskFormat.RAW)
        yield world
    finally:
        for node in (world.a, world.b):
            await node.close()


def spec_of(name: str = "web", **changes: object) -> DomainSpec:
    """A domain with one disk and one NIC."""
    values: dict[str, object] = {
        "name": name,
        "memory_bytes": 64 * 1024**2,
        "disks": [{"volume": "root"}],
        "nics": [{"mac": MAC, "bridge": "br0", "addresses": ["10.0.0.7"]}],
    }
    return msgspec.convert(values | changes, DomainSpec)
