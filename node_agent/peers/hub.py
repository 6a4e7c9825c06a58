"""The agents' own protocol: who calls whom, by method name, with typed params and results.

    PeerHub ── Methods               what this node serves, to peers and to itself
       ├────── Inbound (one a connection that a peer dialed) ── handler tasks
       └────── Link (one a peer that we call) ── Connection, calls in flight

Each node dials those that it calls: a pair has up to two connections, one a direction. Frames and
messages are in `messages.py`, greeting and keepalive in `connection.py`.

With `ssl_contexts` every connection is mutual TLS 1.3, and a peer is who its certificate says: its
HELLO must say the same. `admit` may refuse a certificate all the same (revoked). Without, a peer is
who its HELLO says, if that name is known: the network must be trusted.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeVar

from migrator.errors import FerryError, PeerError, words
from migrator.model import NodeName
from node_agent.peers import messages
from node_agent.peers.acceptor import Acceptor, stop_listening
from node_agent.peers.connection import Connection, Timing
from node_agent.peers.link import Link
from node_agent.peers.messages import Hello, Side
from node_agent.peers.refusals import RefusalLog
from node_agent.peers.service import Inbound, Methods

P = TypeVar("P")
R = TypeVar("R")
Address = tuple[str, int]
SslContexts = Callable[[Side], ssl.SSLContext]
Admit = Callable[[str, str], str | None]
"""Why a node with a certificate of this serial number isn't served; None if it is."""

INBOUND_LIMIT: Final = 256
"""Connections from peers at once; more are refused at their HELLO."""
_CLOSE_S: Final = 5.0
_log = logging.getLogger(__name__)


