"""The configuration of a lab node's agent, from the lab's plan."""

from __future__ import annotations

from typing import Final

from deploy.lab import storage
from deploy.lab.plan import ETCD_CLIENT_PORT, LabPlan, NodePlan, StoreKind
from migrator.tls import TlsMode
from node_agent.config import (
    AgentConfig,
    ApiTable,
    FabricTable,
    HypervisorTable,
    KnownPeer,
    MigrationTable,
    NodeTable,
    PeerTable,
    StoreTable,
    TlsTable,
    format_endpoint,
    render_config,
)
from storage.settings import DirectorySettings

API_PORT: Final = 7780
PEER_PORT: Final = 7781


def agent_config(plan: LabPlan, node: NodePlan) -> AgentConfig:
    """`node`'s configuration: its management address for everything, one store and pool for all."""
    return AgentConfig(
        node=NodeTable(
            name=node.name,
            state_directory=str(node.state_path),
            memory_bytes=plan.node_memory_bytes,
        ),
        api=ApiTable(
            listen=format_endpoint(node.mgmt_address, API_PORT), socket=str(node.api_socket)
        ),
        peer=PeerTable(listen=format_endpoint(node.mgmt_address, PEER_PORT)),
        migration=MigrationTable(address=node.mgmt_address),
        store=store_table(plan),
        hypervisor=HypervisorTable(),
        fabric=FabricTable(),
        pools=(
            DirectorySettings(name="default", path=str(plan.volumes_path)),
            *storage.pools(plan),
        ),
        tls=TlsTable(mode=TlsMode.REQUIRED if plan.tls else TlsMode.PLAIN),
        peers=tuple(
            KnownPeer(name=other.name, address=format_endpoint(other.mgmt_address, PEER_PORT))
            for other in plan.nodes
            if other.name != node.name and not plan.tls  # Members are in the store.
        ),
    )


def store_table(plan: LabPlan) -> StoreTable:
    """Where the cluster's state is: one file, or the lab's etcd."""
    if plan.store is StoreKind.SQLITE:
        return StoreTable(path=str(plan.store_path))
    return StoreTable(
        driver="etcd",
        endpoints=tuple(
            format_endpoint(member.address, ETCD_CLIENT_PORT) for member in plan.etcd_members
        ),
    )


def agent_config_text(plan: LabPlan, node: NodePlan) -> str:
    """The same as TOML."""
    return render_config(agent_config(plan, node))
