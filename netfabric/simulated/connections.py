"""Connection tracking in memory: an entry is its two addresses, `b"10.0.0.5 10.0.0.9"`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

from migrator.errors import FabricError
from migrator.model import DomainName
from migrator.ports import Connection, ConnectionTracker, TakenConnections


class SimulatedConnections(ConnectionTracker):
    """One node's. Tests change `known` and `unable` as they like."""

    name: ClassVar[str] = "simulated"

    def __init__(self) -> None:
        self.known: set[Connection] = set()
        self.own: frozenset[str] = frozenset()
        """The node's own addresses."""
        self.loose: set[Connection] = set()
        """Whose sequence numbers aren't checked."""
        self.unable = ""
        """Why its kernel can't be asked or told."""
        self._noted: dict[DomainName, tuple[frozenset[Connection], frozenset[str]]] = {}

    async def take(self, domain: DomainName, addresses: Collection[str]) -> TakenConnections:
        self._check()
        self._noted[domain] = frozenset(self.known), frozenset(addresses)
        return TakenConnections(connections=self._of(self.known, addresses))

    def take_new(self, domain: DomainName) -> TakenConnections:
        before, addresses = self._noted.pop(domain, (frozenset(self.known), frozenset[str]()))
        return TakenConnections(connections=self._of(self.known - before, addresses))

    async def loosen(self, connections: Sequence[Connection]) -> None:
        self._check()
        self.loose |= self.known & set(connections)

    async def install(self, connections: Sequence[Connection], addresses: Collection[str]) -> int:
        self._check()
        taken = self._of(connections, addresses)
        self.known.update(taken)
        return len(taken)

    async def forget(self, addresses: Collection[str], here: Collection[str]) -> int:
        self._check()
        staying = (set(here) | self.own) - set(addresses)
        kept = self._of(self.known, staying)
        gone = set(self._of(self.known, addresses)) - set(kept)
        self.known -= gone
        return len(gone)

    async def close(self) -> None:
        self._noted.clear()

    def _check(self) -> None:
        if self.unable:
            raise FabricError(self.unable)

    def _of(
        self, connections: Collection[Connection], addresses: Collection[str]
    ) -> tuple[Connection, ...]:
        return tuple(
            each for each in connections if set(each.entry.decode().split()) & set(addresses)
        )
