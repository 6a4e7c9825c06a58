"""The storage of the simulation: one pool in memory, a driver a node."""

from storage.simulated.driver import PoolFaults, SharedVolumes, SimulatedPool, WriteRecord

__all__ = ["PoolFaults", "SharedVolumes", "SimulatedPool", "WriteRecord"]
