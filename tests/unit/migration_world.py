"""Two simulated nodes with real MigrationManagers; only the engines are made up.

A `FakeEngine` does what an engine says, without pages: its passes are told by `Script`, and the
device channels of both ends are joined when the source connects.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hypervisor.simulated.host import SimulatedChannels
from migrator import runner as runner_module
from migrator.engine.spares import EngineSpares
from migrator.engine_driver import EngineSettings
from migrator.engine_messages import DirtySampled
from migrator.errors import PeerError
from migrator.figures import LinkOrigin, LinkSpeed
from migrator.journal import MigrationJournal
from migrator.model import (
    DomainName,
    DomainSpec,
    DomainState,
    Migration,
    MigrationMode,
    MigrationRequest,
    MigrationState,
    NodeName,
    OwnershipState,
    PassKind,
    PassReport,
    PoolName,
    Role,
)
from migrator.ports import HypervisorDriver
from migrator.runner import Session
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from netfabric.simulated.connections import SimulatedConnections
from node_agent.cluster_calls import ClusterCalls
from node_agent.hooks.service import HookService
from node_agent.migrations.checks import DestinationCheck
from node_agent.migrations.cutover import CutoverService
from node_agent.migrations.cutover_settings import CutoverSettings
from node_agent.migrations.forecast import Forecaster
from node_agent.migrations.manager import MigrationManager
from node_agent.migrations.moments import MigrationMoments
from node_agent.migrations.publisher import Publisher
from node_agent.migrations.site import NodeSite
from node_agent.peers.connection import Timing
from node_agent.peers.hub import PeerHub
from tests.unit.agent_world import SimulatedNode, World, open_world, spec_of

WEB = DomainName("web")
FAST = Timing(ping_every_s=0.1, silence_s=0.5, dial_s=1.0, backoff_longest_s=0.1)


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    """TimeoutError if it doesn't hold within 20 s."""
    async with asyncio.timeout(20):
        while not await holds():  # noqa: ASYNC110  What it looks at has no event.
            await asyncio.sleep(0.005)


class Script:
    """What the engines of a test do. `dirty` holds the pages left after each pre-copy pass."""

    def __init__(self, channels: SimulatedChannels) -> None:
        self.channels = channels
        self.dirty: deque[int] = deque()
        self.hold_at_pass: PassKind | None = None
        """The pass that doesn't end by itself."""
        self.running: list[FakeEngine] = []
        self.channel_paths: dict[tuple[str, Role], Path] = {}

    def engine(self, role: Role) -> FakeEngine:
        return next(each for each in self.running if each.session.role is role)


class FakeEngine:
    """In the place of `migrator.engine_driver.EngineDriver`."""

    script: Script
    unheard_s: float | None = None

    def __init__(
        self,
        session: Session,
        *,
        settings: EngineSettings,
        hypervisor: HypervisorDriver,
        device_channel: Path,
        feed: Callable[[v.Event], None],
    ) -> None:
        self.session = session
        self.feed = feed
        self.ending = False
        self._key = (session.migration_id, session.role)
        self.script.channel_paths[self._key] = device_channel
        self.script.running.append(self)

    def perform(self, command: v.Command) -> None:
        script, soon = self.script, asyncio.get_running_loop().call_soon
        match command:
            case v.StartEngine() if self.session.role is Role.DESTINATION:
                soon(self.feed, v.EngineListening(host="fake", port=1, secret=b"s"))
            case v.ConnectEngine():
                ours = script.channel_paths[self._key]
                theirs = script.channel_paths[(self.session.migration_id, Role.DESTINATION)]
                script.channels.link(ours, theirs)
                soon(self.feed, v.EngineConnected(pages_in_use=100, round_trip_ms=0.1))
            case v.RunPass() if command.kind is not script.hold_at_pass:
                soon(self.feed, v.PassFinished(report=self._report(command)))
            case v.StopEngine():
                self.stop()
            case _:
                pass

    def _report(self, command: v.RunPass) -> PassReport:
        final = command.kind is PassKind.FINAL
        left = 0 if final or not self.script.dirty else self.script.dirty.popleft()
        return PassReport(
            number=command.number,
            kind=command.kind,
            seconds=0.01,
            pages=100,
            bytes_sent=409_600,
            pending_pages=left,
        )

    def die(self) -> None:
        """As SIGKILL to the engine."""
        self.feed(v.EngineLost(reason="it was killed by signal 9"))

    def stop(self) -> None:
        if self in self.script.running:
            self.script.running.remove(self)

    def die_slowly(self) -> None:
        """The kernel has closed what it had open, and its end isn't told yet."""
        self.ending = True

    async def end_told(self) -> None:
        await asyncio.sleep(0)
        self.die()

    def warm_up(self) -> None: ...

    def begin_early(self) -> None: ...

    async def arrived(self) -> None: ...

    def limit_bandwidth(self, bandwidth_bytes_per_s: int | None) -> None: ...

    async def drained(self) -> None: ...

    async def close(self) -> None:
        self.stop()


