"""One watcher's bounded queue of changes, shared by the state store's drivers.

A `Watch` is fed on the event loop. It never loses or repeats a change: a watcher that falls
`QUEUE_LIMIT` changes behind is told so by StoreError instead, and begins again from a listing
(`TypedStore.follow` does that by itself).
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Final

from migrator.errors import StoreError
from node_agent.state.port import Change

QUEUE_LIMIT: Final = 4096
KEPT_CHANGES: Final = 2048
"""How many of the newest changes a store keeps for watchers that begin in the past."""
KEY_LENGTH_MAX: Final = 512
_KEY: Final = re.compile(r"[A-Za-z0-9._:-]+(/[A-Za-z0-9._:-]+)*")


class StoreClosed(StoreError):
    """A call on a store that isn't open. Nothing was done."""


def check_key(key: str) -> None:
    """StoreError if it isn't slash-separated parts of letters, digits, '.', '_', ':' and '-'."""
    if len(key) > KEY_LENGTH_MAX or not _KEY.fullmatch(key):
        raise StoreError(f"{key!r} is not a key of the state store; nothing was written")


def sequence_key(prefix: str, number: int) -> str:
    """The key of entry `number` below `prefix`. StoreError if the prefix doesn't end in '/'."""
    if not prefix.endswith("/"):
        raise StoreError(f"the prefix of a sequence ends in '/', unlike {prefix!r}")
    key = f"{prefix}{number:016d}"
    check_key(key)
    return key


class Watch(AsyncIterator[Change]):
    """Changes below a prefix, for one consumer. Ends when the store closes.

    Iterating raises StoreError when the watcher was too slow, or the store can't be read; the watch
    is over then. Dropping the object (leaving the loop) ends it too: nobody else keeps it alive.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._queue: deque[Change] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: StoreError | None = None
        self._ended = False

    @property
    def over(self) -> bool:
        """Nothing more can be offered."""
        return self._ended or self._error is not None

    def offer(self, changes: Iterable[Change]) -> None:
        """Queue those below the prefix, in order. Too many unread: the watch fails instead."""
        if self.over:
            return
        self._queue.extend(change for change in changes if change.key.startswith(self._prefix))
        if len(self._queue) > QUEUE_LIMIT:
            self.fail(
                StoreError(
                    f"a watcher of {self._prefix!r} fell more than {QUEUE_LIMIT} changes behind: "
                    "list again"
                )
            )
        elif self._queue:
            self._wake()

    def fail(self, error: StoreError) -> None:
        """End with an error. What is queued is dropped: a listing follows anyway."""
        if not self.over:
            self._error = error
            self._queue.clear()
            self._wake()

    def end(self) -> None:
        """End after what is queued."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __anext__(self) -> Change:
        while not self._queue:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._queue.popleft()
