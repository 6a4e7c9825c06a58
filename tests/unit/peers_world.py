"""Two hubs on loopback, and handlers to call: what the tests of the agents' protocol share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec

from migrator.errors import (
    FenceError,
    InvalidRequest,
    NotFoundError,
    RefusedError,
)
from migrator.model import NodeName
from node_agent.peers import PeerHub
from node_agent.peers.connection import Timing

N1, N2, N3 = NodeName("n1"), NodeName("n2"), NodeName("n3")
LOOPBACK = ("127.0.0.1", 0)
FAST = Timing(
    hello_s=1.0, ping_every_s=0.1, silence_s=1.5, linger_s=0.2, dial_s=3.0, backoff_longest_s=0.1
)
"""Quick, and yet so slow that a busy machine, which keeps both from their work for a while, makes
nobody lost."""


class Text(msgspec.Struct, frozen=True):
    text: str


class World:
    """Two hubs that know each other, and what the second one's handlers saw."""

    def __init__(self, one: PeerHub, two: PeerHub) -> None:
        self.one, self.two = one, two
        self.running = 0
        self.running_most = 0
        self.cancelled = 0
        self.noticed: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.release = asyncio.Event()
        two.handle("echo", Text, self.echo)
        two.handle("fail", Text, self.fail)
        two.handle("hang", Text, self.hang)
        two.handle("large", int, self.large)

    async def echo(self, caller: NodeName, params: Text) -> Text:
        self.noticed.put_nowait((caller, params.text))
        return Text(f"{caller} said {params.text}")

    async def fail(self, caller: NodeName, params: Text) -> None:
        errors: dict[str, Exception] = {
            "refused": RefusedError("refused", ["memory", "cpu"]),
            "invalid": InvalidRequest("invalid", {"a.b": "a number"}),
            "not-found": NotFoundError("no such domain"),
            "fence": FenceError("no fence"),
            "bug": ZeroDivisionError("oops"),
        }
        raise errors[params.text]

    async def hang(self, caller: NodeName, params: Text) -> Text:
        self.running += 1
        self.running_most = max(self.running, self.running_most)
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return params

    async def large(self, caller: NodeName, size_bytes: int) -> bytes:
        return bytes(size_bytes)


@asynccontextmanager
async def world(timing: Timing = FAST) -> AsyncIterator[World]:
    before = asyncio.all_tasks()
    one = PeerHub(N1, LOOPBACK, {}, "1.0", timing=timing)
    two = PeerHub(N2, LOOPBACK, {}, "1.0", timing=timing)
    await one.start()
    await two.start()
    peers = {N1: one.address, N2: two.address}
    one.set_peers(peers)
    two.set_peers(peers)
    try:
        yield World(one, two)
    finally:
        await one.close()
        await two.close()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before, "a task was left behind"
        assert not one._inbound and not two._inbound


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is awaited has no event of its own
            await asyncio.sleep(0.005)
