"""The agents' own protocol: who calls whom, by method name, with typed params and results."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from migrator.model import NodeName

P = TypeVar("P")
R = TypeVar("R")
Address = tuple[str, int]


class PeerHub:
    """This node's end of the agents' protocol: serves its peers, and calls them."""

    def __init__(
        self,
        node: NodeName,
        listen: Address,
        peers: Mapping[NodeName, Address],
        agent_version: str,
        *,
        ssl_contexts: Callable[[bool], ssl.SSLContext] | None = None,
    ) -> None:
        self.node = node

    async def start(self) -> None:
        """Listen. PeerError if the address can't be bound; then nothing is left."""
        raise NotImplementedError

    async def close(self) -> None:
        """Stop listening, cancel handlers, fail calls in flight, close connections. Idempotent."""
        raise NotImplementedError

    @property
    def address(self) -> Address:
        """Where it listens (the real port where 0 was asked for)."""
        raise NotImplementedError

    def set_peers(self, peers: Mapping[NodeName, Address]) -> None:
        """Replace the known peers. Connections to those that left or moved are closed."""
        raise NotImplementedError

    def handle(
        self, method: str, params_type: type[P], handler: Callable[[NodeName, P], Awaitable[Any]]
    ) -> None:
        """Serve `method` (calls and notices), here and for peers. The handler gets the caller."""
        raise NotImplementedError

    async def call(
        self,
        node: NodeName,
        method: str,
        params: object,
        result_type: type[R],
        *,
        timeout_s: float = 10.0,
    ) -> R:
        """Run `method` on `node` and return its result.

        PeerError when the node can't be reached, is lost or answers too late: the message says
        whether nothing was sent or the outcome is unknown. The handler's FerryError comes back
        with its type.
        """
        raise NotImplementedError

    async def notify(self, node: NodeName, method: str, params: object) -> None:
        """Send without an answer. PeerError if there is no connection; delivery isn't confirmed."""
        raise NotImplementedError

    def round_trip_ms(self, node: NodeName) -> float | None:
        """The last keepalive's round trip; None while not connected or not measured yet."""
        raise NotImplementedError

    def on_peer_change(self, callback: Callable[[NodeName, bool], None]) -> Callable[[], None]:
        """Call back when the connection to a peer comes up or is lost. Returns the unsubscriber."""
        raise NotImplementedError
