"""What an agent needs threads for at any time it has from its start, or does without.

A host, or whoever limits the agent's control group (`TasksMax=`), may have no thread left when one
is asked for. What asyncio does then leaves something behind:

- A call to its executor is queued before a thread for it is begun. If none can be, the call fails,
  and is done all the same when another thread is free: a tap, say, that nobody knows of.
- Python 3.11 begins a thread for each program that is started, to wait for its end, when the
  program runs already. It runs on then, and nobody waits for it. From 3.12 on the kernel tells its
  end (pidfd_open(2)); here as well.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from migrator.errors import NoThreadError
from migrator.shortage import OF_TASKS

EXECUTOR_THREADS: Final = min(32, (os.cpu_count() or 1) + 4)
"""As many as asyncio's own has at most."""


def begin_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Give `loop` an executor all of whose threads run. NoThreadError: there aren't so many."""
    executor = ThreadPoolExecutor(EXECUTOR_THREADS, thread_name_prefix="asyncio")
    all_begun = threading.Event()
    try:
        for _ in range(EXECUTOR_THREADS):
            executor.submit(all_begun.wait)  # None of them is free for the next one.
    except RuntimeError as error:
        raise NoThreadError(
            f"the agent can't have its {EXECUTOR_THREADS} threads: {OF_TASKS}"
        ) from error
    finally:
        all_begun.set()
    loop.set_default_executor(executor)


def watch_programs(loop: asyncio.AbstractEventLoop) -> None:
    """Have the end of every program that `loop` starts told without a thread."""
    if sys.version_info < (3, 12):
        watcher = asyncio.PidfdChildWatcher()
        watcher.attach_loop(loop)
        asyncio.set_child_watcher(watcher)
