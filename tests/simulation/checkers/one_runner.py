"""Invariant 1: vCPUs run on at most one node, the one that holds the newest token.

A takeover deposes the copies that there are: a silent node's vCPUs run on until it notices. What
they may not do is write (invariant 3). A restored store may not know of a guest for a while.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from migrator.model import OwnershipState
from tests.simulation.guests import G
from tests.simulation.world import InvariantViolation

if TYPE_CHECKING:
    from tests.simulation.cluster import Domain


def check(domain: Domain) -> None:
    """After vCPUs were set going, or the record was written."""
    record = domain.record
    found = None
    for guest in domain.guests.values():
        if guest.state is not G.RUNNING or guest.deposed:
            continue
        if found is not None:
            raise InvariantViolation(
                f"1: {domain.name} runs on {found.node} and on {guest.node}, {record}"
            )
        found = guest
        if domain.is_newer(guest):
            continue
        if (
            record is None
            or record.owner != guest.node
            or record.token != guest.token
            or record.state is not OwnershipState.RUNNING
        ):
            raise InvariantViolation(
                f"1: {domain.name} runs on {guest.node} under {guest.token}, {record}"
            )
