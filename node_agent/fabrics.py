"""The guests' network of a node, made as its configuration says: the fabric, and its routes.

A part of the composition root (`agent`), which names drivers.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Final

from migrator.errors import ConfigError, words
from migrator.ports import ConnectionTracker, FabricDriver, RouteDriver
from netfabric import leading
from netfabric.bridge import BridgeFabric
from netfabric.connections import KernelConnections
from netfabric.macvtap import MacvtapFabric, MacvtapNetwork
from netfabric.routed import RoutedFabric, RoutedNetwork, overlay_probing
from netfabric.routes.frr import reach
from netfabric.routes.frr.driver import FrrRoutes
from netfabric.routes.frr.vtysh import Vtysh
from netfabric.routes.netlink.driver import NetlinkRoutes
from netfabric.routes.netlink.messages import KEY_BYTES_MIN
from netfabric.routes.netlink.speaker import SpeakerSettings
from netfabric.routes.nobody import NobodyRoutes
from netfabric.vxlan import Overlay, VxlanFabric
from node_agent.config import AgentConfig
from node_agent.fabric_config import FabricTable
from node_agent.hooks.routes import WebhookRoutes

_KEY_BYTES_MAX: Final = 4096


def make_fabric(config: AgentConfig) -> FabricDriver:
    """ConfigError: a key file that can't be read."""
    match config.fabric.driver:
        case "vxlan":
            return VxlanFabric(Overlay.of(config.fabric, config.migration.address))
        case "routed":
            network = routed_network(config)
            return RoutedFabric(network, make_routes(config, network))
        case "macvtap":
            return MacvtapFabric(MacvtapNetwork(config.fabric.bridge, config.fabric.uplink))
        case _:
            return BridgeFabric()


def make_tracker() -> ConnectionTracker:
    """Who knows the guests' connections."""
    return KernelConnections()


def routed_network(config: AgentConfig) -> RoutedNetwork:
    """As the configuration has it."""
    table = config.fabric
    local = (table.local or config.migration.address, *filter(None, (table.local6,)))
    overlay = Overlay.of(table, config.migration.address) if table.evpn else None
    return RoutedNetwork(name=table.bridge, local=local, gateways=table.gateways, overlay=overlay)


def make_routes(config: AgentConfig, network: RoutedNetwork) -> RouteDriver:
    """Who tells the routers."""
    table = config.fabric
    if table.routes == "netlink":
        settings = SpeakerSettings(
            listen=network.local[0],
            port=table.route_port,
            key=_key(table.route_key_file),
            own_hops=network.local,
        )
        return NetlinkRoutes(settings, table.route_peers)
    if table.routes == "webhook":
        secret = _key(table.route_key_file).decode(errors="replace")
        return WebhookRoutes(table.route_url, secret, node=config.node.name, hops=network.local)
    if table.routes == "frr":
        return FrrRoutes(Path(table.frr_vty_directory), evpn_identifier(table))
    return NobodyRoutes()


def evpn_identifier(table: FabricTable) -> int | None:
    """Of the VXLAN into which FRR routes; None where it routes plainly."""
    return table.identifier if table.evpn else None


async def frr_reason(table: FabricTable, local: tuple[str, ...]) -> str:
    """Why the node's FRR could tell nobody where a routed guest is; "" if it could. FabricError.

    `local`: the node's own addresses in the network, one of each IP version that guests have.
    """
    versions = {ipaddress.ip_address(text).version for text in local}
    vtysh = Vtysh(Path(table.frr_vty_directory))
    return await reach.cut_off(vtysh, versions, evpn_identifier(table))


def carried_bytes(config: AgentConfig) -> int:
    """The MTU that the node's interface must have for full frames of its overlay."""
    return Overlay.of(config.fabric, config.migration.address).carried_bytes


def overlay_ends(table: FabricTable) -> dict[str, bool]:
    """EVPN's: which ends routes lead to, and whether FRR has entered how. FabricError."""
    return overlay_probing.ends(table.bridge)


def leading_obstacle(config: AgentConfig) -> Callable[[], str] | None:
    """What finds out why guests' frames can't be led into tunnels here, by the fabrics that do that
    (`leading.obstacle`); None: this node's doesn't.
    """
    leads = config.fabric.driver == "macvtap" or (
        config.fabric.driver == "vxlan" and config.fabric.evpn
    )
    return leading.obstacle if leads else None


def _key(path: str) -> bytes:
    try:
        key = Path(path).read_bytes()[:_KEY_BYTES_MAX].strip()
    except OSError as error:
        raise ConfigError(f"fabric.route_key_file: {path} can't be read: {words(error)}") from error
    if len(key) < KEY_BYTES_MIN:
        raise ConfigError(f"fabric.route_key_file: {path} must have {KEY_BYTES_MIN} bytes or more")
    return key
