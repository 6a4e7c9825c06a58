"""Invariant 3: no write reaches a volume under an old token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulation.guests import Guest
from tests.simulation.world import InvariantViolation

if TYPE_CHECKING:
    from tests.simulation.cluster import Domain


def check_write(domain: Domain, guest: Guest) -> None:
    """A write of `guest` has reached the volume."""
    newest = max(domain.volume.newest, domain.volume.last_writer_token)
    if guest.token < newest:
        raise InvariantViolation(
            f"3: {guest.node} wrote to {domain.name} under token {guest.token}, {newest} is newer"
        )
    domain.volume.last_writer_token = guest.token


def check_start(domain: Domain, guest: Guest) -> None:
    """Before the first vCPU runs, or runs again, under the guest's token."""
    volume = domain.volume
    if volume.newest < guest.token:
        raise InvariantViolation(
            f"3: {guest.node} runs {domain.name} under {guest.token} before its volume was fenced"
        )
    if not volume.accepts(guest):
        raise InvariantViolation(f"3: {guest.node} runs {domain.name}, shut out of its volume")
    others = [each for each in domain.guests.values() if each is not guest]
    if volume.enforces and any(volume.accepts(each) for each in others):
        raise InvariantViolation(f"3: {guest.node} runs {domain.name}, another may still write")
