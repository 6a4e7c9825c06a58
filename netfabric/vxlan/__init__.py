"""Guests' networks where the nodes share no layer 2: a VXLAN between them."""

from netfabric.vxlan.driver import VxlanFabric
from netfabric.vxlan.overlay import Overlay

__all__ = ["Overlay", "VxlanFabric"]
