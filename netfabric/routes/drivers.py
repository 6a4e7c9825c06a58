"""Every route driver by the name that the configuration gives it.

`webhook` is the fourth: it lives beside the hooks, whose code it uses (`node_agent/hooks/routes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from migrator.ports import RouteDriver
from netfabric.routes.frr.driver import FrrRoutes
from netfabric.routes.netlink.driver import NetlinkRoutes
from netfabric.routes.nobody import NobodyRoutes

DRIVERS: Final[Mapping[str, type[RouteDriver]]] = {
    "none": NobodyRoutes,
    "frr": FrrRoutes,
    "netlink": NetlinkRoutes,
}
