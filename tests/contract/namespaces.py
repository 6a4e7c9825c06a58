"""A network namespace for one test: made in a thread, gone with it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, TypeVar

from pyroute2 import IPRoute

_CLONE_NEWNET: Final = 0x40000000
_TEST_TIMEOUT_S: Final = 60.0
_World = TypeVar("_World")


def unshare_network() -> None:
    """Give the calling thread a network namespace of its own, new and empty. OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def run_in_new_namespace(body: Callable[[], Awaitable[None]]) -> None:
    """Run `body` on an event loop of its own, in a thread whose network is new and empty.

    Threads that the loop starts inherit the namespace. The kernel removes it, with all that is
    in it, when the last of them ends.
    """
    failures: list[BaseException] = []

    async def bounded() -> None:
        async with asyncio.timeout(_TEST_TIMEOUT_S):
            await body()

    def run() -> None:
        try:
            unshare_network()
            asyncio.run(bounded())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="network namespace")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def run_in_world(
    make: Callable[[], AbstractAsyncContextManager[_World]],
    body: Callable[[_World], Awaitable[None]],
    *,
    loopback: bool = False,
) -> None:
    """Run `body` in the world that `make` opens in a new namespace; `loopback`: its own is up."""

    async def inside() -> None:
        if loopback:
            await asyncio.to_thread(_raise_loopback)
        async with make() as world:
            await body(world)

    run_in_new_namespace(inside)


def _raise_loopback() -> None:
    with IPRoute() as route:
        route.link("set", index=1, state="up")
