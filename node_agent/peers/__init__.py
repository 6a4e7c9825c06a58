"""The agents' own protocol. `PeerHub` is all that other packages need."""

from node_agent.peers.hub import PeerHub

__all__ = ["PeerHub"]
