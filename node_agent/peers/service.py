"""The listening side: the methods that this node serves, and one `Inbound` a connection.

A connection may have `HANDLERS_LIMIT` handlers running; a request above it is refused (the peer's
own `Link` never sends so many). Handlers run concurrently, in no promised order. They are
cancelled when their time is over, their caller gives up, or the connection is lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from migrator.errors import (
    FerryError,
    InvalidRequest,
    LocalProtocolError,
    PeerError,
    RemoteProtocolError,
)
from migrator.model import NodeName
from migrator.unknown_fields import decode
from migrator.wire import BODY_CAP_BYTES, Frame, FrameKind
from node_agent.peers import messages
from node_agent.peers.connection import Connection, Owner, State
from node_agent.peers.messages import CancelParams, Hello, Notice, Request, Response
from node_agent.peers.refusals import RefusalLog

HANDLERS_LIMIT: Final = 64
_TIMEOUT_LONGEST_S: Final = 3600.0
_log = logging.getLogger(__name__)

Handler = Callable[[NodeName, Any], Awaitable[Any]]


class Methods:
    """What this node serves, by method name; also to itself."""

    def __init__(self, node: NodeName) -> None:
        self._node = node
        self._methods: dict[str, tuple[msgspec.msgpack.Decoder[Any], Handler]] = {}

    def add(self, method: str, params_type: Any, handler: Handler) -> None:
        """LocalProtocolError if the method is served already."""
        if method in self._methods or method.startswith("ferry."):
            raise LocalProtocolError(f"the method {method} is taken")
        self._methods[method] = (msgspec.msgpack.Decoder(params_type), handler)

    async def run(self, caller: NodeName, method: str, params: bytes, timeout_s: float) -> bytes:
        """The packed result. Whatever goes wrong is a FerryError that can cross the wire."""
        decoder, handler = self._methods.get(method, (None, None))
        if decoder is None or handler is None:
            raise RemoteProtocolError(f"{self._node} does not know the method {method}")
        try:
            decoded = decode(params, decoder)
        except messages.MALFORMED as error:
            raise InvalidRequest(f"the params of {method} are wrong: {error}") from error
        bound = asyncio.timeout(min(max(timeout_s, 0.0), _TIMEOUT_LONGEST_S))
        try:
            async with bound:
                return messages.pack(await handler(caller, decoded))
        except FerryError:
            raise
        except Exception as error:
            if bound.expired():
                raise PeerError(
                    f"{self._node} gave {method} up after {timeout_s:g} s; what it did is unknown"
                ) from error
            _log.exception("the handler of %s, called by %s, failed", method, caller)
            raise FerryError(
                f"{self._node} failed in {method}: {type(error).__name__}: {error}"
            ) from error


class Inbound(Owner):
    """One connection that a peer dialed, and the handlers that it has running.

    It is in the set `connections` from its first to its last moment. `refusal` says why a peer of
    some name isn't served; None if it is.
    """

    def __init__(
        self,
        methods: Methods,
        connections: set[Inbound],
        refusal: Callable[[str, Connection], str | None],
        refusals: RefusalLog,
    ) -> None:
        self.node = NodeName("")
        self.connection: Connection | None = None
        self._methods = methods
        self._connections = connections
        self._refusal = refusal
        self._refusals = refusals
        self._requests: dict[int, asyncio.Task[None]] = {}
        self._notices: set[asyncio.Task[None]] = set()

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """The handlers that run."""
        return [*self._requests.values(), *self._notices]

    def made(self, connection: Connection) -> None:
        self.connection = connection
        self._connections.add(self)

    def greeted(self, connection: Connection, hello: Hello) -> None:
        reason = self._refusal(hello.node, connection)
        if reason is not None:
            self._refusals.note(connection.address or repr(hello.node), reason)
            raise RemoteProtocolError(reason)
        self.node = NodeName(hello.node)

    def received(self, connection: Connection, frame: Frame) -> None:
        if frame.kind is FrameKind.REQUEST:
            self._take_request(connection, messages.open_frame(frame, messages.request_decoder))
        elif frame.kind is FrameKind.NOTICE:
            self._take_notice(messages.open_frame(frame, messages.notice_decoder))
        else:
            raise RemoteProtocolError("a response, but nothing was asked")

    def lost(self, connection: Connection, reason: str) -> None:
        for task in self.tasks:
            task.cancel()
        self._connections.discard(self)

    def _take_request(self, connection: Connection, request: Request) -> None:
        if request.id in self._requests or request.id == messages.PING_ID:
            raise RemoteProtocolError(f"request {request.id} was asked twice")
        if self._is_full():
            error = PeerError(f"{HANDLERS_LIMIT} calls are running; nothing was done")
            _respond(connection, Response(id=request.id, error=messages.to_failure(error)))
            return
        task = asyncio.create_task(
            self._serve(connection, request), name=f"{request.method} for {self.node}"
        )
        self._requests[request.id] = task
        task.add_done_callback(lambda _: self._requests.pop(request.id, None))

    def _take_notice(self, notice: Notice) -> None:
        if notice.method == messages.CANCEL:
            cancel = messages.unpack(notice.params, CancelParams, notice.method)
            task = self._requests.get(cancel.id)
            if task is not None:
                task.cancel()
        elif self._is_full():
            _log.warning("dropped the notice %s of %s: it sends too many", notice.method, self.node)
        else:
            task = asyncio.create_task(
                self._heed(notice), name=f"notice {notice.method} of {self.node}"
            )
            self._notices.add(task)
            task.add_done_callback(self._notices.discard)

    def _is_full(self) -> bool:
        return len(self._requests) + len(self._notices) >= HANDLERS_LIMIT

    async def _serve(self, connection: Connection, request: Request) -> None:
        try:
            result = await self._methods.run(
                self.node, request.method, request.params, request.timeout_s
            )
            response = Response(id=request.id, result=result)
        except FerryError as error:
            response = Response(id=request.id, error=messages.to_failure(error))
        _respond(connection, response)

    async def _heed(self, notice: Notice) -> None:
        try:
            await self._methods.run(
                self.node, notice.method, notice.params, messages.NOTICE_TIMEOUT_S
            )
        except FerryError as error:
            _log.warning("the notice %s of %s failed: %s", notice.method, self.node, error)


def _respond(connection: Connection, response: Response) -> None:
    if connection.state is not State.OPEN:
        return
    try:
        connection.send(FrameKind.RESPONSE, response)
    except LocalProtocolError:  # Above the cap: the caller is told, instead of left to wait.
        limit = BODY_CAP_BYTES[FrameKind.RESPONSE]
        too_large = FerryError(f"the answer is larger than {limit} bytes; the call was carried out")
        connection.send(
            FrameKind.RESPONSE, Response(id=response.id, error=messages.to_failure(too_large))
        )
