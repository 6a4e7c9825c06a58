"""The Linux bridge fabric: taps on bridges of the agent's own network namespace."""

from netfabric.bridge.driver import BridgeFabric, list_taps
from netfabric.bridge.plugging import Tap

__all__ = ["BridgeFabric", "Tap", "list_taps"]
