"""The dialing side: this node's calls to one peer, over one connection that comes back by itself.

A call dials if there is no connection; calls that come meanwhile share the attempt. After a failed
attempt the next one waits (50 ms, doubling up to 1 s), and so do the calls that need it, within
their own timeouts. Nobody dials while nobody calls.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable
from typing import Final

from migrator.errors import PeerError, RemoteProtocolError
from migrator.model import NodeName
from migrator.wire import Frame, FrameKind
from node_agent.peers import messages
from node_agent.peers.acceptor import explain
from node_agent.peers.connection import Connection, Owner, State, Timing
from node_agent.peers.messages import CancelParams, Hello, Notice, Request, Side

IN_FLIGHT_LIMIT: Final = 64
"""Calls to one peer at once; more wait, within their timeouts. The peer refuses more."""
_UNSENT_LIMIT_BYTES: Final = 4 * 1024 * 1024
"""Above it notices are refused: the peer doesn't read."""


class Link(Owner):
    """See the module. Every method runs on the event loop."""

    def __init__(
        self,
        node: NodeName,
        address: tuple[str, int],
        hello: Hello,
        timing: Timing,
        tls: Callable[[], ssl.SSLContext | None],
        changed: Callable[[NodeName, bool], None],
        admit: Callable[[str, str], str | None],
    ) -> None:
        self.node = node
        self.address = address
        self._hello = hello
        self._timing = timing
        self._tls = tls
        self._changed = changed
        self._admit = admit
        self._connection: Connection | None = None
        self._attempt: Connection | None = None
        self._greeting: asyncio.Future[None] | None = None
        """Set while dialing: done when `_attempt` is open, or lost."""
        self._dialing: asyncio.Task[Connection] | None = None
        self._failures = 0
        self._next_dial_at_s = 0.0
        self._slots = asyncio.Semaphore(IN_FLIGHT_LIMIT)
        self._next_id = messages.PING_ID + 1
        self._waiting: dict[int, tuple[str, asyncio.Future[bytes]]] = {}
        self._closed: str | None = None

    @property
    def round_trip_ms(self) -> float | None:
        return None if self._connection is None else self._connection.round_trip_ms

    async def call(self, method: str, params: bytes, timeout_s: float) -> bytes:
        """The packed result. PeerError, or the peer's own FerryError; see `PeerHub.call`."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        sent = False
        try:
            async with asyncio.timeout(timeout_s), self._slots:
                connection = self._connection or await self._connect()
                request_id, answer = self._send(connection, method, params, deadline_s)
                sent = True
                try:
                    return await answer
                finally:
                    del self._waiting[request_id]
                    if not answer.done() or answer.cancelled():
                        self._cancel(connection, request_id)
                    else:
                        answer.exception()  # Looked at, also where the caller was cancelled.
        except TimeoutError:
            outcome = "whether it was carried out is unknown" if sent else "nothing was sent"
            raise PeerError(
                f"{self.node} did not answer {method} within {timeout_s:g} s; {outcome}"
            ) from None

    async def notify(self, method: str, params: bytes) -> None:
        """Send without an answer. PeerError: nothing was sent."""
        connection = self._connection or await self._connect()
        if connection.unsent_bytes > _UNSENT_LIMIT_BYTES:
            raise PeerError(f"{self.node} doesn't read; {method} was not sent")
        connection.send(FrameKind.NOTICE, Notice(method=method, params=params))

    async def reach(self) -> None:
        """Make the connection if there is none. PeerError where that fails."""
        if self._connection is None:
            await self._connect()

    async def close(self, reason: str) -> None:
        """End the connection, the attempt at one, and every call. Idempotent."""
        self.shut(reason)
        if self._dialing is not None:
            await asyncio.wait([self._dialing], timeout=self._timing.linger_s)

    def shut(self, reason: str) -> None:
        """`close` without waiting for the attempt's task to end."""
        self._closed = reason
        if self._dialing is not None:
            self._dialing.cancel()
        if self._connection is not None:
            self._connection.abort(reason)

    def recheck(self) -> None:
        """Close the connection if the peer's certificate isn't accepted any more."""
        if self._connection is not None:
            refused = self._refusal(self._connection)
            if refused is not None:
                self._connection.abort(refused)

    def _refusal(self, connection: Connection) -> str | None:
        certificate = connection.certificate
        return None if certificate is None else self._admit(self.node, certificate.serial)

    def _send(
        self, connection: Connection, method: str, params: bytes, deadline_s: float
    ) -> tuple[int, asyncio.Future[bytes]]:
        loop = asyncio.get_running_loop()
        request_id, self._next_id = self._next_id, self._next_id + 1
        connection.send(
            FrameKind.REQUEST,
            Request(
                id=request_id,
                method=method,
                params=params,
                timeout_s=max(deadline_s - loop.time(), 0.0),
            ),
        )
        answer: asyncio.Future[bytes] = loop.create_future()
        self._waiting[request_id] = (method, answer)
        return request_id, answer

    def _cancel(self, connection: Connection, request_id: int) -> None:
        if connection.state is State.OPEN:
            params = messages.pack(CancelParams(id=request_id))
            connection.send(FrameKind.NOTICE, Notice(method=messages.CANCEL, params=params))

    # --- the connection ---------------------------------------------------------------------

    async def _connect(self) -> Connection:
        """The open connection, or the outcome of the one attempt that all callers share."""
        if self._closed is not None:
            raise PeerError(f"{self.node}: {self._closed}; nothing was sent")
        if self._dialing is None:
            self._dialing = asyncio.create_task(self._dial(), name=f"dial {self.node}")
            self._dialing.add_done_callback(self._dialed)
        try:
            return await asyncio.shield(self._dialing)
        except asyncio.CancelledError:
            if self._closed is None or self._is_cancelled():
                raise
            raise PeerError(f"{self.node}: {self._closed}; nothing was sent") from None

    def _is_cancelled(self) -> bool:
        """Whether the caller itself was cancelled (and not only the attempt it waited for)."""
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0

    def _dialed(self, task: asyncio.Task[Connection]) -> None:
        self._dialing = None
        if not task.cancelled():
            task.exception()  # Its callers, if they still wait, have it too.

    async def _dial(self) -> Connection:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(0.0, self._next_dial_at_s - loop.time()))
        connection = Connection(Side.DIALING, self, self._hello, self._timing)
        self._attempt = connection
        self._greeting = loop.create_future()
        try:
            async with asyncio.timeout(self._timing.dial_s):
                context = self._tls()
                await loop.create_connection(
                    lambda: connection,
                    *self.address,
                    ssl=context,
                    server_hostname=None if context is None else self.node,
                )
                await self._greeting
        except BaseException as error:
            connection.abort("gave up")
            pause_s = self._timing.backoff_first_s * 2 ** min(self._failures, 10)
            self._failures += 1
            self._next_dial_at_s = loop.time() + min(pause_s, self._timing.backoff_longest_s)
            if not isinstance(error, OSError | PeerError):  # A TimeoutError is an OSError.
                raise
            why = str(error)
            if isinstance(error, TimeoutError):
                why = "no answer"
            elif isinstance(error, ssl.SSLError):
                why = explain(error)
            elif isinstance(error, OSError) and error.errno:  # asyncio's own text has the address.
                why = os.strerror(error.errno)
            host, port = self.address
            raise PeerError(
                f"{self.node} can't be reached at {host} port {port}: {why}; nothing was sent"
            ) from error
        finally:
            self._attempt = self._greeting = None
        self._failures = 0
        return connection

    # --- what the connection says -----------------------------------------------------------

    def greeted(self, connection: Connection, hello: Hello) -> None:
        if hello.node != self.node:
            raise RemoteProtocolError(f"{hello.node} is at the address that {self.node} should be")
        if self._greeting is None or connection is not self._attempt:
            raise RemoteProtocolError("too late")
        refused = self._refusal(connection)
        if refused is not None:
            raise RemoteProtocolError(refused)
        self._connection = connection
        self._greeting.set_result(None)
        self._changed(self.node, True)

    def received(self, connection: Connection, frame: Frame) -> None:
        if frame.kind is not FrameKind.RESPONSE:
            raise RemoteProtocolError("a request came from the listening side")
        response = messages.open_frame(frame, messages.response_decoder)
        _, answer = self._waiting.get(response.id, ("", None))
        if answer is None or answer.done():
            return  # The caller has stopped waiting.
        if response.error is None:
            answer.set_result(response.result)
        else:
            answer.set_exception(messages.from_failure(response.error))

    def lost(self, connection: Connection, reason: str) -> None:
        greeting = self._greeting if connection is self._attempt else None
        if greeting is not None and not greeting.done():
            greeting.set_exception(PeerError(reason))
        if self._connection is not connection:
            return
        self._connection = None
        loop = asyncio.get_running_loop()
        self._next_dial_at_s = loop.time() + self._timing.backoff_first_s
        for method, answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(
                    PeerError(
                        f"the connection to {self.node} was lost ({reason}) before it answered "
                        f"{method}; whether that was carried out is unknown"
                    )
                )
        self._changed(self.node, False)
