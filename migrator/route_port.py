"""The routers' port: host routes that follow a domain between nodes without a common layer 2."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar


class RouteDriver(abc.ABC):
    """Tells the routers of the guests' network which node an address is on. Errors: FabricError.

        source                                     destination
                                                   prepare          long before: whatever takes time
                                                   lead_here_now    (resumed) said, without waiting
                                                   lead_here        until every router has it
        leads_away?  seen here, too
        withdraw     only then

    Addresses are texts, as a NIC's definition has them. Idempotent, all of it.
    """

    name: ClassVar[str]

    async def cut_off(self, addresses: Sequence[str]) -> str:
        """Why nobody would hear from this node where these are, where that is certain; else ""."""
        return ""

    @abc.abstractmethod
    async def open(self) -> None:
        """At the agent's start. FabricError: what this node lacks."""

    @abc.abstractmethod
    def hold(self, addresses: Sequence[str]) -> None:
        """They were here before this agent started. Says so only where nothing else is known."""

    @abc.abstractmethod
    async def prepare(self, addresses: Sequence[str]) -> None:
        """The addresses will be here soon. Changes no packet's way."""

    @abc.abstractmethod
    def lead_here_now(self, addresses: Sequence[str]) -> float | None:
        """In the moment of the resume: say so once, without waiting.

        The wall-clock time (s) at which it was said; None if nothing could be.
        """

    @abc.abstractmethod
    async def lead_here(self, addresses: Sequence[str]) -> None:
        """The addresses are here; returns when every router leads here. Bounded.

        FabricError names those that haven't said so; the next call goes on.
        """

    @abc.abstractmethod
    async def leads_away(self, addresses: Sequence[str]) -> bool:
        """Whether the network was seen, from here, to lead every address to another node."""

    async def hop_of(self, address: str) -> str | None:
        """The node that the network was seen, from here, to lead it to; None: it can't be told."""
        return None

    @abc.abstractmethod
    async def withdraw(self, addresses: Sequence[str]) -> None:
        """This node says no more that they are here: they are elsewhere, or nowhere. Bounded."""

    @abc.abstractmethod
    async def close(self) -> None:
        """The routes stay: the guests go on."""
