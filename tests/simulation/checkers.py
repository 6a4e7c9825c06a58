"""DESIGN's invariants ("Handoff: exactly one writer"), as looked at from outside.

1 and 3 are looked at after every step, 2 whenever vCPUs are set going, 4 whenever a session
destroys a copy and at the end, 5 (restarts) by way of the others, and at the end: every session
ended, nothing was left behind.

Invariant 4 excuses one thing: that the memory is lost. Two kinds are told apart in `memory_lost`:
- "died": what was killed had the only whole copy.
- "unprovable": a whole copy is left, but all that could prove it whole died too, so that whoever
  runs it would have to guess. `_excuse` names those cases; nothing else is excused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from migrator.session.destination import DestinationSession
from migrator.session.source import SourceSession
from tests.simulation.guests import G, Guest
from tests.simulation.world import InvariantViolation, World

if TYPE_CHECKING:
    from tests.simulation.node import Node


def check_step(world: World) -> None:
    """Invariant 1."""
    running = [guest for guest in world.guests.values() if guest.state is G.RUNNING]
    if len(running) > 1:
        raise InvariantViolation("1: the domain runs on two nodes")
    for guest in running:
        if world.record.owner != guest.node or world.record.token != guest.token:
            raise InvariantViolation(
                f"1: {guest.node} runs under token {guest.token}, the record is {world.record}"
            )


def check_write(world: World, guest: Guest) -> None:
    """Invariant 3, before `guest` writes to the volume."""
    newest = max(world.volume.fenced_token, world.volume.last_writer_token)
    if guest.token < newest:
        raise InvariantViolation(
            f"3: {guest.node} wrote under token {guest.token}, {newest} is newer"
        )


def check_resume(world: World, guest: Guest, token: int) -> None:
    """Invariants 2 and 3, before `cont` on a guest that stands still."""
    if guest.state is G.INCOMING:
        raise InvariantViolation("2: resumed without device state")
    if guest.epoch != world.epoch:
        raise InvariantViolation(f"2: {guest.node} resumes a stale copy: the domain ran since")
    if guest.state is G.LOADED and not _as_at_the_pause(world, guest):
        raise InvariantViolation("2: the destination's memory isn't the source's at the pause")
    if world.volume.fenced_token < token:
        raise InvariantViolation(f"3: resumed under token {token} before the volume was fenced")


def _as_at_the_pause(world: World, guest: Guest) -> bool:
    """Every page that isn't missing; and no missing page can be touched unawares."""
    paused = world.paused_memory
    if paused is None or (guest.missing and not guest.armed):
        return False
    return all(
        own == then
        for page, (own, then) in enumerate(zip(guest.memory, paused, strict=True))
        if page not in guest.missing
    )


def whole_copies(world: World) -> list[Guest]:
    """Those that hold the domain's newest memory and device state."""
    newest = [guest for guest in world.guests.values() if guest.epoch == world.epoch]
    sources = [guest for guest in world.guests.values() if guest.state is G.POSTMIGRATE]
    return [guest for guest in newest if not guest.missing or sources]


def died(world: World, guest: Guest, why: str) -> None:
    """`guest` was killed by a fault, and is out of `world.guests`."""
    if guest.epoch == world.epoch and not whole_copies(world) and world.memory_lost is None:
        world.memory_lost = f"died: {guest.node} in {guest.state.value} ({why})"


def check_destroy(world: World, guest: Guest, node: Node) -> None:
    """Invariant 4: a session destroyed `guest`, which is out of `world.guests`."""
    if guest.doomed:
        return
    if guest.state is G.RUNNING:
        raise InvariantViolation(f"4: {guest.node} destroyed the running guest")
    if guest.epoch != world.epoch or whole_copies(world) or world.memory_lost:
        return
    excuse = _excuse(world, guest, node)
    if excuse is None:
        raise InvariantViolation(f"4: {guest.node} destroyed the last whole copy")
    world.memory_lost = f"unprovable: {excuse}"
    world.log("lost, {}", world.memory_lost)


def _excuse(world: World, guest: Guest, node: Node) -> str | None:
    other = node.other
    if guest.state is G.POSTMIGRATE:
        if other.resume_noted:
            return "the destination died around its resume: it may have run"
        if other.rebooted_committed:
            return "the destination's host went down around its resume: it may have run"
    if guest.state is G.LOADED:
        if world.record.owner == other.name and world.record.token > node.token_before:
            return "the source won the record back, then died before it resumed"
        if not _knows_sent(node) and not _knows_sent(other):
            return "the source died, and nobody knows whether it had resumed by itself"
    return None


def _knows_sent(node: Node) -> bool:
    """The node knows that the source's guest can't have run since the device state was taken."""
    session = node.session
    if isinstance(session, SourceSession):
        return session.device_state_out
    if isinstance(session, DestinationSession):
        return session.committed
    return any(entry.committed and not entry.ended for entry in node.journal.values())


def check_end(world: World, nodes: list[Node]) -> str:
    """Invariants 4 and 5 once all is quiet. Where the domain runs, or how it was lost."""
    running = [guest.node for guest in world.guests.values() if guest.state is G.RUNNING]
    copies = {guest.node: guest.state.value for guest in world.guests.values()}
    if not running and world.memory_lost is None:
        raise InvariantViolation(f"4: the domain runs nowhere: {copies}, {world.record}")
    for each in world.guests.values():
        if each.state is G.RUNNING and each.missing:
            raise InvariantViolation(f"5: {each.node} lacks {sorted(each.missing)} for good")
    for node in nodes:
        left = [f"{entry.migration_id} {entry.state}" for entry in node.open_entries()]
        if left or node.session is not None:
            raise InvariantViolation(f"5: never ended on {node.name}: {left}, {copies}")
    if len(copies) > len(running):
        raise InvariantViolation(f"5: a stale copy was left: {copies}")
    return running[0] if running else (world.memory_lost or "lost").partition(":")[0]
