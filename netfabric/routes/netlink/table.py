"""What this node or router has been told, in its own routing table.

    claim of another's hop   ──► route of metric TOLD by that hop, over the way there is to it
    claim of one of our hops ──► no such route: the address is on a tap of ours (`netfabric.routed`)
    withdrawn                ──► no such route

A hop that isn't on a link of ours is reached by the router on the way to it. Synchronous, a few
tenths of a millisecond an address; belongs into a thread.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable

from migrator.errors import FabricError
from netfabric.host_routes import Hop, Metric, remove_route, set_route, way_to
from netfabric.routes.netlink.messages import Claim


def apply(claims: Iterable[Claim], own_hops: Collection[str]) -> list[str]:
    """Set or remove the routes; why some couldn't be."""
    failures: list[str] = []
    for claim in claims:
        address = ipaddress.ip_address(claim.address)
        try:
            if not claim.hop or claim.hop in own_hops:
                remove_route(address, Metric.TOLD)
                continue
            hop = ipaddress.ip_address(claim.hop)
            way = way_to(hop)
            if way is None:
                failures.append(f"there is no way to {claim.hop}, which {claim.address} is by")
                continue
            set_route(address, Hop(way.interface_index, way.gateway or hop), Metric.TOLD)
        except FabricError as error:
            failures.append(str(error))
    return failures
