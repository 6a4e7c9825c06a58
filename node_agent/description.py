"""What a node tells the others of itself with each heartbeat."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from migrator.model import NodeInfo, PoolName
from migrator.ports import HypervisorDriver
from node_agent.config import AgentConfig, advertised
from node_agent.migrations import link_speed
from node_agent.trust.members import Membership
from node_agent.version import version


async def describe(
    config: AgentConfig,
    hypervisor: HypervisorDriver,
    pools: Iterable[PoolName],
    boot_id: str,
    members: Membership,
    certificate_until_s: float | None = None,
) -> NodeInfo:
    """This node as it is now."""
    link = await link_speed.of_interface(config.migration.address)
    peer_address, api_address = advertised(config)
    return NodeInfo(
        name=config.node.name,
        api_address=api_address,
        peer_address=peer_address,
        migration_address=config.migration.address,
        memory_bytes=config.node.memory_bytes,
        cpus=os.cpu_count() or 1,
        capabilities=await hypervisor.capabilities(),
        heartbeat_at_s=time.time(),
        agent_version=version(),
        boot_id=boot_id,
        pools=tuple(pools),
        link_bytes_per_s=None if link is None else link.bytes_per_s,
        round_trips_ms=members.round_trips_ms(),
        certificate_until_s=certificate_until_s,
    )
