"""What a node's configuration says of cutovers."""

from __future__ import annotations

from migrator.ports import Struct
from node_agent.config import AgentConfig


class CutoverSettings(Struct, frozen=True, kw_only=True):
    """How a node handles its migrations' network."""

    grace_s: float = 5.0
    """For so long the old node forwards frames that still arrive there."""
    verify_limit_s: float = 5.0
    """Not verified within it: an event names the suspect, the announcements are repeated."""
    tunnel_port: int = 7782
    address: str = "127.0.0.1"
    """This node's own end of tunnels: where page streams arrive, too."""

    @classmethod
    def of(cls, config: AgentConfig) -> CutoverSettings:
        """As the node's configuration has it."""
        return cls(
            grace_s=config.fabric.grace_s,
            verify_limit_s=config.fabric.verify_limit_s,
            tunnel_port=config.fabric.tunnel_port,
            address=config.migration.address,
        )
