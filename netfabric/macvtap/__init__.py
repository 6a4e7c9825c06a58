"""Guests on a node's uplink itself, without a bridge: macvtap."""

from netfabric.macvtap.driver import MacvtapFabric
from netfabric.macvtap.network import MacvtapNetwork

__all__ = ["MacvtapFabric", "MacvtapNetwork"]
