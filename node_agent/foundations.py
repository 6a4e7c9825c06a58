"""What the services of an agent stand on: its store, its drivers, its peers, what they all know.

A part of the composition root (`agent`). What can refuse to start comes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from migrator.errors import ConfigError, words
from migrator.model import DomainName, NodeInfo, NodeName
from migrator.ports import FabricDriver, HypervisorDriver
from node_agent.clocks import ClockWatch
from node_agent.config import AgentConfig
from node_agent.description import describe
from node_agent.domain_records import DomainRecords
from node_agent.drain.cordons import Cordons
from node_agent.drivers import make_hypervisor, make_pools, make_store
from node_agent.events import EventLog
from node_agent.fabrics import make_fabric
from node_agent.hooks.service import HookService
from node_agent.migrations.checks import cordon_reasons
from node_agent.namesake import refuse_namesake
from node_agent.nodes import NodeRegistry
from node_agent.peers.hub import PeerHub
from node_agent.pools import PoolSet
from node_agent.silence import SilenceWatch
from node_agent.state.ownership import StoreOwnership
from node_agent.state.typed import TypedStore
from node_agent.trust.members import Membership
from node_agent.trust.opening import open_trust
from node_agent.trust.service import Trust
from node_agent.version import version
from storage.settings import DirectorySettings

log = logging.getLogger(__name__)

BOOT_ID_PATH: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Foundations:
    """See the module. `hub`, `nodes` and `silences` are made, and for the agent to open."""

    config: AgentConfig
    node: NodeName
    boot_id: str
    typed: TypedStore
    events: EventLog
    members: Membership
    trust: Trust | None
    hypervisor: HypervisorDriver
    adopted: Sequence[DomainName]
    fabric: FabricDriver
    pools: PoolSet
    hub: PeerHub
    nodes: NodeRegistry
    silences: SilenceWatch
    records: DomainRecords
    ownership: StoreOwnership
    hooks: HookService

    @property
    def state(self) -> Path:
        """The node's state directory."""
        return Path(self.config.node.state_directory)

    async def cordon(self) -> list[str]:
        """Why this node takes no domain now: nothing, unless it is cordoned."""
        found = await Cordons(self.typed).read(self.node)
        return [] if found is None else cordon_reasons(self.node, found.state, found.told)


async def open_foundations(
    config: AgentConfig, stack: contextlib.AsyncExitStack, on_removed: Callable[[], None]
) -> Foundations:
    """Make them, and open all that isn't for later. `stack` closes what is open, on errors, too."""
    node = NodeName(config.node.name)
    await asyncio.to_thread(prepare_folders, config)
    boot_id = (await asyncio.to_thread(BOOT_ID_PATH.read_text)).strip()
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
    return Foundations(
        config=config,
        node=node,
        boot_id=boot_id,
        typed=typed,
        events=events,
        members=members,
        trust=trust,
        hypervisor=hypervisor,
        adopted=adopted,
        fabric=fabric,
        pools=pools,
        hub=hub,
        nodes=nodes,
        silences=silences,
        records=DomainRecords(typed, pools.first_name),
        ownership=StoreOwnership(store),
        hooks=HookService(typed, events),
    )


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
