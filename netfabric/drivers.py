"""Every fabric driver by the name that the configuration gives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from migrator.ports import FabricDriver
from netfabric.bridge import BridgeFabric
from netfabric.macvtap import MacvtapFabric
from netfabric.routed import RoutedFabric
from netfabric.simulated import SimulatedFabric
from netfabric.vxlan import VxlanFabric

DRIVERS: Final[Mapping[str, type[FabricDriver]]] = {
    "bridge": BridgeFabric,
    "vxlan": VxlanFabric,
    "routed": RoutedFabric,
    "macvtap": MacvtapFabric,
    "simulated": SimulatedFabric,
}