class NoSpares(EngineSpares):
    def refill(self) -> None: ...

    def refill_later(self) -> None: ...


async def _sample(domain: DomainName, seconds: float) -> DirtySampled:
    await asyncio.sleep(seconds)
    return DirtySampled(seconds=seconds, fresh_bytes=0, curve=(), memory_in_use_bytes=1 << 20)


async def _interface() -> LinkSpeed | None:
    return LinkSpeed(bytes_per_s=1e8, origin=LinkOrigin.INTERFACE)


async def _probe(node: NodeName) -> LinkSpeed:
    raise PeerError(f"the link to {node} was not to be probed")


class MigratingNode:
    """A node of `agent_world`, with migrations that move; its agent may be restarted."""

    def __init__(self, node: SimulatedNode, folder: Path) -> None:
        self.node = node
        self.folder = folder
        folder.mkdir(parents=True)
        self.tracker = SimulatedConnections()
        self.manager = self._manager()
        self._address = node.hub.address

    def incoming(self) -> Iterable[DomainSpec]:
        return self.manager.incoming()

    def _manager(self) -> MigrationManager:
        node = self.node
        pools = {PoolName("default"): node.pool}
        node.domains.room.incoming[:] = [self.incoming]
        check = DestinationCheck(
            tls=lambda: None,
            state=self.folder,
            memory_room=node.domains.room,
            hypervisor=node.hypervisor,
            pools=pools,
            fabric=node.fabric,
        )
        publisher = Publisher(node.typed, node.events)
        forecaster = Forecaster(
            node.name,
            hypervisor=node.hypervisor,
            locks=node.domains.locks,
            sample=_sample,
            history=publisher.read_all,
            interface=_interface,
            probe=_probe,
        )
        moments = MigrationMoments(HookService(node.typed, node.events))
        return MigrationManager(
            node.name,
            hub=node.hub,
            hypervisor=node.hypervisor,
            ownership=node.ownership,
            journal=MigrationJournal(self.folder / "journal.sqlite"),
            domains=node.domains,
            records=node.records,
            nodes=node.registry,
            events=node.events,
            publisher=publisher,
            check=check,
            site=NodeSite(
                hub=node.hub,
                hypervisor=node.hypervisor,
                fabric=node.fabric,
                domains=node.domains,
                check=check,
                moments=moments,
                ownership=node.ownership,
                cutover=CutoverService(
                    node.name,
                    hub=node.hub,
                    hypervisor=node.hypervisor,
                    fabric=node.fabric,
                    tracker=self.tracker,
                    nodes=node.registry,
                    events=node.events,
                    publisher=publisher,
                    settings=CutoverSettings(grace_s=0.3, verify_limit_s=20.0),
                ),
            ),
            moments=moments,
            engine=EngineSettings(
                run_directory=self.folder,
                spares=NoSpares(self.folder / "engines.log"),
                bind_address="127.0.0.1",
            ),
            forecaster=forecaster,
            boot_id="boot",
        )

    async def open(self) -> None:
        await self.manager.restore()
        await self.manager.open([])

    async def crash(self) -> None:
        """The agent is gone at once, its guests run on; nothing is said to anybody."""
        node = self.node
        self._address = node.hub.address  # One that is closed doesn't know its port any more.
        for live in self.manager._runners.values():
            live.session.handle = lambda event, now: []  # type: ignore[method-assign]
        await self.manager.close()
        await node.domains.close()
        await node.hub.close()
        await node.hypervisor.close()

    async def restart(self, other: MigratingNode) -> None:
        """A new agent on the same host, at the same address."""
        node = self.node
        peers = {other.node.name: other.node.hub.address}
        node.hub = PeerHub(node.name, self._address, peers, "test", timing=FAST)
        adopted = await node.hypervisor.open()
        self.manager = self._manager()
        ClusterCalls(node.domains, node.takeover, node.migrations).register(node.hub)
        claimed = await self.manager.restore()
        await node.domains.open(adopted, claimed)
        await node.hub.start()
        await self.manager.open(adopted)


