"""The cables of a lab, and what each end of one has (a part of `plan`)."""

from __future__ import annotations

import msgspec


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
