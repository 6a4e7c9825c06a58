"""What is wrong with a NIC wherever it is plugged. Pure; every fabric driver starts from it."""

from __future__ import annotations

from typing import Final

from migrator.errors import FabricError
from migrator.model import NicSpec
from netfabric.frames import parse_address, parse_mac

VLAN_MAX: Final = 4094
"""IEEE 802.1Q; what is sent for another, no bridge takes, and pyroute2 doesn't even ask."""


def nic_reasons(nic: NicSpec) -> list[str]:
    """Every reason in the NIC's own definition; empty if it is sound."""
    reasons: list[str] = []
    try:
        parse_mac(nic.mac)
    except FabricError as error:
        reasons.append(str(error))
    if nic.vlan is not None and not 1 <= nic.vlan <= VLAN_MAX:
        reasons.append(f"NIC {nic.mac}: a VLAN is from 1 to {VLAN_MAX}, not {nic.vlan}")
    for address in nic.addresses:
        try:
            parse_address(address)
        except FabricError as error:
            reasons.append(f"NIC {nic.mac}: {error}")
    return reasons


def mtu_reason(nic: NicSpec, bridge_mtu_bytes: int) -> str | None:
    """Why the bridge is too narrow for the NIC; None if it isn't."""
    if bridge_mtu_bytes >= nic.mtu_bytes:
        return None
    return (
        f"bridge {nic.bridge} has an MTU of {bridge_mtu_bytes} bytes, "
        f"NIC {nic.mac} needs {nic.mtu_bytes}"
    )
