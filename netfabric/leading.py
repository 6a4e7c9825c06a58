"""What arrives at one interface for a MAC is led to another, whatever any bridge's table says.

    device ── ingress hook: for this MAC? ── fwd to the other interface
                                     else ── as before

The rules are nftables' (`fwd`; the kernel's nft_fwd_netdev), in a table of the tunnel's name, which
its end at this node has for itself. A rule whose target is gone drops: remove it first
(`filters.remove`). Synchronous; belongs into a thread.
"""

from __future__ import annotations

import logging
import re
from typing import Final

from migrator.errors import FabricError
from netfabric import filters

_TABLE: Final = re.compile(r"table netdev ferry_(fx[0-9a-f]{10}n[0-9]{1,2})\b")

_TRIAL: Final = "fytrial"

log = logging.getLogger(__name__)


def lead(tunnel: str, device: str, mac: str, to: str, what: str) -> None:
    """From now on, instead of what the tunnel's table said before. FabricError: `what`."""
    name = filters.table_of(tunnel)
    filters.run(
        f"table netdev {name}\ndelete table netdev {name}\n"
        f'table netdev {name} {{\n  chain on {{\n    type filter hook ingress device "{device}"'
        f" priority 0; policy accept;\n    ether daddr {mac} fwd to {to}\n  }}\n}}\n",
        what,
    )


def obstacle() -> str:
    """Why nothing can be led here; "": it can. Tried at `lo`, so the calling thread should be in a
    network namespace that nobody else uses; it is left as it was.
    """
    try:
        lead(_TRIAL, "lo", "02:00:00:00:00:01", "lo", "frames can't be led")
        filters.remove(_TRIAL)
    except FabricError as error:
        return str(error)
    return ""


def tunnels_with_rules() -> frozenset[str]:
    """Of this network namespace; none where nftables can't be asked, which is logged."""
    try:
        listed = filters.run("list tables netdev\n", "can't list the rules")
    except FabricError as error:
        log.info("rules aren't looked after: %s", error)
        return frozenset()
    return frozenset(_TABLE.findall(listed))
