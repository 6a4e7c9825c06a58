"""Running a long pass in one thread for each stream, while the main thread hears the agent."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from typing import Final

from migrator.engine.control import POLL_IN, HelperWaiter, Signal, Waiter

_LOOK_S: Final = 0.1
_JOIN_S: Final = 5.0


def run_in_threads(tasks: Sequence[Callable[[Waiter], None]], waiter: Waiter) -> None:
    """Run each task with a waiter of its own, until all are done or one has failed.

    Raises the first failure, or what `waiter` raises; the other tasks are then told to stop (they
    see it at their next wait or frame) and joined.
    """
    stop = Signal()
    ended: collections.deque[BaseException | None] = collections.deque()
    done = Signal()

    def run(task: Callable[[Waiter], None]) -> None:
        fault: BaseException | None = None
        try:
            task(HelperWaiter(stop))
        except BaseException as error:
            fault = error
        ended.append(fault)
        done.set()

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    try:
        for thread in threads:
            thread.start()
        while len(ended) < len(threads):
            waiter.wait(done, POLL_IN, _LOOK_S)
            done.clear()
            for fault in tuple(ended):
                if fault is not None:
                    raise fault
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join(_JOIN_S)
        if not any(thread.is_alive() for thread in threads):
            stop.close()
            done.close()
    for fault in ended:
        if fault is not None:
            raise fault