class MigrationWorld:
    """Nodes `a` and `b`; the domain `web` runs on `a`."""

    def __init__(self, world: World, script: Script, folder: Path) -> None:
        self.world = world
        self.script = script
        self.a = MigratingNode(world.a, folder / "a")
        self.b = MigratingNode(world.b, folder / "b")

    async def migrate(self, **request: object) -> Migration:
        """All before the switchover: the stand-in for an engine can do nothing else."""
        precopy: dict[str, object] = {"destination": "b", "mode": MigrationMode.PRECOPY}
        values = precopy | request
        return await self.a.manager.create(WEB, MigrationRequest(**values))  # type: ignore[arg-type]

    async def ended(self, migration: Migration) -> Migration:
        """The migration as it is in the store when the source has let go of the domain."""
        locks, publisher = self.a.node.domains.locks, self.a.manager._publisher

        async def is_over() -> bool:
            over = locks.migration_of(WEB) is None
            return over and (await publisher.read(migration.id)).ended

        await eventually(is_over)
        return await publisher.read(migration.id)

    async def until(self, what: Callable[[], bool]) -> None:
        async def holds() -> bool:
            return what()

        await eventually(holds)

    def state(self, node: MigratingNode) -> DomainState | None:
        guest = node.node.host.guests.get(WEB)
        return None if guest is None else guest.state

    def running(self) -> list[str]:
        """Where the guest's vCPUs run."""
        return [
            each.node.name for each in (self.a, self.b) if self.state(each) is DomainState.RUNNING
        ]


@asynccontextmanager
async def migration_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[MigrationWorld]:
    async with open_world(tmp_path / "consoles") as world:
        script = Script(world.channels)
        monkeypatch.setattr(FakeEngine, "script", script, raising=False)
        monkeypatch.setattr(runner_module, "EngineDriver", FakeEngine)
        both = MigrationWorld(world, script, tmp_path)
        try:
            for each in (both.a, both.b):
                await each.open()
            await world.a.domains.define(spec_of())
            await world.a.domains.start(WEB)

            async def know_each_other() -> bool:
                views = await world.a.registry.read()
                return len(views) == 2

            await eventually(know_each_other)
            yield both
        finally:
            for each in (both.a, both.b):
                await each.manager.close()


async def check_back_home(
    world: MigrationWorld, migration: Migration, state: MigrationState
) -> Migration:
    """The migration ended in `state`, and left everything as it was before it."""
    ended = await world.ended(migration)
    assert ended.state is state, ended.error
    assert world.running() == ["a"]
    await world.until(lambda: not world.b.manager._runners)
    assert world.state(world.b) is None
    for each in (world.a, world.b):
        assert each.node.domains.locks.migration_of(WEB) is None
    record = await world.a.node.ownership.read(WEB)
    assert record is not None
    assert (record.owner, record.state) == ("a", OwnershipState.RUNNING)
    assert not world.script.running
    return ended


async def held_in_first_pass(world: MigrationWorld) -> tuple[Migration, Session]:
    """A migration whose first pass doesn't end, and the source's session of it.

    The destination may still be at its volumes and its hypervisor: pages go there first.
    """
    world.script.hold_at_pass = PassKind.FIRST
    began = await world.migrate()
    live = world.a.manager._runners[began.id].session
    await world.until(lambda: live.state is MigrationState.PRECOPY)
    return began, live


async def held_in_precopy(world: MigrationWorld) -> tuple[Migration, Session]:
    """As `held_in_first_pass`, and the destination has all that it needs."""
    began, live = await held_in_first_pass(world)

    def is_up() -> bool:
        arriving = world.b.manager._runners.get(began.id)
        assert arriving is not None, "the destination has given up"
        session = arriving.session
        return isinstance(session, DestinationSession) and session._up

    await world.until(is_up)
    return began, live


def end_first_pass(world: MigrationWorld, *, pending_pages: int = 0) -> None:
    """Of a migration that is held in it; the next one isn't."""
    world.script.hold_at_pass = None
    report = PassReport(
        number=1,
        kind=PassKind.FIRST,
        seconds=0.01,
        pages=100,
        bytes_sent=409_600,
        pending_pages=pending_pages,
    )
    world.script.engine(Role.SOURCE).feed(v.PassFinished(report=report))
