"""When the sending thread goes first, and that it doesn't where it would take a core for itself."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from migrator.engine.precedence import Precedence, go_first


class _Thread:
    """What a thread asked of the kernel, which gives it what it wants, or nothing."""

    def __init__(self, *, refused: bool = False) -> None:
        self.asked: list[bool] = []
        self.now = 0.0
        self.used_s = 0.0
        self._refused = refused
        self.precedence = Precedence(self._give, lambda: self.now, lambda: self.used_s)

    def _give(self, first: bool) -> bool:
        self.asked.append(first)
        return not self._refused

    def work(self, seconds: float, share: float, *, wanted: bool = True) -> None:
        """In steps of a millisecond."""
        for _ in range(round(1000 * seconds)):
            self.precedence.keep(wanted)
            self.now += 0.001
            self.used_s += 0.001 * share


def test_who_waits_for_a_slow_link_goes_first_to_the_end() -> None:
    thread = _Thread()
    thread.work(1.0, 0.5)
    assert thread.asked == [True]
    thread.precedence.end()
    thread.precedence.end()
    assert thread.asked == [True, False]


def test_who_never_wanted_it_asks_for_nothing() -> None:
    thread = _Thread()
    thread.work(1.0, 0.5, wanted=False)
    thread.precedence.end()
    assert thread.asked == []


def test_it_ends_where_the_link_turns_out_to_be_fast() -> None:
    thread = _Thread()
    thread.work(0.02, 1.0)
    thread.work(0.5, 1.0, wanted=False)
    assert thread.asked == [True, False]


def test_a_thread_that_takes_a_core_steps_back_until_it_waits_again() -> None:
    """It looks for zero pages in gigabytes, say, and nothing has to be sent."""
    thread = _Thread()
    thread.work(0.3, 1.0)
    assert thread.asked == [True, False]
    thread.work(0.3, 0.4)
    assert thread.asked == [True, False, True]


def test_what_a_thread_did_before_a_pass_says_nothing_of_it() -> None:
    thread = _Thread()
    thread.work(0.3, 0.4)
    thread.precedence.end()
    thread.used_s += 5.0
    thread.now += 5.0
    thread.work(0.3, 0.4)
    assert thread.asked == [True, False, True]


def test_a_kernel_that_refuses_is_asked_once() -> None:
    thread = _Thread(refused=True)
    thread.work(1.0, 0.5)
    thread.precedence.end()
    assert thread.asked == [True]


def test_this_kernel_gives_it_to_one_thread_alone_or_says_that_it_does_not() -> None:
    def policy() -> int:
        return os.sched_getscheduler(0)

    def in_thread(look: Callable[[], int]) -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(look()))
        thread.start()
        thread.join(10.0)
        return found[0]

    def look() -> int:
        given = go_first(True)
        try:
            first, started = policy(), in_thread(policy)
        finally:
            assert go_first(False)
        assert (first == os.SCHED_RR | os.SCHED_RESET_ON_FORK) is given
        assert started == usual
        return policy()

    usual = policy()
    assert in_thread(look) == usual
    assert policy() == usual
