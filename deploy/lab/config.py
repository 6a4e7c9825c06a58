"""The configuration of a lab node's agent, from the lab's plan."""

from __future__ import annotations

from typing import Final

import msgspec

from deploy.lab import frr, storage
from deploy.lab.cables import NODE_UPLINK
from deploy.lab.kinds import (
    FRR_FABRICS,
    OVERLAY_IDENTIFIER,
    OVERLAY_MTU_BYTES,
    FabricKind,
    StoreKind,
)
from deploy.lab.overlay import overlay_of
from deploy.lab.plan import ETCD_CLIENT_PORT, GUEST_BRIDGE, LabPlan, NodePlan
from migrator.tls import TlsMode
from node_agent.config import (
    AgentConfig,
    ApiTable,
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
from node_agent.fabric_config import FabricTable
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
        fabric=fabric_table(plan, node),
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


def fabric_table(plan: LabPlan, node: NodePlan) -> FabricTable:
    """The guests' network: bridges, uplinks, or routes that others are told of."""
    if plan.fabric is FabricKind.BRIDGE:
        return FabricTable()
    if plan.fabric is FabricKind.MACVTAP:
        return FabricTable(driver="macvtap", bridge=GUEST_BRIDGE, uplink=NODE_UPLINK)
    subnets = {each.name: plan.subnet(number) for number, each in enumerate(plan.nodes, 1)}
    own = subnets.pop(node.name)
    if plan.is_overlay:
        overlay = overlay_of(plan, own.address)
        return FabricTable(
            driver="vxlan",
            bridge=overlay.bridge,
            identifier=overlay.identifier,
            local=overlay.local,
            remotes=overlay.remotes,
            evpn=overlay.evpn,
            mtu_bytes=overlay.mtu_bytes,
        )
    table = FabricTable(
        driver="routed",
        bridge=GUEST_BRIDGE,
        local=own.address,
        local6=own.address6,
        gateways=tuple(filter(None, (plan.guest_gateway,))),
    )
    if plan.fabric in FRR_FABRICS:
        directory = str(frr.vty_directory(plan, node.name))
        table = msgspec.structs.replace(table, routes="frr", frr_vty_directory=directory)
        if plan.fabric is FabricKind.EVPN:
            table = msgspec.structs.replace(
                table, evpn=True, identifier=OVERLAY_IDENTIFIER, mtu_bytes=OVERLAY_MTU_BYTES
            )
        return table
    return msgspec.structs.replace(
        table,
        routes="netlink",
        route_peers=(own.router, *(other.address for other in subnets.values())),
        route_key_file=str(plan.route_key_path),
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
