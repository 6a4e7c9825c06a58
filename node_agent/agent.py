"""The composition root: one node's agent, put together from its configuration.

With `foundations`, `drivers` and `fabrics` the only modules that know the drivers by name. Order of
the start: what can refuse to start comes first (store, journal, hypervisor), adoption and recovery
before anybody may ask for anything, the API last: it answers only when the node is whole. The end
goes backwards, and leaves guests be.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from migrator import cores
from migrator.dirty_sampler import DirtySampler
from migrator.engine.spares import EngineSpares
from migrator.engine_driver import EngineSettings
from migrator.errors import RemovedError
from migrator.figures import LinkSpeed
from migrator.journal import MigrationJournal
from migrator.tls import files_of_node
from node_agent import loop_monitor
from node_agent.api.server import ApiServer, create_app
from node_agent.closings import of_node
from node_agent.cluster import ClusterService
from node_agent.cluster_calls import ClusterCalls, guests_of
from node_agent.config import AgentConfig
from node_agent.consoles import Consoles
from node_agent.domain_restart import RestartPolicy
from node_agent.domain_takeover import DomainTakeover
from node_agent.domains import DomainService
from node_agent.drain.figures import FiguresService
from node_agent.drain.hooks import ClusterHooks
from node_agent.drain.service import DrainService
from node_agent.drain.usage import UsageMeter
from node_agent.drain.world import DrainWorld
from node_agent.events import EventKind
from node_agent.fabrics import make_tracker
from node_agent.foundations import Foundations, open_foundations
from node_agent.host_shutdown import HostShutdown
from node_agent.log_lines import FewerRepeats, LogLines
from node_agent.machines import MachinePinner
from node_agent.memory_room import MemoryRoom
from node_agent.migrations import link_speed
from node_agent.migrations.checks import DestinationCheck
from node_agent.migrations.cutover import CutoverService
from node_agent.migrations.cutover_settings import CutoverSettings
from node_agent.migrations.forecast import Forecaster
from node_agent.migrations.link_probe import LinkProbe
from node_agent.migrations.manager import MigrationManager
from node_agent.migrations.moments import MigrationMoments
from node_agent.migrations.publisher import Publisher
from node_agent.migrations.removed_peers import part_with
from node_agent.migrations.site import NodeSite
from node_agent.older_store import OtherNodes
from node_agent.pressure.service import PressureService
from node_agent.restart_notes import RestartFile
from node_agent.storage_watch import StorageWatch
from node_agent.threads_ahead import begin_threads, watch_programs
from node_agent.trust.members import Membership, was_removed
from node_agent.trust.opening import wait_for_membership
from node_agent.trust.removal import NodeRemoval
from node_agent.version import version
from node_agent.volume_works import VolumeWorks
from node_agent.volumes import VolumeService

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def running_agent(
    config: AgentConfig, on_removed: Callable[[], None] = lambda: None
) -> AsyncIterator[Membership]:
    """A whole agent while the body runs. Errors of the start leave nothing behind but logs.

    `on_removed` is called when the node was removed from the cluster: the body should end.
    """
    async with contextlib.AsyncExitStack() as stack:
        on = await open_foundations(config, stack, on_removed)
        hub, nodes, members, trust = on.hub, on.nodes, on.members, on.trust
        works = VolumeWorks(on.typed, on.node, on.pools)
        storage = StorageWatch(on.node, hypervisor=on.hypervisor, pools=on.pools, events=on.events)
        domains = _make_domains(on, works, storage)
        link = LinkProbe(hub, config.migration.address)
        link.register()
        stack.push_async_callback(link.close)
        migrations = _make_migrations(on, domains, link)
        claimed = await migrations.restore()
        stack.push_async_callback(migrations.close)
        await domains.open(on.adopted, claimed)
        stack.push_async_callback(domains.close)
        storage.open()
        stack.push_async_callback(storage.close)
        ClusterCalls(domains, _make_takeover(on, domains), migrations).register(hub)
        if trust is not None:
            trust.attach(hub)
        await hub.start()
        stack.push_async_callback(hub.close)
        on.silences.open()
        stack.push_async_callback(on.silences.close)
        await nodes.open()
        stack.push_async_callback(nodes.close)
        members.on_gone = lambda gone: part_with(gone, migrations.active_with(gone))
        members.open(hub)
        stack.push_async_callback(members.close)
        await migrations.open(on.adopted)
        cluster = _make_cluster(on, domains, migrations, works)
        usage = UsageMeter(on.hypervisor)
        usage.register(hub)
        usage.open()
        stack.push_async_callback(usage.close)
        world = DrainWorld(
            cluster, hub=hub, nodes=nodes, records=on.records, ownership=on.ownership
        )
        drains = _make_drains(on, world)
        await drains.open()
        stack.push_async_callback(drains.close)
        shutdown = HostShutdown(
            on.node,
            hypervisor=on.hypervisor,
            domains=domains,
            cancel=cluster.cancel_migration,
            events=on.events,
        )
        api = _make_api(on, cluster, migrations, drains, world, shutdown)
        await api.start()
        stack.push_async_callback(api.close)
        if trust is not None:
            await trust.start()
            stack.push_async_callback(trust.close)
        stack.push_async_callback(migrations.standstill.over)
        silent = f" after {nodes.silent_s:.0f} s of silence" if nodes.silent_s is not None else ""
        up = f"the agent of {on.node} is up{silent}"
        on.events.emit(EventKind.AGENT_STARTED, up, adopted=len(on.adopted))
        yield members


def _make_domains(on: Foundations, works: VolumeWorks, storage: StorageWatch) -> DomainService:
    domains = DomainService(
        on.node,
        hypervisor=on.hypervisor,
        pools=on.pools,
        fabric=on.fabric,
        ownership=on.ownership,
        records=on.records,
        events=on.events,
        pin_machine=MachinePinner(on.nodes),
        cordon=on.cordon,
        claim=on.pools.claim,
        storage=storage,
        consoles=Consoles(on.hypervisor, on.records),
        others=OtherNodes(on.node, on.nodes.read, functools.partial(guests_of, on.hub)),
        closings=of_node(on.state, on.pools, on.hypervisor),
        works=works,
        room=MemoryRoom(on.node, on.hypervisor, on.records, on.config.node.memory_bytes),
        restart=RestartPolicy(
            boot_id=on.boot_id,
            store=RestartFile(on.state / "restarts.json"),
            enabled=on.config.node.restart_crashed,
        ),
    )
    restarts = domains.ownership.restarts
    on.nodes.goes_down = lambda: restarts.host_ends
    return domains


def _make_takeover(on: Foundations, domains: DomainService) -> DomainTakeover:
    return DomainTakeover(
        on.node,
        domains=domains,
        pools=on.pools,
        ownership=on.ownership,
        records=on.records,
        nodes=on.nodes.read,
        reach=on.hub.reach,
        events=on.events,
    )


def _make_cluster(
    on: Foundations, domains: DomainService, migrations: MigrationManager, works: VolumeWorks
) -> ClusterService:
    return ClusterService(
        on.node,
        hub=on.hub,
        domains=domains,
        records=on.records,
        ownership=on.ownership,
        migrations=migrations,
        nodes=on.nodes,
        volumes=VolumeService(on.pools, on.records, on.events, works, on.nodes.names),
        events=on.events,
        hooks=on.hooks,
    )


def _make_drains(on: Foundations, world: DrainWorld) -> DrainService:
    return DrainService(
        on.node,
        store=on.typed,
        world=world,
        hub=on.hub,
        events=on.events,
        hooks=ClusterHooks(on.hooks),
    )


def _make_api(
    on: Foundations,
    cluster: ClusterService,
    migrations: MigrationManager,
    drains: DrainService,
    world: DrainWorld,
    shutdown: HostShutdown,
) -> ApiServer:
    removal = NodeRemoval(
        on.node,
        on.typed,
        nodes=on.nodes,
        records=on.records,
        migrations=migrations,
        secured=on.trust is not None,
    )
    return ApiServer(
        create_app(
            cluster,
            drains=drains,
            version=version(),
            trust=on.trust,
            removal=removal,
            pressure=PressureService(on.typed, world, on.events),
            shutdown=shutdown,
        ),
        listen=on.config.api.listen_address,
        socket_path=Path(on.config.api.socket),
        ssl_context=None if on.trust is None else on.trust.contexts.api,
    )


def _make_migrations(on: Foundations, domains: DomainService, link: LinkProbe) -> MigrationManager:
    address = on.config.migration.address
    publisher = Publisher(on.typed, on.events)
    tls = functools.partial(files_of_node, on.state, on.config.tls.mode)
    check = DestinationCheck(
        memory_room=domains.room,
        hypervisor=on.hypervisor,
        pools=on.pools,
        fabric=on.fabric,
        tls=tls,
        state=on.state,
        cordon=domains.closed,
    )
    moments = MigrationMoments(on.hooks)
    spares = EngineSpares(on.state / "logs" / "engines.log")
    forecaster = _make_forecaster(on, domains, link, publisher, spares)
    cutover = CutoverService(
        on.node,
        hub=on.hub,
        hypervisor=on.hypervisor,
        fabric=on.fabric,
        tracker=make_tracker(),
        nodes=on.nodes,
        events=on.events,
        publisher=publisher,
        settings=CutoverSettings.of(on.config),
    )
    manager = MigrationManager(
        on.node,
        hub=on.hub,
        hypervisor=on.hypervisor,
        ownership=on.ownership,
        journal=MigrationJournal(on.state / "journal.sqlite"),
        domains=domains,
        records=on.records,
        nodes=on.nodes,
        events=on.events,
        publisher=publisher,
        check=check,
        site=NodeSite(
            hub=on.hub,
            hypervisor=on.hypervisor,
            fabric=on.fabric,
            domains=domains,
            check=check,
            moments=moments,
            ownership=on.ownership,
            cutover=cutover,
        ),
        moments=moments,
        engine=EngineSettings(
            run_directory=on.state / "run",
            spares=spares,
            bind_address=address,
            streams=on.config.migration.streams,
            link_bytes_per_s=lambda: link_speed.interface_bytes_per_s(address),
            tls=tls,
        ),
        forecaster=forecaster,
        boot_id=on.boot_id,
    )
    domains.room.incoming.append(manager.incoming)  # The two know each other.
    return manager


def _make_forecaster(
    on: Foundations,
    domains: DomainService,
    link: LinkProbe,
    publisher: Publisher,
    spares: EngineSpares,
) -> Forecaster:
    async def interface() -> LinkSpeed | None:
        return await link_speed.of_interface(on.config.migration.address)

    forecaster = Forecaster(
        on.node,
        hypervisor=on.hypervisor,
        locks=domains.locks,
        sample=DirtySampler(on.hypervisor.memory, spares.log_path).sample,
        history=publisher.read_all,
        interface=interface,
        probe=link.measure,
    )
    FiguresService(forecaster, interface, link.measure).register(on.hub)
    return forecaster


async def serve(config: AgentConfig) -> None:
    """Run until SIGTERM or SIGINT. RemovedError: this node isn't of the cluster any more."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if not await wait_for_membership(config, stop):
        return
    async with running_agent(config, on_removed=stop.set) as members:
        gc.freeze()  # What has come by now stays: no collection need go through it again.
        if (monitor := loop_monitor.current()) is not None:
            monitor.reset()  # The start may block: nobody is served yet.
        log.info("agent %s of node %s is ready", version(), config.node.name)
        await stop.wait()
        log.info("agent of node %s is ending; its guests go on", config.node.name)
    if members.removed:
        raise RemovedError(was_removed(config.node.name))


def run(config: AgentConfig) -> None:
    """Blocking: the whole life of an agent process."""
    lines = logging.StreamHandler()
    lines.setFormatter(LogLines("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    lines.addFilter(FewerRepeats())
    logging.basicConfig(level=logging.INFO, handlers=[lines])
    cores.favour_ourselves()
    with asyncio.Runner(loop_factory=loop_monitor.monitored_loop) as runner:
        begin_threads(runner.get_loop())
        watch_programs(runner.get_loop())
        runner.run(serve(config))