class PeerHub:
    """This node's end of the agents' protocol: serves its peers, and calls them.

    `listen` and the peers' addresses are (host, port). `peers` may name this node: it is ignored.
    """

    def __init__(
        self,
        node: NodeName,
        listen: Address,
        peers: Mapping[NodeName, Address],
        agent_version: str,
        *,
        ssl_contexts: SslContexts | None = None,
        admit: Admit = lambda node, serial: None,
        timing: Timing | None = None,
    ) -> None:
        self.node = node
        self._listen = listen
        self._hello = Hello(
            version=messages.PROTOCOL_VERSION, node=node, agent_version=agent_version
        )
        self._ssl_contexts = ssl_contexts
        self._admit = admit
        self.refusals = RefusalLog(_log, node)
        self._acceptor: Acceptor | None = None
        self._timing = timing or Timing()
        self._methods = Methods(node)
        self._server: asyncio.Server | None = None
        self._links: dict[NodeName, Link] = {}
        self._inbound: set[Inbound] = set()
        self._callbacks: list[Callable[[NodeName, bool], None]] = []
        self._closed = False
        self.set_peers(peers)

    async def start(self) -> None:
        """Listen. PeerError if the address can't be bound; then nothing is left."""
        host, port = self._listen
        contexts = self._ssl_contexts
        accept: Callable[[], asyncio.Protocol] = self._accept
        if contexts is not None:
            self._acceptor = accept = Acceptor(
                lambda: contexts(Side.LISTENING), self._accept, self.refusals.note
            )
        try:
            self._server = await asyncio.get_running_loop().create_server(
                accept, host, port, backlog=128
            )
        except OSError as error:
            raise PeerError(
                f"{self.node} can't listen on {host} port {port}: {words(error)}"
            ) from error

    async def close(self) -> None:
        """Stop listening, cancel handlers, fail calls in flight, close connections. Idempotent."""
        self._closed = True
        if self._server is not None:
            await stop_listening(self._server)
        if self._acceptor is not None:
            await self._acceptor.close()
        tasks = [task for inbound in self._inbound for task in inbound.tasks]
        for inbound in list(self._inbound):
            if inbound.connection is not None:
                inbound.connection.abort("the agent is shutting down")
        for task in tasks:
            task.cancel()
        for link in self._links.values():
            await link.close("the agent is shutting down")
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=_CLOSE_S)
            for task in left:
                _log.error("%s did not end within %g s", task.get_name(), _CLOSE_S)
        await asyncio.sleep(0)  # Let the sockets' last callbacks run.

    @property
    def address(self) -> Address:
        """Where it listens (the real port where 0 was asked for)."""
        if self._server is None or not self._server.sockets:
            return self._listen
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    def set_peers(self, peers: Mapping[NodeName, Address]) -> None:
        """Replace the known peers. Connections of those that left or moved are closed."""
        for node, link in list(self._links.items()):
            if peers.get(node) != link.address:
                link.shut("it left, or its address changed")
                del self._links[node]
        for inbound in list(self._inbound):
            if inbound.node and inbound.node not in peers and inbound.connection is not None:
                inbound.connection.refuse(f"{self.node} does not know {inbound.node} any more")
        for node, address in peers.items():
            if node != self.node and node not in self._links:
                self._links[node] = Link(
                    node,
                    address,
                    self._hello,
                    self._timing,
                    self._dialing_context,
                    self._changed,
                    self._admit,
                )

    def handle(
        self, method: str, params_type: type[P], handler: Callable[[NodeName, P], Awaitable[object]]
    ) -> None:
        """Serve `method` (calls and notices), to peers and to this node itself.

        The handler gets the caller's name and the params. Its FerryError reaches the caller with
        its type; anything else it raises is logged here and reaches the caller as FerryError. It
        is cancelled when the caller gives up or is lost: it must clean up then.
        """
        self._methods.add(method, params_type, handler)

    async def call(
        self,
        node: NodeName,
        method: str,
        params: object,
        result_type: type[R],
        *,
        timeout_s: float = 10.0,
    ) -> R:
        """Run `method` on `node` (also this one) and return its result.

        PeerError when the node can't be reached, is lost or answers too late: the message says
        whether nothing was sent or the outcome is unknown. The handler's FerryError comes back
        with its type. LocalProtocolError where the params are above the cap of 1 MiB.
        """
        packed = messages.pack(params)
        if node == self.node:
            answer = await self._methods.run(node, method, packed, timeout_s)
        else:
            answer = await self._link(node).call(method, packed, timeout_s)
        return messages.unpack(answer, result_type, f"the answer of {node} to {method}")

    async def notify(
        self, node: NodeName, method: str, params: object, *, timeout_s: float = 10.0
    ) -> None:
        """Send without an answer. PeerError: nothing was sent. Delivery is not confirmed."""
        packed = messages.pack(params)
        if node == self.node:
            try:
                await self._methods.run(node, method, packed, timeout_s)
            except FerryError as error:
                _log.warning("the notice %s to ourselves failed: %s", method, error)
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._link(node).notify(method, packed)
        except TimeoutError:
            raise PeerError(
                f"{node} can't be reached within {timeout_s:g} s; {method} was not sent"
            ) from None

    async def reach(self, node: NodeName, *, timeout_s: float = 10.0) -> None:
        """Make our connection to `node` if there is none. PeerError: it can't be reached."""
        if node == self.node:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._link(node).reach()
        except TimeoutError:
            raise PeerError(f"{node} can't be reached within {timeout_s:g} s") from None

    def round_trip_ms(self, node: NodeName) -> float | None:
        """The last keepalive's round trip; None while we have no connection to it."""
        if node == self.node:
            return 0.0
        link = self._links.get(node)
        return None if link is None else link.round_trip_ms

    def on_peer_change(self, callback: Callable[[NodeName, bool], None]) -> Callable[[], None]:
        """Call back when our connection to a peer opens (True) or is lost. Returns the undoer.

        Connections are made by calls, and by `reach`: a peer that nobody here calls never shows up.
        """
        self._callbacks.append(callback)

        def undo() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return undo

    def _link(self, node: NodeName) -> Link:
        if self._closed:
            raise PeerError("this agent is shutting down; nothing was sent")
        link = self._links.get(node)
        if link is None:
            raise PeerError(f"{node} is not a known peer of {self.node}; nothing was sent")
        return link

    def _dialing_context(self) -> ssl.SSLContext | None:
        return None if self._ssl_contexts is None else self._ssl_contexts(Side.DIALING)

    def recheck(self) -> None:
        """Ask `admit` again about every connection, and close those that it refuses now."""
        for inbound in list(self._inbound):
            connection = inbound.connection
            if connection is not None and connection.certificate is not None and inbound.node:
                reason = self._admit(inbound.node, connection.certificate.serial)
                if reason is not None:
                    self.refusals.note(inbound.node, reason)
                    connection.refuse(reason)
        for link in self._links.values():
            link.recheck()

    def _accept(self) -> Connection:
        inbound = Inbound(self._methods, self._inbound, self._refusal, self.refusals)
        return Connection(Side.LISTENING, inbound, self._hello, self._timing)

    def _refusal(self, node: str, connection: Connection) -> str | None:
        """Why a peer of this name isn't served; None if it is."""
        certificate = connection.certificate
        if certificate is not None:
            if certificate.node != node:
                return f"its certificate is of {certificate.node}, but it says that it is {node!r}"
            refused = self._admit(node, certificate.serial)
            if refused is not None:
                return refused
        if self._closed:
            return "the agent is shutting down"
        if len(self._inbound) > INBOUND_LIMIT:
            return f"{self.node} has {INBOUND_LIMIT} connections already"
        if node == self.node:
            return f"{node} is this node itself: two agents have one name"
        if node not in self._links:
            return f"{self.node} does not know a node {node!r}"
        return None

    def _changed(self, node: NodeName, connected: bool) -> None:
        for callback in list(self._callbacks):
            try:
                callback(node, connected)
            except Exception:
                _log.exception("a callback of on_peer_change failed")
