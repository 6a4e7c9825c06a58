"""Post-copy in the simulated world: pages that are missing, engines that fill them in, or can't.

A guest that was resumed with missing pages can't write to them before they are filled; it needs an
engine beside it, one at the source, and a connection between the two. What the source's engine
serves is what its guest held at the pause, also when the hypervisor has died meanwhile.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from migrator.model import PassKind, PassReport
from migrator.session import vocabulary as v
from tests.simulation.guests import G, Guest
from tests.simulation.world import InvariantViolation, World

if TYPE_CHECKING:
    from tests.simulation.node import Node

STEP_S = 0.004
RECONNECT_S = 10.0


def listening(node: Node) -> v.EngineListening:
    """The port tells an engine from its successor."""
    return v.EngineListening(host="10.0.0.2", port=7000 + node.engine, secret=b"s" * 32)


def tell_missing(node: Node, command: v.RunPass) -> None:
    """STALE and MISSING: the destination drops what is pending. Nothing is copied."""
    world = node.world
    source, destination = world.guests.get(node.name), world.guests.get(node.other.name)
    engines = (node.engine, node.other.engine)
    if not all(engines) or source is None or destination is None:
        return
    final = command.kind is PassKind.MISSING

    def finish() -> None:
        if (node.engine, node.other.engine) != engines:
            return
        if world.pages_cut and not world.healed:
            world.after(0.2, finish)
            return
        if not final:
            node.pending |= source.dirty
        told = set(node.pending) | (source.dirty if final else set())
        source.dirty.clear()
        node.pending = set()
        for page in told:
            destination.missing.add(page)
            destination.memory[page] = -1
        if final:
            node.other.soon(v.PagesMissing())
            begin_filling(node.other, destination)
        report = PassReport(
            number=command.number,
            kind=command.kind,
            seconds=0.001,
            pages=len(told),
            bytes_sent=100,
            pending_pages=len(told),
        )
        node.soon(v.PassFinished(report=report))

    world.after(0.001 + world.delay(0.004), finish)


def start_successor(node: Node) -> list[v.Event]:
    """Destination: an engine that goes on where a dead one stopped."""
    guest = node.world.guests.get(node.name)
    if guest is None:
        return [v.EngineLost(reason="no such domain")]
    node.engine_serial += 1
    node.engine = node.engine_serial
    begin_filling(node, guest)
    return [listening(node)]


def connect_successor(node: Node, command: v.ConnectEngine) -> list[v.Event]:
    """Source: serve the pages to the engine that listens there, if it still does."""
    guest = node.served or node.world.guests.get(node.name)
    if guest is None or not node.engine:
        return [v.EngineLost(reason="no such domain")]
    if command.port != 7000 + node.other.engine:
        node.engine = 0
        return [v.EngineLost(reason="nobody listens there")]
    node.linked = node.other.engine
    node.served = guest
    return [v.EngineConnected(pages_in_use=0, round_trip_ms=0.1)]


def begin_filling(node: Node, guest: Guest) -> None:
    """One page at a time, for as long as this engine lives."""
    guest.armed = True
    node.world.after(STEP_S, partial(_fill, node, guest, node.engine))


def _fill(node: Node, guest: Guest, engine: int) -> None:
    world = node.world
    if node.engine != engine or world.guests.get(node.name) is not guest:
        return
    served = _served_to(node)
    cut = world.pages_cut and not world.healed
    if guest.missing and served is not None and not cut:
        page = world.random.choice(sorted(guest.missing))
        guest.memory[page] = served.memory[page]
        guest.missing.discard(page)
        world.after(world.delay(STEP_S), partial(_fill, node, guest, engine))
    elif guest.missing:
        world.after(0.1, partial(_fill, node, guest, engine))
    else:
        node.soon(v.PagesComplete())


def _served_to(node: Node) -> Guest | None:
    """The memory that the source's engine serves to this node's."""
    other = node.other
    return other.served if other.engine and other.linked == node.engine else None


def peer_engine_gone(node: Node) -> None:
    """The engine that `node`'s talks to is gone. In post-copy a source's gives up after a while."""
    engine, gone = node.engine, node.linked
    if node.served is None or not engine or not gone:
        return

    def give_up() -> None:
        if node.engine == engine and node.linked == gone:
            node.kill_engine("the destination's engine is gone")

    node.world.after(node.world.delay(RECONNECT_S), give_up)


def reachable(world: World, node: Node, guest: Guest) -> bool:
    """Whether what `guest` (on `node`) lacks is anywhere."""
    other = node.other
    copy = world.guests.get(other.name)
    if copy is not None and copy.state is not G.RUNNING:
        return True
    return bool(other.engine) and other.served is not None


def note_loss(world: World, nodes: list[Node]) -> None:
    """After something died: are missing pages nowhere any more?"""
    for node in nodes:
        guest = world.guests.get(node.name)
        if guest is None or not guest.missing or guest.epoch != world.epoch:
            continue
        if guest.state in (G.LOADED, G.RUNNING) and not reachable(world, node, guest):
            world.memory_lost = world.memory_lost or "died: pages that were missing"
            guest.doomed = True


def check_source_destroyed(world: World, node: Node) -> None:
    """A source may go only when the destination holds every page, or is lost anyway."""
    guest = world.guests.get(node.other.name)
    if guest is None or guest.state is not G.RUNNING or guest.epoch != world.epoch:
        return
    if guest.missing and not guest.doomed:
        raise InvariantViolation(
            f"4: {node.name} destroyed its copy while {guest.node} lacks {sorted(guest.missing)}"
        )
