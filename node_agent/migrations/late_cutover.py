"""A cutover that wasn't verified in its time: announced and looked at again, until it is.

    network-not-verified ... somebody mends the switch ... network-verified

With growing gaps for about a quarter of an hour, for as long as the guest stays. Nothing depends on
it: it tells whoever mends the network when that is done, and helps the mended network along.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Final

from migrator.errors import FerryError
from migrator.model import DomainName, NicSpec, Witness
from migrator.ports import FabricDriver
from node_agent.events import EventKind, EventLog
from node_agent.migrations.judgement import is_verified
from node_agent.migrations.witnesses import Move, Witnesses

GAPS_S: Final = (2.0, 5.0, 10.0, 20.0, 30.0, *([60.0] * 14))
_PROBE_S: Final = 0.5


class LateCutover:
    """One node's, for all its guests. `forget` those that leave, come again, or end."""

    def __init__(self, fabric: FabricDriver, witnesses: Witnesses, events: EventLog) -> None:
        self._fabric = fabric
        self._witnesses = witnesses
        self._events = events
        self._sought: dict[DomainName, Move] = {}

    def forget(self, domain: DomainName) -> None:
        self._sought.pop(domain, None)

    async def seek(self, move: Move, nics: Sequence[NicSpec]) -> tuple[Witness, ...]:
        """Who found it after all; nobody: the guest has gone meanwhile, or it never was found."""
        self._sought[move.domain] = move
        for gap_s in GAPS_S:
            await asyncio.sleep(gap_s)
            if self._sought.get(move.domain) is not move:
                return ()
            with contextlib.suppress(FerryError):
                await self._fabric.announce(move.domain, move.nics)
            others = await self._witnesses.choose(move)
            found = await self._witnesses.ask(move.migration_id, nics, others, _PROBE_S)
            if self._sought.get(move.domain) is not move:
                return ()
            with contextlib.suppress(FerryError):
                await self._fabric.announce(move.domain, ())
            if is_verified(nics, found):
                self.forget(move.domain)
                self._events.emit(
                    EventKind.NETWORK_VERIFIED,
                    f"domain {move.domain}: the network leads to {move.destination} now",
                    domain=move.domain,
                    migration=move.migration_id,
                )
                return found
        return ()
