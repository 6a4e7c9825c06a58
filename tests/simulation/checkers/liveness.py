"""Invariant 4: the domain runs somewhere, unless the only node with its memory died.

`memory_lost` of a domain says why nothing runs, where that is right:
- "stopped", "taken over": somebody wanted it.
- "died": what was killed had the only whole copy.
- "unprovable": a copy that is whole is left, but something died that may have run with newer
  memory, and all that could prove that it hadn't is gone: whoever ran the copy would have to guess.
  `_excuse` names those cases; nothing else is excused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from migrator.model import Role
from migrator.session.destination import DestinationSession
from migrator.session.source import SourceSession
from tests.simulation.guests import G, Guest
from tests.simulation.world import InvariantViolation

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster, Domain
    from tests.simulation.node import Node
    from tests.simulation.side import Side


def whole_copies(domain: Domain) -> list[Guest]:
    """Those that hold the domain's newest memory and device state."""
    guests = domain.guests.values()
    newest = [guest for guest in guests if guest.epoch == domain.epoch and not guest.deposed]
    sources = [guest for guest in guests if guest.state is G.POSTMIGRATE]
    return [guest for guest in newest if not guest.missing or sources]


def died(domain: Domain, guest: Guest, why: str) -> None:
    """`guest` was killed by a fault, and is out of the domain's guests."""
    if guest.deposed or guest.epoch != domain.epoch or domain.memory_lost is not None:
        return
    if not whole_copies(domain):
        domain.lose("died", f"{guest.node} in {guest.state.value} ({why})")


def check_destroy(domain: Domain, guest: Guest, node: Node) -> None:
    """`guest` was destroyed on purpose, and is out of the domain's guests."""
    if guest.doomed or guest.deposed:
        return
    if guest.state in (G.RUNNING, G.IO_ERROR) and guest.epoch == domain.epoch:
        raise InvariantViolation(f"4: {guest.node} destroyed the running {domain.name}")
    if guest.state is G.POSTMIGRATE:
        _check_source_destroyed(domain, guest)
    if guest.epoch != domain.epoch or whole_copies(domain) or domain.memory_lost:
        return
    excuse = _excuse(domain, guest, node)
    if excuse is None:
        raise InvariantViolation(f"4: {guest.node} destroyed the last whole copy of {domain.name}")
    domain.lose("unprovable", excuse)


def _check_source_destroyed(domain: Domain, source: Guest) -> None:
    """A source may go only when the destination holds every page, or is lost anyway."""
    for guest in domain.guests.values():
        if guest.state is not G.RUNNING or guest.epoch != domain.epoch or guest.deposed:
            continue
        whence = source.epoch == guest.epoch - 1  # Not a copy of an earlier migration.
        if whence and guest.missing and not guest.doomed:
            raise InvariantViolation(
                f"4: {source.node} destroyed its copy while {guest.node} lacks pages"
            )


def _excuse(domain: Domain, guest: Guest, node: Node) -> str | None:
    role = Role.SOURCE if guest.state is G.POSTMIGRATE else Role.DESTINATION
    migration = node.cluster_migration(domain, role)
    if migration is None:
        return None
    side = migration.sides[role]
    other = side.other
    if guest.state is G.POSTMIGRATE:
        if other.resume_uncertain:
            return "the destination died around its resume: it may have run"
        if other.rebooted_committed:
            return "the destination's host went down around its resume: it may have run"
    if guest.state is G.LOADED:
        record = domain.record
        won = record is not None and record.token > side.token_before
        back = won and record is not None and record.owner == other.node.name
        if back and other.resume_uncertain:
            return "the source won the record back, and died around its resume: it may have run"
        if not _knows_sent(side) and not _knows_sent(other):
            return "the source died, and nobody knows whether it had resumed by itself"
    return None


def _knows_sent(side: Side) -> bool:
    """It knows that the source's guest can't have run since the device state was taken."""
    session = side.session
    if isinstance(session, SourceSession):
        return session.device_state_out
    if isinstance(session, DestinationSession):
        return session.committed
    entry = side.node.journal.get(side.migration_id)
    return entry is not None and entry.committed and not entry.ended


def check_end(cluster: Cluster) -> dict[str, str]:
    """Once all is quiet: where each domain runs, or how it was lost."""
    ends: dict[str, str] = {}
    for domain in cluster.domains.values():
        running = domain.running
        copies = {guest.node: guest.state.value for guest in domain.guests.values()}
        if running is None and domain.memory_lost is None:
            raise InvariantViolation(f"4: {domain.name} runs nowhere: {copies}, {domain.record}")
        if running is None and domain.must_start and not domain.store_restored:
            raise InvariantViolation(
                f"4: {domain.name} was lost with its host, and not started again: {domain.record}"
            )
        lost = (domain.memory_lost or "").partition(":")[0]
        ends[domain.name] = running.node if running is not None else lost
    return ends
