"""What kinds of labs there are (a part of `plan`)."""

from __future__ import annotations

import enum
from typing import Final


class StoreKind(enum.StrEnum):
    """Where a lab's cluster state is."""

    SQLITE = "sqlite"
    ETCD = "etcd"
    """A real etcd of three members, each on a host of its own."""


class FabricKind(enum.StrEnum):
    """How a lab's nodes share the guests' network."""

    BRIDGE = "bridge"
    """One layer 2 for all."""
    ROUTED = "routed"
    """Subnets of their own, and a router that the nodes tell where guests are."""
    BGP = "bgp"
    """The same, but the nodes and the router speak BGP, by FRR."""
    EVPN = "evpn"
    """The same as bgp, but by EVPN: host routes of type 5, and a VXLAN that carries the packets."""
    MACVTAP = "macvtap"
    """One layer 2 for all, without bridges: guests are above each node's uplink."""
    VXLAN = "vxlan"
    """Subnets of their own, and over them one layer 2 of VXLANs, which learn where guests are."""
    EVPN_L2 = "evpn-l2"
    """The same, but FRR says where guests are, by EVPN: their MACs, of type 2."""


ROUTED_FABRICS: Final = (FabricKind.ROUTED, FabricKind.BGP, FabricKind.EVPN)
"""Guests have no layer 2: each address is a host route."""
OVERLAY_FABRICS: Final = (FabricKind.VXLAN, FabricKind.EVPN_L2)
"""Guests share a layer 2, the nodes none."""
FRR_FABRICS: Final = (FabricKind.BGP, FabricKind.EVPN, FabricKind.EVPN_L2)
OVERLAY_IDENTIFIER: Final = 5000
OVERLAY_MTU_BYTES: Final = 1500
OVERLAY_LINK_BYTES: Final = 1550
"""The guests' packets, and the VXLAN's headers around them."""
