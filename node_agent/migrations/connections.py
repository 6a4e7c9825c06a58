"""A guest's connections, as stateful rules know them, told from its old node to its new one.

    source                                    destination
      │ take: what its kernel knows
      │ connections ────────────────────────────► install, before the port opens
      │ loosen: what answers them won't pass here
      │ (network.expect, divert)                  so what comes by the tunnel is known, too
      │ pause: those that have begun since
      │ connections ────────────────────────────► install, before the resume
      │ (grace time over) forget

They are told while the guest still runs, so however many there are, its blackout isn't longer. What
can't be told is an event and a `problem` of the cutover: nothing here fails a migration.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from migrator.errors import FerryError, WrongStateError
from migrator.model import DomainName, MovedConnections, NodeName
from migrator.ports import Connection, ConnectionTracker, FabricDriver, Struct, TakenConnections
from node_agent.events import EventKind, EventLog
from node_agent.migrations.witnesses import Move
from node_agent.peers.hub import PeerHub

log = logging.getLogger(__name__)

CONNECTIONS: Final = "network.connections"
TELL_S: Final = 1.0
"""The pause waits so long for all of it; the guest runs meanwhile."""
CONNECTIONS_MAX: Final = 20_000
"""Of one guest, that are moved: some 5 MB."""
_AT_ONCE: Final = 2_000
"""Some 500 KB, of the 1 MiB that a message may have."""


class ConnectionsParams(Struct, frozen=True, kw_only=True):
    migration_id: str
    domain: DomainName
    addresses: tuple[str, ...]
    connections: tuple[Connection, ...]


class Installed(Struct, frozen=True, kw_only=True):
    count: int


@dataclass(slots=True)
class _Told:
    """What the source has told of one migration's guest."""

    figures: MovedConnections
    addresses: tuple[str, ...]


class ConnectionMover:
    """See the module. `register` before the hub starts."""

    def __init__(
        self,
        node: NodeName,
        *,
        hub: PeerHub,
        fabric: FabricDriver,
        tracker: ConnectionTracker,
        events: EventLog,
        expected: Callable[[DomainName], str | None],
    ) -> None:
        """`expected`: the migration by which a domain is on its way here, if it is."""
        self.node = node
        self._hub = hub
        self._fabric = fabric
        self._tracker = tracker
        self._events = events
        self._expected = expected
        self._told: dict[DomainName, _Told] = {}

    def register(self) -> None:
        """Serve the other nodes' words."""
        self._hub.handle(CONNECTIONS, ConnectionsParams, self._on_connections)

    # --- the source --------------------------------------------------------------------------

    async def tell(self, move: Move, learnt: Sequence[Sequence[str]]) -> str | None:
        """Just before the pause. Bounded by TELL_S; what couldn't be done, None if all was."""
        defined = [text for nic in move.nics for text in nic.addresses]
        addresses = tuple(dict.fromkeys([*defined, *(text for each in learnt for text in each)]))
        self.stays(move.domain)
        if not addresses:
            return None
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(TELL_S):
                taken = await self._tracker.take(move.domain, addresses)
                told = _Told(MovedConnections(left=taken.translated), addresses)
                self._told[move.domain] = told
                loosening = asyncio.create_task(self._loosen(move, taken.connections))
                try:
                    count = await self._send(move, addresses, taken.connections)
                    await loosening
                finally:
                    loosening.cancel()
        except (FerryError, TimeoutError) as error:
            reason = str(error) or f"not told within {TELL_S:g} s"
            return self._complain(move, f"stateful rules may cut connections: {reason}")
        told_ms = (time.monotonic() - started_s) * 1e3
        told.figures = msgspec.structs.replace(told.figures, moved=count, told_ms=told_ms)
        missing = len(taken.connections) - count
        if missing > 0:
            return self._complain(move, f"{missing} of its connections weren't taken")
        return None

    def rest(self, move: Move) -> Coroutine[Any, Any, None]:
        """In the moment of the pause: what tells those that have begun since. Never fails."""
        told = self._told.get(move.domain)
        taken = self._tracker.take_new(move.domain) if told is not None else TakenConnections()
        return self._tell_rest(move, told, taken)

    async def _tell_rest(self, move: Move, told: _Told | None, taken: TakenConnections) -> None:
        if told is None:
            return
        try:
            count = await self._send(move, told.addresses, taken.connections)
            await self._loosen(move, taken.connections)
            figures = told.figures
            told.figures = msgspec.structs.replace(
                figures,
                moved=figures.moved + count,
                begun_late=count,
                left=figures.left + taken.translated,
            )
        except FerryError as error:
            log.warning("migration %s: late connections weren't told: %s", move.migration_id, error)

    async def _send(
        self, move: Move, addresses: tuple[str, ...], connections: Sequence[Connection]
    ) -> int:
        """How many the destination has taken. FerryError: it can't take any, or isn't there."""
        count = 0
        for at in range(0, min(len(connections), CONNECTIONS_MAX), _AT_ONCE):
            params = ConnectionsParams(
                migration_id=move.migration_id,
                domain=move.domain,
                addresses=addresses,
                connections=tuple(connections[at : at + _AT_ONCE]),
            )
            answer = await self._hub.call(
                move.destination, CONNECTIONS, params, Installed, timeout_s=TELL_S
            )
            count += answer.count
        return count

    async def _loosen(self, move: Move, connections: Sequence[Connection]) -> None:
        """What takes the tunnel passes this node's rules, too. Never fails."""
        try:
            await self._tracker.loosen(connections)
        except FerryError as error:
            log.warning("migration %s: stateful rules may drop: %s", move.migration_id, error)

    def stays(self, domain: DomainName) -> None:
        """The guest doesn't leave after all. Idempotent."""
        if self._told.pop(domain, None) is not None:
            self._tracker.take_new(domain)

    def figures(self, domain: DomainName) -> MovedConnections | None:
        """What was moved; None where there was nothing."""
        told = self._told.get(domain)
        if told is None or not (told.figures.moved or told.figures.left):
            return None
        return told.figures

    async def left(self, domain: DomainName) -> None:
        """After the grace time: its connections pass here no more. Never fails."""
        told = self._told.pop(domain, None)
        if told is not None:
            await self._forget(domain, told.addresses)

    # --- the destination ---------------------------------------------------------------------

    async def gone(self, move: Move) -> None:
        """Its copy here is destroyed and never ran. Never fails."""
        addresses = [text for nic in move.nics for text in nic.addresses]
        await self._forget(move.domain, addresses)

    async def _on_connections(self, _: NodeName, params: ConnectionsParams) -> Installed:
        if self._expected(params.domain) != params.migration_id:
            raise WrongStateError(f"domain {params.domain}", "not expected here", "expected")
        count = await self._tracker.install(params.connections, params.addresses)
        return Installed(count=count)

    # --- both --------------------------------------------------------------------------------

    async def _forget(self, domain: DomainName, addresses: Collection[str]) -> None:
        if not addresses:
            return
        try:
            count = await self._tracker.forget(addresses, self._fabric.addresses_here())
        except FerryError as error:
            log.warning("connections of domain %s are known on: %s", domain, error)
        else:
            log.debug("%d connections of domain %s are forgotten", count, domain)

    def _complain(self, move: Move, text: str) -> str:
        self._events.emit(
            EventKind.CONNECTIONS_NOT_MOVED,
            f"domain {move.domain} moves to {move.destination}: {text}",
            domain=move.domain,
            migration=move.migration_id,
        )
        return text
