"""Guests without any layer 2: each address is a host route to its tap."""

from netfabric.routed.driver import RoutedFabric
from netfabric.routed.network import RoutedNetwork

__all__ = ["RoutedFabric", "RoutedNetwork"]
