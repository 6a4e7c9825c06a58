"""Threads for calls that may hang with what they wait for: a file server, a device, a lock there.

    call ──► a thread for `where` ──► a future of the event loop's
               └ THREADS_MAX are taken: it waits for one of them

Not the event loop's own (`asyncio.to_thread`). Those are few, a handful more than the host has
cores, and all of an agent needs them: its heartbeat, its journal's neighbours, ending a hypervisor.
Were they taken by calls to a storage that hangs, or that copies for an hour, the node would seem to
be dead. Here one `where` keeps none but its own waiting. The threads are daemons: a process ends
though they hang.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from migrator.errors import NoThreadError
from migrator.shortage import OF_TASKS

THREADS_MAX: Final = 16
"""For one `where`, at once."""
STATE_DIRECTORY: Final = "the state directory"
"""As `where`: files of the node's own, on a local disk, which may hang, too."""

_T = TypeVar("_T")


class _Calls:
    """Of one `where`: what waits for a thread, and how many threads there are."""

    def __init__(self) -> None:
        self.waiting: collections.deque[Callable[[], None]] = collections.deque()
        self.threads = 0


_lock: Final = threading.Lock()
_calls: Final[dict[str, _Calls]] = {}


def in_own_thread(where: str, work: Callable[[], _T]) -> asyncio.Future[_T]:
    """Begin `work` in a thread for `where`, in its turn. NoThreadError: there is none left.

    Whoever cancels the future gives up waiting, and no more: what has begun goes on. What has not
    begun by then never does.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def tell(result: _T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None only where _T has it.

    def run() -> None:
        if future.cancelled():
            return
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # The loop has ended.
            loop.call_soon_threadsafe(tell, result, failure)

    _begin(where, run)
    return future


def _begin(where: str, run: Callable[[], None]) -> None:
    with _lock:
        calls = _calls.setdefault(where, _Calls())
        calls.waiting.append(run)
        if calls.threads >= THREADS_MAX:
            return
        calls.threads += 1
    try:
        threading.Thread(target=_serve, args=(where, calls), name=where[:15], daemon=True).start()
    except RuntimeError as error:
        with _lock:
            calls.threads -= 1
            with contextlib.suppress(ValueError):  # Another thread may have taken it.
                calls.waiting.remove(run)
        raise NoThreadError(OF_TASKS) from error  # Who asks says for what.


def _serve(where: str, calls: _Calls) -> None:
    """Until nothing waits."""
    while True:
        with _lock:
            if not calls.waiting:
                calls.threads -= 1
                if not calls.threads and _calls.get(where) is calls:
                    del _calls[where]
                return
            run = calls.waiting.popleft()
        run()
        del run  # And with it what it was given and has found.
