"""A host without a thread left: what is asked for then is done, or fails, and not both."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from migrator import programs
from migrator.errors import NoThreadError
from node_agent import threads_ahead
from node_agent.threads_ahead import EXECUTOR_THREADS, begin_threads, watch_programs


@pytest.fixture
def in_loop() -> Iterator[asyncio.Runner]:
    """A loop that was made ready as an agent's is."""
    with asyncio.Runner() as runner:
        begin_threads(runner.get_loop())
        watch_programs(runner.get_loop())
        yield runner
    if sys.version_info < (3, 12):
        asyncio.set_child_watcher(None)  # type: ignore[arg-type]  # The default again.


@pytest.fixture
def none_left(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    return lambda: monkeypatch.setattr(threading.Thread, "start", refuse)


def test_a_program_is_begun_and_waited_for(
    in_loop: asyncio.Runner, none_left: Callable[[], None]
) -> None:
    none_left()
    ended = in_loop.run(programs.run(["sh", "-c", "echo it ran; exit 3"], timeout_s=30))
    assert (ended.status, ended.out) == (3, b"it ran\n")


def test_calls_have_the_threads_that_there_are(
    in_loop: asyncio.Runner, none_left: Callable[[], None]
) -> None:
    """More of them at once than threads: asyncio's own would fail some, and do them later."""
    done: list[int] = []

    async def all_at_once() -> None:
        calls = range(3 * EXECUTOR_THREADS)
        await asyncio.gather(*(asyncio.to_thread(done.append, each) for each in calls))

    none_left()
    in_loop.run(all_at_once())
    assert sorted(done) == list(range(3 * EXECUTOR_THREADS))


def test_an_agent_that_has_not_enough_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin, begun = threading.Thread.start, 0

    def refuse_the_third(thread: threading.Thread) -> None:
        nonlocal begun
        begun += 1
        if begun == 3:
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threads_ahead, "EXECUTOR_THREADS", 4)
    monkeypatch.setattr(threading.Thread, "start", refuse_the_third)
    with (
        asyncio.Runner() as runner,
        pytest.raises(NoThreadError, match="its 4 threads: no process or thread is left"),
    ):
        begin_threads(runner.get_loop())
