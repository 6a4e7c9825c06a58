"""The composition root: one node's agent, put together from its configuration.

The only module that knows the drivers by name. Order of the start: what can refuse to start comes
first (store, journal, hypervisor), adoption and recovery before anybody may ask for anything,
the API last: it answers only when the node is whole. The end goes backwards, and leaves guests be.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

from hypervisor.qemu.driver import QemuDriver
from migrator import cores
from migrator.dirty_sampler import DirtySampler
from migrator.engine.spares import EngineSpares
from migrator.engine_driver import EngineSettings
from migrator.errors import ConfigError, RemovedError, words
from migrator.figures import LinkSpeed
from migrator.journal import MigrationJournal
from migrator.model import NodeInfo, NodeName, PoolName
from migrator.ports import FabricDriver, HypervisorDriver, VolumeDriver
from migrator.tls import TlsFiles, files_of_node
from node_agent import loop_monitor
from node_agent.api.server import ApiServer, create_app
from node_agent.clocks import ClockWatch
from node_agent.closings import of_node
from node_agent.cluster import ClusterService
from node_agent.cluster_calls import ClusterCalls, guests_of
from node_agent.config import AgentConfig
from node_agent.consoles import Consoles
from node_agent.description import describe
from node_agent.domain_records import DomainRecords
from node_agent.domain_restart import RestartPolicy
from node_agent.domain_takeover import DomainTakeover
from node_agent.domains import DomainService
from node_agent.drain.cordons import Cordons
from node_agent.drain.figures import FiguresService
from node_agent.drain.hooks import ClusterHooks
from node_agent.drain.service import DrainService
from node_agent.drain.usage import UsageMeter
from node_agent.drain.world import DrainWorld
from node_agent.events import EventKind, EventLog
from node_agent.fabrics import make_fabric, make_tracker
from node_agent.hooks.service import HookService
from node_agent.log_lines import LogLines
from node_agent.machines import MachinePinner
from node_agent.memory_room import MemoryRoom
from node_agent.migrations import link_speed
from node_agent.migrations.checks import DestinationCheck, cordon_reasons
from node_agent.migrations.cutover import CutoverService
from node_agent.migrations.cutover_settings import CutoverSettings
from node_agent.migrations.forecast import Forecaster
from node_agent.migrations.link_probe import LinkProbe
from node_agent.migrations.manager import MigrationManager
from node_agent.migrations.moments import MigrationMoments
from node_agent.migrations.publisher import Publisher
from node_agent.migrations.removed_peers import part_with
from node_agent.migrations.site import NodeSite
from node_agent.namesake import refuse_namesake
from node_agent.nodes import NodeRegistry
from node_agent.older_store import OtherNodes
from node_agent.peers.hub import PeerHub
from node_agent.pools import PoolSet
from node_agent.pressure.service import PressureService
from node_agent.restart_notes import RestartFile
from node_agent.silence import SilenceWatch
from node_agent.state.etcd import EtcdSettings, EtcdStore
from node_agent.state.ownership import StoreOwnership
from node_agent.state.port import StateStore
from node_agent.state.sqlite import SqliteStore
from node_agent.state.typed import TypedStore
from node_agent.storage_watch import StorageWatch
from node_agent.trust.members import Membership, was_removed
from node_agent.trust.opening import open_trust, wait_for_membership
from node_agent.trust.removal import NodeRemoval
from node_agent.version import version
from node_agent.volume_works import VolumeWorks
from node_agent.volumes import VolumeService
from storage.drivers import make_pool
from storage.settings import DirectorySettings

log = logging.getLogger(__name__)

BOOT_ID_PATH: Final = Path("/proc/sys/kernel/random/boot_id")


def make_store(config: AgentConfig) -> StateStore:
    table = config.store
    if table.driver == SqliteStore.name:
        return SqliteStore(Path(table.path))
    tls = TlsFiles(
        authority_path=table.tls_authority,
        certificate_path=table.tls_certificate,
        key_path=table.tls_key,
    )
    return EtcdStore(
        EtcdSettings(
            endpoints=table.members, prefix=table.prefix, tls=tls if table.tls_authority else None
        )
    )


def make_hypervisor(config: AgentConfig) -> HypervisorDriver:
    table = config.hypervisor
    return QemuDriver(
        Path(config.node.state_directory) / "qemu",
        binary=table.binary,
        accelerator=table.accelerator,
    )


def make_pools(config: AgentConfig, store: TypedStore) -> PoolSet:
    node, state = NodeName(config.node.name), Path(config.node.state_directory) / "storage"
    return PoolSet(config.pools, lambda settings: make_pool(settings, node, state), store, node)


def prepare_folders(config: AgentConfig) -> None:
    """Make the state directory's folders. ConfigError names the key whose path can't be used."""
    state = Path(config.node.state_directory)
    try:
        for directory in (state / "run", state / "logs"):
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"node.state_directory: {state} can't be used: {words(error)}") from error
    for index, pool in enumerate(config.pools):
        if isinstance(pool, DirectorySettings) and not Path(pool.path).is_dir():
            # It may be mounted later: no reason to leave the node's guests without an agent.
            log.warning("pools[%d].path: there is no folder %s (now)", index, pool.path)


@contextlib.asynccontextmanager
async def running_agent(
    config: AgentConfig, on_removed: Callable[[], None] = lambda: None
) -> AsyncIterator[Membership]:
    """A whole agent while the body runs. Errors of the start leave nothing behind but logs.

    `on_removed` is called when the node was removed from the cluster: the body should end.
    """
    node = NodeName(config.node.name)
    await asyncio.to_thread(prepare_folders, config)
    boot_id = (await asyncio.to_thread(BOOT_ID_PATH.read_text)).strip()
    async with contextlib.AsyncExitStack() as stack:
        store = make_store(config)
        await store.open()
        stack.push_async_callback(store.close)
        typed = TypedStore(store)
        events = EventLog(typed, node)
        await events.open()
        stack.push_async_callback(events.close)
        members = Membership(node, typed, static=config.peer_addresses, on_removed=on_removed)
        trust = await open_trust(config, typed, events, members)
        await refuse_namesake(typed, node, boot_id)
        hypervisor = make_hypervisor(config)
        adopted = await hypervisor.open()
        stack.push_async_callback(hypervisor.close)
        fabric = make_fabric(config)
        stack.push_async_callback(fabric.close)
        pools = make_pools(config, typed)
        await pools.open()
        stack.push_async_callback(pools.close)
        await fabric.open()
        hub = PeerHub(
            node,
            config.peer.listen_address,
            members.peers(),  # Who dials us in our first second is no stranger.
            version(),
            ssl_contexts=None if trust is None else trust.contexts.peers,
            admit=members.admit,
        )

        async def described() -> NodeInfo:
            until_s = None if trust is None else trust.certificate.not_after_s
            return await describe(config, hypervisor, pools, boot_id, members, until_s)

        nodes = NodeRegistry(typed, described)
        silences = SilenceWatch(node, typed, events)
        nodes.on_read = (members.saw, silences.saw, ClockWatch(node, events).saw)
        nodes.counts = members.counts
        cordons = Cordons(typed)

        async def cordon() -> list[str]:
            found = await cordons.read(node)
            return [] if found is None else cordon_reasons(node, found.state, found.told)

        records, ownership = DomainRecords(typed, pools.first_name), StoreOwnership(store)
        works = VolumeWorks(typed, node, pools)
        storage = StorageWatch(node, hypervisor=hypervisor, pools=pools, events=events)
        hooks = HookService(typed, events)
        domains = DomainService(
            node,
            hypervisor=hypervisor,
            pools=pools,
            fabric=fabric,
            ownership=ownership,
            records=records,
            events=events,
            pin_machine=MachinePinner(nodes),
            cordon=cordon,
            claim=pools.claim,
            storage=storage,
            consoles=Consoles(hypervisor, records),
            others=OtherNodes(node, nodes.read, functools.partial(guests_of, hub)),
            closings=of_node(Path(config.node.state_directory), pools, hypervisor),
            works=works,
            room=MemoryRoom(node, hypervisor, records, config.node.memory_bytes),
            restart=RestartPolicy(
                boot_id=boot_id,
                store=RestartFile(Path(config.node.state_directory) / "restarts.json"),
                enabled=config.node.restart_crashed,
            ),
        )
        link = LinkProbe(hub, config.migration.address)
        link.register()
        stack.push_async_callback(link.close)
        migrations = make_migrations(
            config,
            link=link,
            hub=hub,
            hypervisor=hypervisor,
            fabric=fabric,
            pools=pools,
            domains=domains,
            records=records,
            ownership=ownership,
            nodes=nodes,
            events=events,
            typed=typed,
            hooks=hooks,
            boot_id=boot_id,
            cordon=cordon,
        )
        claimed = await migrations.restore()
        stack.push_async_callback(migrations.close)
        await domains.open(adopted, claimed)
        stack.push_async_callback(domains.close)
        storage.open()
        stack.push_async_callback(storage.close)
        takeover = DomainTakeover(
            node,
            domains=domains,
            pools=pools,
            ownership=ownership,
            records=records,
            nodes=nodes.read,
            reach=hub.reach,
            events=events,
        )
        ClusterCalls(domains, takeover, migrations).register(hub)
        if trust is not None:
            trust.attach(hub)
        await hub.start()
        stack.push_async_callback(hub.close)
        silences.open()
        stack.push_async_callback(silences.close)
        await nodes.open()
        stack.push_async_callback(nodes.close)
        members.on_gone = lambda gone: part_with(gone, migrations.active_with(gone))
        members.open(hub)
        stack.push_async_callback(members.close)
        await migrations.open(adopted)
        cluster = ClusterService(
            node,
            hub=hub,
            domains=domains,
            records=records,
            ownership=ownership,
            migrations=migrations,
            nodes=nodes,
            volumes=VolumeService(pools, records, events, works, nodes.names),
            events=events,
            hooks=hooks,
        )
        usage = UsageMeter(hypervisor)
        usage.register(hub)
        usage.open()
        stack.push_async_callback(usage.close)
        world = DrainWorld(cluster, hub=hub, nodes=nodes, records=records, ownership=ownership)
        drains = DrainService(
            node,
            store=typed,
            world=world,
            hub=hub,
            events=events,
            hooks=ClusterHooks(hooks),
        )
        await drains.open()
        stack.push_async_callback(drains.close)
        removal = NodeRemoval(
            node,
            typed,
            nodes=nodes,
            records=records,
            migrations=migrations,
            secured=trust is not None,
        )
        api = ApiServer(
            create_app(
                cluster,
                drains=drains,
                version=version(),
                trust=trust,
                removal=removal,
                pressure=PressureService(typed, world, events),
            ),
            listen=config.api.listen_address,
            socket_path=Path(config.api.socket),
            ssl_context=None if trust is None else trust.contexts.api,
        )
        await api.start()
        stack.push_async_callback(api.close)
        if trust is not None:
            await trust.start()
            stack.push_async_callback(trust.close)
        silent = f" after {nodes.silent_s:.0f} s of silence" if nodes.silent_s is not None else ""
        up = f"the agent of {node} is up{silent}"
        events.emit(EventKind.AGENT_STARTED, up, adopted=len(adopted))
        yield members


def make_migrations(
    config: AgentConfig,
    *,
    link: LinkProbe,
    hub: PeerHub,
    hypervisor: HypervisorDriver,
    fabric: FabricDriver,
    pools: Mapping[PoolName, VolumeDriver],
    domains: DomainService,
    records: DomainRecords,
    ownership: StoreOwnership,
    nodes: NodeRegistry,
    events: EventLog,
    typed: TypedStore,
    hooks: HookService,
    boot_id: str,
    cordon: Callable[[], Awaitable[list[str]]],
) -> MigrationManager:
    """The migration service of this node."""
    state = Path(config.node.state_directory)
    publisher = Publisher(typed, events)
    tls = functools.partial(files_of_node, state, config.tls.mode)
    check = DestinationCheck(
        memory_room=domains.room,
        hypervisor=hypervisor,
        pools=pools,
        fabric=fabric,
        tls=tls,
        state=state,
        cordon=cordon,
    )
    moments = MigrationMoments(hooks)

    async def interface() -> LinkSpeed | None:
        return await link_speed.of_interface(config.migration.address)

    spares = EngineSpares(state / "logs" / "engines.log")
    forecaster = Forecaster(
        NodeName(config.node.name),
        hypervisor=hypervisor,
        locks=domains.locks,
        sample=DirtySampler(hypervisor.memory, spares.log_path).sample,
        history=publisher.read_all,
        interface=interface,
        probe=link.measure,
    )
    FiguresService(forecaster, interface, link.measure).register(hub)
    cutover = CutoverService(
        NodeName(config.node.name),
        hub=hub,
        hypervisor=hypervisor,
        fabric=fabric,
        tracker=make_tracker(),
        nodes=nodes,
        events=events,
        publisher=publisher,
        settings=CutoverSettings.of(config),
    )
    manager = MigrationManager(
        NodeName(config.node.name),
        hub=hub,
        hypervisor=hypervisor,
        ownership=ownership,
        journal=MigrationJournal(state / "journal.sqlite"),
        domains=domains,
        records=records,
        nodes=nodes,
        events=events,
        publisher=publisher,
        check=check,
        site=NodeSite(
            hub=hub,
            hypervisor=hypervisor,
            fabric=fabric,
            domains=domains,
            check=check,
            moments=moments,
            ownership=ownership,
            cutover=cutover,
        ),
        moments=moments,
        engine=EngineSettings(
            run_directory=state / "run",
            spares=spares,
            bind_address=config.migration.address,
            streams=config.migration.streams,
            link_bytes_per_s=lambda: link_speed.interface_bytes_per_s(config.migration.address),
            tls=tls,
        ),
        forecaster=forecaster,
        boot_id=boot_id,
    )
    domains.room.incoming.append(manager.incoming)  # The two know each other.
    return manager


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
    logging.basicConfig(level=logging.INFO, handlers=[lines])
    cores.favour_ourselves()
    with asyncio.Runner(loop_factory=loop_monitor.monitored_loop) as runner:
        runner.run(serve(config))
