"""The node's FRR, where it says where guests are: asks its daemons, and what the kernel got."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from typing import Final

from migrator.errors import FabricError
from node_agent import fabrics
from node_agent.doctor import links
from node_agent.doctor.findings import Finding, failure, fine
from node_agent.fabric_config import FabricTable

_CHECK: Final = "FRR"


def check_frr(table: FabricTable, local: tuple[str, ...]) -> Iterator[Finding]:
    """Nothing where the configuration has no FRR. `local`: the node's own addresses."""
    by_mac = table.driver == "vxlan" and table.evpn
    by_address = table.driver == "routed" and table.routes == "frr"
    if not by_mac and not by_address:
        return
    if shutil.which("vtysh") is None:
        yield failure(_CHECK, "vtysh isn't installed", "apt-get install frr")
    elif by_mac:
        yield fine(_CHECK, "is installed")
    else:
        yield _routes(table, local)
    if by_mac:
        yield links.check_evpn(table.bridge)
    elif table.evpn:
        yield _overlay(table)


def _routes(table: FabricTable, local: tuple[str, ...]) -> Finding:
    try:
        reason = asyncio.run(fabrics.frr_reason(table, local))
    except FabricError as error:
        mend = (
            "systemctl status frr; zebra and bgpd must run, and fabric.frr_vty_directory be theirs"
        )
        return failure(_CHECK, str(error), mend)
    if not reason:
        return fine(_CHECK, "its neighbours hear where guests are")
    return failure(
        _CHECK,
        f"nobody would hear where guests are: {reason.removeprefix('FRR: ')}",
        "see `vtysh -c 'show bgp summary'`; docs/network.md has the lines that bgpd and zebra need",
    )


def _overlay(table: FabricTable) -> Finding:
    check = f"EVPN of network {table.bridge}"
    try:
        known = fabrics.overlay_ends(table)
    except FabricError as error:
        return failure(check, str(error), "start the agent, which makes it")
    lost = sorted(end for end, entered in known.items() if not entered)
    if not lost:
        return fine(check, f"leads to {', '.join(sorted(known)) or 'nobody yet'}")
    return failure(
        check,
        f"routes lead to {', '.join(lost)}, but FRR has entered no router MAC: what goes there is"
        " lost",
        "vtysh -c 'clear bgp *' enters it again. FRR 8.4 forgets it when a route is installed anew"
        " (its issue 12391): use a newer one, or see that no end of the VXLAN is reached by a"
        " default or static route",
    )
