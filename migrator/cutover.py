"""The words for how a network follows a migrated guest (a part of `model`)."""

from __future__ import annotations

from migrator.names import Value


class Witness(Value, frozen=True, kw_only=True):
    """What one node found when it asked the network for a migrated NIC."""

    node: str
    mac: str
    able: bool
    """False: it has no way into the NIC's network."""
    answered: tuple[str, ...] = ()
    """Addresses that answered at the NIC's MAC."""
    heard: tuple[str, ...] = ()
    """Kinds of frames of the NIC that reached it meanwhile."""
    routed: bool = False
    """It asked the routers, not the switches."""


class MovedConnections(Value, frozen=True, kw_only=True):
    """The guest's connections that stateful rules know, told from the old node to the new one."""

    moved: int = 0
    """That the new node has taken."""
    begun_late: int = 0
    """Of these, begun after the others were told, before the pause."""
    left: int = 0
    """That the old node translates (NAT): they can't go on elsewhere."""
    told_ms: float = 0.0
    """Just before the pause: reading them, telling them, the new node's word that it has them."""


class Cutover(Value, frozen=True, kw_only=True):
    """How the network followed a guest to its new place. Times are after the resume."""

    resumed_at_s: float
    first_announcement_ms: float | None = None
    rounds: int = 0
    """Of questions to the other nodes, before it was verified or given up."""
    first_to_guest_ms: float | None = None
    """The first frame that reached its port there after the resume; those that waited aside."""
    first_from_guest_ms: float | None = None
    verified_ms: float | None = None
    """When every node that could ask had found it at its new place; None: not within the limit."""
    witnesses: tuple[Witness, ...] = ()
    suspect: str = ""
    """What is most likely wrong, where it wasn't verified."""
    left_early: str = ""
    """Nothing was proved, nor is anything suspected: the guest moved on or ended before that."""
    forwarded_frames: int | None = None
    """That arrived at the old place after all, and went on by the tunnel; None: not counted yet."""
    connections: MovedConnections | None = None
    """None: the old node's rules know of none."""
    problems: tuple[str, ...] = ()
    """What of it couldn't be done, a tunnel for one. None of this fails a migration."""
