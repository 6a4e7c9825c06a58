"""Whether the node's FRR could tell anybody where a guest is, before one comes.

By plain BGP a neighbour must be up that the address's family is activated for. By EVPN (type 5) a
neighbour of `l2vpn evpn`, zebra must have joined the network identifier to the table that the
guests' routes are in, and bgpd must make EVPN routes of that table's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from netfabric.routes.frr.vtysh import BgpFamily, EvpnNetwork, Vtysh

_UP: Final = "Up"
_VRF: Final = "default"


async def cut_off(vtysh: Vtysh, versions: Collection[int], identifier: int | None) -> str:
    """Why not; "" if it could. `identifier`: EVPN's, or None. FabricError: FRR doesn't answer."""
    families = await vtysh.families()
    if identifier is None:
        return neighbour_reason(families, [f"ipv{version}Unicast" for version in sorted(versions)])
    network = await vtysh.evpn_network(identifier)
    return (
        network_reason(network, identifier)
        or neighbour_reason(families, ["l2VpnEvpn"])
        or advertising_reason(await vtysh.bgp_configuration(), versions)
    )


def neighbour_reason(families: Mapping[str, BgpFamily], wanted: Iterable[str]) -> str:
    """Pure."""
    for name in wanted:
        family = families.get(name, BgpFamily())
        if not family.peers:
            return f"FRR: no BGP neighbour is activated for {_spoken(name)}"
        if not family.established:
            down = ", ".join(sorted(family.peers))
            return f"FRR: no BGP neighbour is up for {_spoken(name)} (down: {down})"
    return ""


def network_reason(network: EvpnNetwork, identifier: int) -> str:
    """Pure."""
    if network.type != "L3":
        return f"FRR: zebra routes nothing into VXLAN {identifier}; it needs `vni {identifier}`"
    if network.vrf != _VRF:
        return (
            f"FRR: VXLAN {identifier} belongs to VRF {network.vrf}, but guests' routes are in the"
            f" default table; `vni {identifier}` must stand outside of any `vrf`"
        )
    if network.state != _UP:
        return f"FRR: VXLAN {identifier} is {network.state.lower() or 'unknown'}"
    return ""


def advertising_reason(configuration: Iterable[str], versions: Collection[int]) -> str:
    """Pure. `configuration`: bgpd's lines."""
    here, found = False, set()
    for line in configuration:
        if line.startswith("router bgp "):
            here = " vrf " not in line
        elif here and line.strip().startswith("advertise "):
            found.update(line.split()[1:2])
    for version in sorted(versions):
        if f"ipv{version}" not in found:
            return (
                "FRR: bgpd says no host routes by EVPN; its `address-family l2vpn evpn` needs"
                f" `advertise ipv{version} unicast`"
            )
    return ""


def _spoken(family: str) -> str:
    names = {"ipv4Unicast": "ipv4 unicast", "ipv6Unicast": "ipv6 unicast"}
    return names.get(family, "l2vpn evpn")
