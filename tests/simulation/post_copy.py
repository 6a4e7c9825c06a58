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

if TYPE_CHECKING:
    from tests.simulation.side import Migration, Side

STEP_S = 0.004
RECONNECT_S = 10.0


def listening(side: Side) -> v.EngineListening:
    """The port tells an engine from its successor."""
    return v.EngineListening(host="10.0.0.2", port=port_of(side.engine), secret=b"s" * 32)


def port_of(engine: int) -> int:
    """Where an engine listens; by its number on its side."""
    return 7000 + engine


def tell_missing(side: Side, command: v.RunPass) -> None:
    """STALE and MISSING: the destination drops what is pending. Nothing is copied.

    A page stands for a thousand: what is dirtied while it is told may be told once more.
    """
    world = side.world
    source, destination = side.guest, side.other.guest
    engines = (side.engine, side.other.engine)
    if not all(engines) or source is None or destination is None:
        return
    final = command.kind is PassKind.MISSING
    told = side.pending | source.dirty
    source.dirty.clear()
    side.pending = set()

    def finish() -> None:
        if (side.engine, side.other.engine) != engines:
            return
        if not side.pages_flow:
            world.after(0.2, finish)
            return
        news = told - destination.missing
        for page in told:
            destination.missing.add(page)
            destination.memory[page] = -1
        if final:
            side.other.soon(v.PagesMissing())
            begin_filling(side.other, destination)
        report = PassReport(
            number=command.number,
            kind=command.kind,
            seconds=0.001,
            pages=1000 * len(news),
            bytes_sent=100,
            pending_pages=1000 * len(news if final else source.dirty - destination.missing),
        )
        side.soon(v.PassFinished(report=report))

    world.after(0.001 + world.delay(0.004), finish)


def start_successor(side: Side) -> list[v.Event]:
    """Destination: an engine that goes on where a dead one stopped, if pages are missing."""
    guest = side.guest
    if guest is None:
        return [v.EngineLost(reason="no such domain")]
    side.engine_serial += 1
    side.engine = side.engine_serial
    if guest.armed and not guest.missing:
        return [v.PagesComplete()]  # The dead one had let go of the memory with its last page.
    begin_filling(side, guest)
    return [listening(side)]


def connect_successor(side: Side, command: v.ConnectEngine) -> list[v.Event]:
    """Source: serve the pages to the engine that listens there, if it still does."""
    guest = side.served or side.guest
    if guest is None or not side.engine:
        return [v.EngineLost(reason="no such domain")]
    side.served = guest
    if command.port != port_of(side.other.engine):
        _dial_in_vain(side)
        return []
    side.linked = side.other.engine
    return [v.EngineConnected(pages_in_use=0, round_trip_ms=0.1)]


def _dial_in_vain(side: Side) -> None:
    """For a while. An engine that is told of another place meanwhile goes there."""
    engine = side.engine
    side.linked = 0

    def give_up() -> None:
        if side.engine == engine and not side.linked:
            side.kill_engine("nobody listens there")

    side.world.after(side.world.delay(RECONNECT_S), give_up)


def begin_filling(side: Side, guest: Guest) -> None:
    """One page at a time, for as long as this engine lives."""
    guest.armed = True
    side.world.after(STEP_S, partial(_fill, side, guest, side.engine))


def _fill(side: Side, guest: Guest, engine: int) -> None:
    world = side.world
    if side.engine != engine or side.guest is not guest:
        return
    served = _served_to(side)
    if guest.missing and served is not None and side.pages_flow:
        page = world.random.choice(sorted(guest.missing))
        guest.memory[page] = served.memory[page]
        guest.missing.discard(page)
        world.after(world.delay(STEP_S), partial(_fill, side, guest, engine))
    elif guest.missing:
        world.after(0.1, partial(_fill, side, guest, engine))
    else:
        side.soon(v.PagesComplete())


def _served_to(side: Side) -> Guest | None:
    """The memory that the source's engine serves to this node's."""
    other = side.other
    return other.served if other.engine and other.linked == side.engine else None


def peer_engine_gone(side: Side) -> None:
    """The engine that `node`'s talks to is gone. In post-copy a source's ends after a while, as any
    engine may; the real one dials on."""
    engine, gone = side.engine, side.linked
    if side.served is None or not engine or not gone:
        return

    def give_up() -> None:
        if side.engine == engine and side.linked == gone:
            side.kill_engine("the destination's engine is gone")

    side.world.after(side.world.delay(RECONNECT_S), give_up)


def reachable(side: Side) -> bool:
    """Whether what this side's guest lacks is anywhere."""
    other = side.other
    copy = other.guest
    if copy is not None and copy.state is not G.RUNNING and not copy.deposed:
        return True
    return bool(other.engine) and other.served is not None


def note_loss(migration: Migration) -> None:
    """After something died: are missing pages nowhere any more?"""
    side, domain = migration.destination, migration.domain
    guest = side.guest
    if guest is None or not guest.missing or guest.epoch != domain.epoch:
        return
    if guest.state in (G.LOADED, G.RUNNING) and not reachable(side):
        domain.lose("died", "pages that were missing")
        guest.doomed = True
