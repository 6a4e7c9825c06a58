"""The two responses that don't end by themselves: the event log (SSE) and a followed console.

Both end when the client goes, when the server closes (`Streams.close`), when the client's token has
ended, or doesn't suffice any more, and at the latest after `LONGEST_S`: an SSE client reconnects by
itself and resumes after its Last-Event-ID.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

import msgspec
from aiohttp import hdrs, web

from migrator.errors import FerryError, NotFoundError
from node_agent.api.auth import may_still
from node_agent.api.requests import CLUSTER, domain_of, flag, invalid_query, number, reply
from node_agent.events import AWAY, HEARTBEAT, ClusterEvent, EventList

STREAMS_LIMIT: Final = 64
HEARTBEAT_S: Final = 10.0
LONGEST_S: Final = 24 * 3600.0
RETRY_MS: Final = 2000
CONSOLE_POLL_S: Final = 0.2
CONSOLE_SILENCE_S: Final = 60.0
"""How long a followed console survives without an answer from the domain's node."""
EVENT_STREAM: Final = "text/event-stream"


class Streams:
    """The streams that are open, so that they can be counted and ended."""

    def __init__(self, heartbeat_s: float = HEARTBEAT_S) -> None:
        self.heartbeat_s = heartbeat_s
        self._tasks: set[asyncio.Task[object]] = set()

    @contextlib.asynccontextmanager
    async def one(self, request: web.Request) -> AsyncIterator[None]:
        """Around a stream: it ends quietly, by what is told above. 503 when there are too many."""
        if len(self._tasks) >= STREAMS_LIMIT:
            raise web.HTTPServiceUnavailable(
                text=f"{STREAMS_LIMIT} streams are open already; that is the most"
            )
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a stream runs in a task")
        self._tasks.add(task)
        try:
            async with asyncio.timeout(LONGEST_S) as bound:
                ending = asyncio.create_task(self._end_unpermitted(request, bound))
                try:
                    yield
                finally:
                    ending.cancel()
                    await asyncio.gather(ending, return_exceptions=True)
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self._tasks.discard(task)

    async def _end_unpermitted(self, request: web.Request, bound: asyncio.Timeout) -> None:
        """Its next request, with which a client comes again, says why."""
        while True:
            await asyncio.sleep(self.heartbeat_s)
            if not await may_still(request):
                bound.reschedule(asyncio.get_running_loop().time())
                return

    async def close(self) -> None:
        """End them all."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


STREAMS: Final = web.AppKey("streams", Streams)


async def read_events(request: web.Request) -> web.StreamResponse:
    """SSE; the list so far for a client that accepts JSON only."""
    events = request.app[CLUSTER].events
    after = number(request, "after", None)
    resume = request.headers.get("Last-Event-ID")
    if resume is not None:
        if not (resume.isascii() and resume.isdigit() and len(resume) <= 16):
            raise invalid_query("Last-Event-ID", "the id of an event")
        after = int(resume)
    if request.headers.get(hdrs.ACCEPT, "").startswith("application/json"):
        limit = number(request, "limit", 1000, at_least=1, at_most=10_000) or 1000
        return reply(EventList(events=tuple(await events.read(after_seq=after or 0, limit=limit))))
    if "limit" in request.query:
        raise invalid_query("limit", "left out, or Accept be application/json: a stream has no end")
    response = web.StreamResponse(
        headers={hdrs.CONTENT_TYPE: EVENT_STREAM, hdrs.CACHE_CONTROL: "no-store"}
    )
    streams = request.app[STREAMS]
    async with streams.one(request):
        await response.prepare(request)
        await response.write(f"retry: {RETRY_MS}\n\n".encode())
        try:
            begun = asyncio.Event()
            await _pump(response, events.tail(after, begun), begun, streams.heartbeat_s)
        except FerryError as error:  # The store is gone: the client comes again.
            await response.write(f"{AWAY}{' '.join(str(error).split())}\n\n".encode())
    return response


async def _pump(
    response: web.StreamResponse,
    events: AsyncIterator[ClusterEvent],
    begun: asyncio.Event,
    heartbeat_s: float,
) -> None:
    """Events as they come, and a comment in every pause, which finds clients that are gone."""
    pending = asyncio.ensure_future(_next(events))
    try:
        while True:
            await asyncio.wait({pending}, timeout=heartbeat_s)
            if not pending.done():
                comment = HEARTBEAT if begun.is_set() else ": waiting for the store"
                await response.write(f"{comment}\n\n".encode())
                continue
            event = pending.result()
            if event is None:
                return
            data = msgspec.json.encode(event)
            head = f"id: {event.seq}\nevent: {event.kind}\ndata: ".encode()
            await response.write(head + data + b"\n\n")
            pending = asyncio.ensure_future(_next(events))
    finally:
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)


async def _next(events: AsyncIterator[ClusterEvent]) -> ClusterEvent | None:
    return await anext(events, None)


async def read_console(request: web.Request) -> web.StreamResponse:
    """The end of the console, from an offset, or all that comes."""
    cluster, domain = request.app[CLUSTER], domain_of(request)
    limit_bytes = number(request, "limit_bytes", 65_536, at_least=1, at_most=65_536) or 65_536
    offset = number(request, "offset", None)
    following = flag(request, "follow")
    node, chunk = await cluster.console(domain, offset=offset, limit_bytes=limit_bytes)
    headers = {"Ferry-Node": node, "Ferry-Console-End": str(chunk.end)}
    if not following:
        return web.Response(
            body=chunk.data, content_type="text/plain", charset="utf-8", headers=headers
        )
    response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "text/plain; charset=utf-8"})
    loop = asyncio.get_running_loop()
    async with request.app[STREAMS].one(request):
        await response.prepare(request)
        answered_at = loop.time()
        while loop.time() - answered_at < CONSOLE_SILENCE_S:
            if chunk.data:
                await response.write(chunk.data)
            else:
                await asyncio.sleep(CONSOLE_POLL_S)
                if request.transport is None or request.transport.is_closing():
                    break
            end, last_node = chunk.end, node
            chunk = type(chunk)(offset=end, data=b"")
            try:
                node, fresh = await cluster.console(domain, offset=end, limit_bytes=limit_bytes)
                if node != last_node:  # It moved: there its log begins anew.
                    node, fresh = await cluster.console(domain, offset=0, limit_bytes=limit_bytes)
                chunk, answered_at = fresh, loop.time()
            except NotFoundError:
                break
            except FerryError:
                node = last_node
                await asyncio.sleep(1.0)
    return response
