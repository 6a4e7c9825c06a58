"""The Linux bridge fabric: taps on bridges of the agent's own network namespace."""

from netfabric.bridge.driver import BridgeFabric, Tap, list_taps

__all__ = ["BridgeFabric", "Tap", "list_taps"]
