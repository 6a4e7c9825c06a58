"""The interface with one of this node's own addresses, by which a guests' network leaves it.

Synchronous; belongs into a thread.
"""

from __future__ import annotations

from migrator.model import NicSpec
from netfabric.bridge.links import netlink
from netfabric.host_routes import Address, interface_of


def uplink_reason(hop: Address, nic: NicSpec, overhead_bytes: int) -> str | None:
    """Why the NIC's packets can't leave by the interface with `hop`; None if they can.

    `overhead_bytes`: what an overlay adds to each. FabricError.
    """
    uplink = interface_of(hop)
    if uplink is None:
        return f"no interface of this node has {hop}, which its guests are to be by"
    with netlink(f"can't look at {uplink}") as kernel:
        link = kernel.find(uplink)
    needed = nic.mtu_bytes + overhead_bytes
    if link is None or link.mtu_bytes >= needed:
        return None
    more = " with the overlay's headers" if overhead_bytes else ""
    return f"{uplink} has an MTU of {link.mtu_bytes} bytes, NIC {nic.mac} needs {needed}{more}"
