"""A watch that can't go on says so, whatever the reason: its reader would hear nothing for good."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from migrator.errors import StoreError
from node_agent.state.etcd.watch import WatchStream
from node_agent.state.port import Change
from node_agent.state.watches import Watch


class Call:
    """A member's stream that begins, and has one event."""

    def __init__(self) -> None:
        header = SimpleNamespace(revision=1)
        self._left = [
            SimpleNamespace(header=header, compact_revision=0, canceled=False, events=events)
            for events in ((), ("event",))
        ]

    async def write(self, request: Any) -> None: ...

    async def read(self) -> Any:
        return self._left.pop(0)

    def cancel(self) -> None: ...


class Client:
    def in_order(self) -> list[Any]:
        return [SimpleNamespace(watch=lambda metadata: Call())]


async def test_an_error_that_nobody_thought_of_ends_the_watch_and_is_told() -> None:
    def decode(events: Iterable[Any]) -> Iterable[Change]:
        if events:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a stranger's key")
        return ()

    watch = Watch("nodes/")
    client: Any = Client()
    stream = WatchStream(client, watch, b"k", b"l", None, decode)
    async with asyncio.timeout(10):
        with pytest.raises(StoreError, match="a stranger's key"):
            await anext(watch)
        await stream.task
    assert stream.began.done()
