"""One watch: a stream of changes from some member, resumed at the next one when it breaks.

A member resumes after the last revision that was seen, so no change is lost or repeated. A stream
that no member resumes for a while fails its `Watch`, and so does one whose past was compacted
away: its consumer lists again (`TypedStore.follow` does).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Final

import grpc
import grpc.aio
from aetcd import rpc

from migrator.errors import StoreError
from node_agent.state.etcd.client import METADATA, EtcdClient, Member
from node_agent.state.port import Change
from node_agent.state.watches import Watch

log = logging.getLogger(__name__)

_CREATE_S: Final = 2.0
"""How long a member may take to begin a watch."""
_GIVE_UP_S: Final = 10.0
"""How long all members may be silent before the watch fails."""
_PAUSE_S: Final = 0.1


class Over(StoreError):
    """The watch can't go on, at whatever member."""


class WatchStream:
    """Feeds one `Watch`, which it holds weakly: when nobody reads it any more, the stream ends.

    `began` is done once a member watches, or the watch failed. `decode` makes changes of one
    response's events.
    """

    def __init__(
        self,
        client: EtcdClient,
        watch: Watch,
        key: bytes,
        range_end: bytes,
        since_revision: int | None,
        decode: Callable[[Any], Iterable[Change]],
    ) -> None:
        self._client = client
        self._watch = weakref.ref(watch)
        self._key = key
        self._range_end = range_end
        self._last = since_revision
        """The last revision that needs no telling; None until the first member said where it is."""
        self._decode = decode
        loop = asyncio.get_running_loop()
        self.began: asyncio.Future[None] = loop.create_future()
        self.task = loop.create_task(self._run(), name="etcd-watch")
        ended = weakref.finalize(watch, _cancel, weakref.ref(loop), weakref.ref(self.task))
        ended.atexit = False

    async def close(self) -> None:
        """End the watch after what it was given."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        if (watch := self._watch()) is not None:
            watch.end()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            failing_since_s: float | None = None
            while True:
                for member in self._client.in_order():
                    try:
                        if await self._follow(member):
                            failing_since_s = None
                    except (grpc.aio.AioRpcError, TimeoutError) as error:
                        reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else ""
                        failing_since_s = failing_since_s or loop.time()
                        if loop.time() - failing_since_s > _GIVE_UP_S:
                            raise Over(
                                f"no member of etcd could be watched for {_GIVE_UP_S:g} s "
                                f"({reason or 'no answer'}): list again"
                            ) from error
                await asyncio.sleep(_PAUSE_S)
        except StoreError as error:
            self._fail(error)
        except Exception as error:  # A bug, or a stranger's key: whoever reads must hear of it.
            log.exception("a watch of etcd failed")
            self._fail(StoreError(f"a watch of etcd failed: {error!r}"))
        finally:
            self._begun()

    def _fail(self, error: StoreError) -> None:
        if (watch := self._watch()) is not None:
            watch.fail(error)

    def _begun(self) -> None:
        if not self.began.done():
            self.began.set_result(None)

    async def _follow(self, member: Member) -> bool:
        """Watch at one member until it breaks. Whether it began. Over: it can't go on anywhere."""
        call = member.watch(metadata=METADATA)
        try:
            created = None
            async with asyncio.timeout(_CREATE_S):
                await call.write(
                    rpc.WatchRequest(
                        create_request=rpc.WatchCreateRequest(
                            key=self._key,
                            range_end=self._range_end,
                            start_revision=0 if self._last is None else self._last + 1,
                        )
                    )
                )
                created = await call.read()
            if created is grpc.aio.EOF:
                raise TimeoutError
            if self._last is None:
                self._last = created.header.revision
            elif self._last > created.header.revision and not self.began.done():
                raise Over(
                    f"revision {self._last} is not reached yet ({created.header.revision} is the "
                    "newest): list again"
                )
            self._take(created)
            self._begun()
            while (response := await call.read()) is not grpc.aio.EOF:
                self._take(response)
            return True
        finally:
            call.cancel()

    def _take(self, response: Any) -> None:
        if response.compact_revision:
            raise Over(f"changes after revision {self._last} are not known any more: list again")
        if response.canceled:
            # A member without a leader, or one that ends: the next one goes on.
            raise TimeoutError
        watch = self._watch()
        if watch is None or watch.over:
            raise Over("nobody reads it")
        changes = list(self._decode(response.events))
        if changes:
            self._last = changes[-1].revision
            watch.offer(changes)


def _cancel(
    loop: weakref.ref[asyncio.AbstractEventLoop], task: weakref.ref[asyncio.Task[None]]
) -> None:
    running, stream = loop(), task()
    if running is not None and stream is not None and not running.is_closed():
        running.call_soon_threadsafe(stream.cancel)
