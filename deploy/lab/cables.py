"""The cables of a lab, and what each end of one has (a part of `plan`)."""

from __future__ import annotations

from typing import Final

import msgspec

from deploy.lab.kinds import OVERLAY_LINK_BYTES

NODE_UPLINK: Final = "uplink0"
MGMT_INTERFACE: Final = "mgmt0"
GUEST_INTERFACE: Final = "guest0"
SWITCH_GUEST_BRIDGE: Final = "guests"
SWITCH_MGMT_BRIDGE: Final = "mgmt"


class Subnet(msgspec.Struct, frozen=True, kw_only=True):
    """What one cable of the router has to itself: an end's addresses, and the router's there."""

    address: str
    router: str
    prefix_bits: int
    address6: str
    router6: str
    prefix6_bits: int = 64


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One cable: a veth pair between a port of the switch and an interface of a namespace."""

    port: str
    """Interface name at the switch, at most 15 characters."""
    bridge: str | None
    """The switch's bridge that the port belongs to; None: it is a port of the router instead."""
    namespace: str
    interface: str
    """Interface name in `namespace`."""
    address: str | None = None
    """IPv4 address of `interface`; None where it is a port of the node's bridge."""
    address6: str | None = None
    """Its IPv6 address, where it has a /64 with others."""
    subnet: Subnet | None = None
    """With the router: both ends' addresses, `address` among them."""
    node_bridge: str | None = None
    """Bridge in `namespace` that `interface` belongs to."""
    mtu_bytes: int | None = None
    """Of both ends; None: as the kernel makes them."""
    shaped: bool = False


def mgmt_link(role: str, namespace: str, address: str, *, shaped: bool = False) -> Link:
    """Into the network of management, migrations and storage."""
    return Link(
        port=f"m-{role}",
        bridge=SWITCH_MGMT_BRIDGE,
        namespace=namespace,
        interface=MGMT_INTERFACE,
        address=address,
        shaped=shaped,
    )


def evpn_link(role: str, namespace: str, address: str, address6: str) -> Link:
    """Into the network that carries the VXLAN, where the nodes and the router share one."""
    return Link(
        port=f"g-{role}",
        bridge=SWITCH_GUEST_BRIDGE,
        namespace=namespace,
        interface=NODE_UPLINK,
        address=address,
        address6=address6,
        shaped=True,
        mtu_bytes=OVERLAY_LINK_BYTES,
    )


def routed_link(
    role: str, namespace: str, subnet: Subnet, *, interface: str = NODE_UPLINK, overlay: bool
) -> Link:
    """To the router, in a subnet of its own. `overlay`: it carries a VXLAN."""
    return Link(
        port=f"g-{role}",
        bridge=None,
        namespace=namespace,
        interface=interface,
        address=subnet.address,
        subnet=subnet,
        shaped=interface == NODE_UPLINK,
        mtu_bytes=OVERLAY_LINK_BYTES if overlay else None,
    )
