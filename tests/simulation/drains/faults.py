"""What may go wrong in a simulated drain, and how likely."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Faults:
    """How likely each is, per occasion."""

    coordinator_dies: float = 0.02
    node_dies: float = 0.01
    migration_fails: float = 0.1
    refused: float = 0.1
    request_lost: float = 0.05
    boot_fails: float = 0.15
    arrives_late: float = 0.2
    cancelled: float = 0.0
    outage: float = 0.0
    """All agents are away, the coordinator among them, and come back one by one."""
    leaving_already: float = 0.0
    """Guests that somebody migrates when the drain begins."""
