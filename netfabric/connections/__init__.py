"""What the node's packet filter remembers of its guests' connections, and how it moves."""

from netfabric.connections.tracker import KernelConnections

__all__ = ["KernelConnections"]
