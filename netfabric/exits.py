"""Where frames leave a node."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Exit:
    """A port through which an announcement leaves, and the VLAN tag it needs there, if any."""

    port: str
    vlan_id: int | None = None
    vlan_ethertype: int = 0x8100
    addressed: bool = False
    """The port takes only frames for MACs that it was told of; a bridge's port takes all."""
    vlan_aware: bool = False
    """What comes in by the port in another VLAN than this is somebody else's."""
