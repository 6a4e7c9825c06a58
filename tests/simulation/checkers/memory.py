"""Invariant 2: a guest goes on with the memory that it had when it was paused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulation.guests import G, Guest
from tests.simulation.world import InvariantViolation

if TYPE_CHECKING:
    from tests.simulation.cluster import Domain


def check_resume(domain: Domain, guest: Guest) -> None:
    """Before `cont` on a guest that stands still."""
    if guest.state is G.INCOMING:
        raise InvariantViolation("2: resumed without device state")
    if guest.epoch != domain.epoch:
        raise InvariantViolation(f"2: {guest.node} resumes a stale copy: the domain ran since")
    if guest.state is G.LOADED and not _as_at_the_pause(domain, guest):
        raise InvariantViolation("2: the destination's memory isn't the source's at the pause")


def _as_at_the_pause(domain: Domain, guest: Guest) -> bool:
    """Every page that isn't missing; and no missing page can be touched unawares."""
    paused = domain.paused_memory
    if paused is None or (guest.missing and not guest.armed):
        return False
    return all(
        own == then
        for page, (own, then) in enumerate(zip(guest.memory, paused, strict=True))
        if page not in guest.missing
    )
