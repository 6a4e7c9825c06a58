"""Calls to the network that nobody waits for any more."""

from __future__ import annotations

import asyncio
import threading

import pytest

from netfabric.threads import in_thread


async def test_what_nobody_waits_for_any_more_is_undone_as_it_was_done() -> None:
    """In a thread: the kernel is talked to by an event loop of its own."""
    begun, go, undone = threading.Event(), threading.Event(), threading.Event()

    def make() -> str:
        begun.set()
        assert go.wait(10)
        return "tunnel"

    def remove(made: str) -> None:
        asyncio.run(asyncio.sleep(0))
        assert made == "tunnel"
        undone.set()

    making = asyncio.create_task(in_thread(make, remove))
    assert await asyncio.to_thread(begun.wait, 10)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert not undone.is_set()
    go.set()
    assert await asyncio.to_thread(undone.wait, 10)
