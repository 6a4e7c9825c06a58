"""The fabric of the simulation: one network in memory, a driver a node."""

from netfabric.simulated.driver import (
    Announcement,
    FabricFaults,
    SimulatedFabric,
    SimulatedNetwork,
)

__all__ = ["Announcement", "FabricFaults", "SimulatedFabric", "SimulatedNetwork"]
