"""An event loop on the simulated clock, so that the agents' asyncio code runs in the simulation.

It has no selector, no threads and no signals: timers are entries of the world's heap, and what is
ready runs first, in order. So production coroutines (locks, timeouts, tasks) replay to the letter.

An agent may be stopped (SIGSTOP): its tasks and timers stand still until it goes on. Whose they are
is told by a context variable, which they inherit from whoever makes them.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

from migrator.errors import FerryError

T = TypeVar("T")
AGENT: contextvars.ContextVar[object] = contextvars.ContextVar("agent", default=None)
"""Whose code it is that runs; None: nobody's who could be stopped."""


class AgentDead(FerryError):
    """What a dead agent's calls raise, and no other's; nobody hears it."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """Only what tasks, futures and timeouts use; the base would want a selector for the rest.

    `push(at_s, action)` puts an entry into the heap; `now()` is its clock, in seconds."""

    def __init__(
        self, now: Callable[[], float], push: Callable[[float, Callable[[], None]], None]
    ) -> None:
        # Not the base's: it would make what there is no use for here, once a seed.
        self._now = now
        self._push = push
        self.ready: deque[asyncio.Handle] = deque()
        self.failures: list[BaseException] = []
        """What callbacks raised that nobody took."""
        self._stopped: dict[object, list[asyncio.Handle]] = {}
        """Agents that stand still, and what waits for them to go on."""
        self._tasks_made = 0

    def __del__(self) -> None:
        """There is nothing to close."""

    def run_ready(self) -> None:
        """Run what is ready, and what gets ready by that."""
        ready = self.ready
        while ready:
            handle = ready.popleft()
            if not handle.cancelled() and not self._waits(handle):
                handle._run()

    def _waits(self, handle: asyncio.Handle) -> bool:
        if not self._stopped:
            return False
        waiting = self._stopped.get(handle._context.get(AGENT))  # type: ignore[attr-defined]
        if waiting is None:
            return False
        waiting.append(handle)
        return True

    def stop_agent(self, agent: object) -> None:
        """Nothing of it runs until it goes on."""
        self._stopped.setdefault(agent, [])

    def go_on(self, agent: object) -> None:
        """What was due meanwhile is ready now. Idempotent."""
        self.ready.extend(self._stopped.pop(agent, ()))

    def all_go_on(self) -> None:
        for agent in tuple(self._stopped):
            self.go_on(agent)

    def time(self) -> float:
        return self._now()

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(  # type: ignore[override]
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self.ready.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)

        def fire() -> None:
            if not handle.cancelled() and not self._waits(handle):
                handle._run()

        self._push(when, fire)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It stays in the heap, and does nothing there."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        """Its name begins with a number of this loop's own: sorted by name is in their order."""
        self._tasks_made += 1
        name = f"{self._tasks_made:08} {name or ''}"
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, AgentDead):
            return  # What a dead agent's task ended with as it cleaned up.
        self.failures.append(error or RuntimeError(context.get("message", "unknown")))
