"""The connection tracking's port: what a node's packet filter remembers of its guests' connections.

Stateful rules (`ct state established accept`) let a packet pass because the node has seen its
connection begin. A guest that moves takes its connections to a node that has seen none of them.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Sequence
from typing import ClassVar

from migrator.model import DomainName
from migrator.struct import Struct


class Connection(Struct, frozen=True, kw_only=True):
    """One connection that a node keeps state of, as the driver of the same name reads it."""

    version: int
    """Of IP: 4 or 6."""
    entry: bytes


class TakenConnections(Struct, frozen=True, kw_only=True):
    """What a node knew of a guest's connections."""

    connections: tuple[Connection, ...] = ()
    translated: int = 0
    """Connections that this node translates (NAT), which can't go on elsewhere: not among them."""


class ConnectionTracker(abc.ABC):
    """One node's connection tracking. Errors: FabricError.

        source                                  destination
        take      just before the pause         install     before the guest's port opens
        loosen    meanwhile
        take_new  (paused) begun since          install     before the resume
        forget    after the grace time

    Addresses are texts, as a NIC's definition has them. Idempotent, all of it but `take_new`.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    async def take(self, domain: DomainName, addresses: Collection[str]) -> TakenConnections:
        """Every connection of these addresses; those that begin from now on are noted.

        Nothing where the node keeps no state at all. FabricError: it does, and it can't be read.
        """

    @abc.abstractmethod
    def take_new(self, domain: DomainName) -> TakenConnections:
        """Those that have begun since `take`, without waiting. Ends the notes."""

    @abc.abstractmethod
    async def loosen(self, connections: Sequence[Connection]) -> None:
        """Check no sequence numbers in them here any more, where they are known.

        What is for the guest may come here for a while, and be sent on; what it answers doesn't.
        FabricError: the node keeps state, and can't be told any.
        """

    @abc.abstractmethod
    async def install(self, connections: Sequence[Connection], addresses: Collection[str]) -> int:
        """Know them here, too; how many the kernel took. One of other addresses is left out.

        Sequence numbers aren't checked in them: what passed meanwhile wasn't seen here.
        FabricError: the node keeps state, and can't be told any.
        """

    @abc.abstractmethod
    async def forget(self, addresses: Collection[str], here: Collection[str]) -> int:
        """Remove the addresses' connections but those with somebody `here`; how many.

        This node itself is always here: what passes it goes on passing it.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """End the notes. What is known stays known."""
