"""Invariant 5: after every crash, restart leads to the end: sessions ended, nothing left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migrator.model import OwnershipState
from tests.simulation.guests import G
from tests.simulation.world import InvariantViolation

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster


def check_end(cluster: Cluster) -> None:
    """Once all is quiet."""
    for node in cluster.nodes.values():
        left = [f"{entry.migration_id} {entry.state}" for entry in node.open_entries()]
        left += [f"{side.migration_id} {side.role}" for side in node.sides()]
        if left or not node.up:
            raise InvariantViolation(f"5: never ended on {node.name}: {left}, up: {node.up}")
        assert node.agent is not None
        claims = [name for name in cluster.domains if node.agent.locks.migration_of(name)]
        if claims:
            raise InvariantViolation(f"5: {node.name} still has its claim on {claims}")
    for domain in cluster.domains.values():
        copies = {guest.node: guest.state.value for guest in domain.guests.values()}
        for guest in domain.guests.values():
            if guest is not domain.running:
                raise InvariantViolation(f"5: a stale copy of {domain.name} was left: {copies}")
            if guest.state is G.RUNNING and guest.missing:
                raise InvariantViolation(
                    f"5: {guest.node} lacks {sorted(guest.missing)} of {domain.name} for good"
                )
        runs = domain.record is not None and domain.record.state is OwnershipState.RUNNING
        if runs != bool(copies):
            raise InvariantViolation(f"5: {domain.record}, and the copies are {copies}")
