"""A lab whose guests share a layer 2 over nodes that share none.

    fy-LAB-n1                                   fy-LAB-router      fy-LAB-client
    guests ─ br0 ═ VXLAN ─ uplink0 ───────────── g-n1  g-client ──── uplink0 ─ VXLAN ═ br0
                           10.76.L.2/31          10.76.L.3           10.75.L.250/24     │
    fy-LAB-n2                                                                         guest0
    guests ─ br0 ═ VXLAN ─ uplink0 ───────────── g-n2                            10.78.L.250
                           10.76.L.4/31          10.76.L.5

Each node's agent makes its end (`netfabric.vxlan`), and the lab makes the client's: the bridge
`br0`, and in it the other end of `guest0`. With `--fabric vxlan` every end knows the others and
learns; with `evpn-l2` FRR runs at each end, and at the router, which reflects what they say
(`deploy.lab.frr`). The cables are as much wider as the VXLAN's headers are long.
"""

from __future__ import annotations

from typing import Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from deploy.lab.cables import GUEST_INTERFACE
from deploy.lab.kinds import OVERLAY_IDENTIFIER, OVERLAY_MTU_BYTES, FabricKind
from deploy.lab.namespaces import work_in
from deploy.lab.plan import GUEST_BRIDGE, LabPlan
from migrator.errors import FabricError
from netfabric.vxlan.overlay import Overlay, ensure

_PORT: Final = "guest0-port"
_PREFIX_BITS: Final = 24
_PREFIX6_BITS: Final = 64
_NO_DUPLICATE_DETECTION: Final = 0x02


def overlay_of(plan: LabPlan, local: str) -> Overlay:
    """As the end with that address sees it: a node, or the client."""
    ends = (
        *(plan.subnet(number).address for number, _ in enumerate(plan.nodes, 1)),
        plan.client_subnet.address,
    )
    evpn = plan.fabric is FabricKind.EVPN_L2
    return Overlay(
        bridge=GUEST_BRIDGE,
        identifier=OVERLAY_IDENTIFIER,
        local=local,
        remotes=() if evpn else tuple(end for end in ends if end != local),
        mtu_bytes=OVERLAY_MTU_BYTES,
        evpn=evpn,
    )


def ensure_client(plan: LabPlan) -> None:
    """Let the client take part, where there is an overlay. FabricError."""
    if plan.is_overlay:
        work_in(plan.namespace("client"), lambda: _ensure_client(plan))


def _ensure_client(plan: LabPlan) -> None:
    ensure(overlay_of(plan, plan.client_subnet.address))
    try:
        with IPRoute() as route:
            if not route.link_lookup(ifname=GUEST_INTERFACE):
                route.link("add", ifname=GUEST_INTERFACE, kind="veth", peer=_PORT)
            (bridge,) = route.link_lookup(ifname=GUEST_BRIDGE)
            (port,) = route.link_lookup(ifname=_PORT)
            (own,) = route.link_lookup(ifname=GUEST_INTERFACE)
            route.link("set", index=port, master=bridge, state="up")
            route.link("set", index=own, state="up")
            for address, bits in (
                (plan.client_guest_address, _PREFIX_BITS),
                (plan.client_guest_address6, _PREFIX6_BITS),
            ):
                flags = {"flags": _NO_DUPLICATE_DETECTION} if ":" in address else {}
                route.addr("replace", index=own, address=address, prefixlen=bits, **flags)
    except NetlinkError as error:
        raise FabricError(f"the client can't take part in the overlay: {error}") from error
