"""Threads that run one at a time, in an order that a seed chooses, by a clock of their own.

    a thread ── pause, wait ──► chance: which of those that can goes on?
                                nobody can: the clock goes on to the first that has waited enough
                                nobody ever will: the test is told

Code under test runs in real threads; what it waits for is replaced by what is here. Between two
pauses nothing else runs. A thread whose owner is dead ends at its next pause, as by SIGKILL:
nothing of what it does on its way out has any effect, if all that has effects pauses first.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Final

_NEVER: Final = float("inf")
_SWITCH: Final = 0.4
"""How likely a pause is to be one."""
_STEP_S: Final = 0.0005
"""The most that the clock goes on at a pause."""


class KilledError(BaseException):
    """The thread's owner is dead."""


class Owner:
    """A process."""

    def __init__(self) -> None:
        self.dead = False


class Lockstep:
    """See the module. `run` from the test's thread; all others are made by `spawn`."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.now_s = 1.0
        self.steps = 0
        self.failure: BaseException | None = None
        self._threads: list[LockstepThread] = []
        self._alarms_s: set[float] = set()
        self._current: LockstepThread | None = None
        self._until: Callable[[], bool] = lambda: False
        self._test = _taken()

    @property
    def owner(self) -> Owner | None:
        """Of the thread that runs."""
        return None if self._current is None else self._current.owner

    def spawn(self, work: Callable[[], None], owner: Owner | None = None) -> LockstepThread:
        made = LockstepThread(self, work, owner or self.owner)
        made.start()
        return made

    def alarm(self, at_s: float) -> None:
        """What somebody waits for may be so then."""
        self._alarms_s.add(at_s)

    def run(self, until: Callable[[], bool], seconds: float) -> None:
        """AssertionError: it didn't come about in so long, or a thread has failed."""
        end_s = self.now_s + seconds
        self._until = lambda: until() or self.failure is not None or self.now_s > end_s
        chosen = self._choose()
        if chosen is not None:
            self._current = chosen
            chosen.turn.release()
            self._test.acquire()
        self._current = None
        if self.failure is not None:
            raise self.failure
        assert self.now_s <= end_s, f"not within {seconds} s: {self._waiting()}"
        assert until(), f"nobody goes on any more: {self._waiting()}"

    def pause(self) -> None:
        """Others may run here."""
        me = self._current
        if me is None:
            return
        self.steps += 1
        if self.chance.random() < _SWITCH:
            self.now_s += self.chance.random() * _STEP_S
            self._give_up_turn(me)
        me.end_if_dead()

    def wait(self, ready: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Until it is; whether it is."""
        me = self._current
        if me is None:
            return ready()
        self.steps += 1
        me.end_if_dead()
        me.ready = ready
        me.until_s = _NEVER if timeout_s is None else self.now_s + timeout_s
        self._give_up_turn(me)
        me.ready = None
        me.end_if_dead()
        return ready()

    def check(self, holds: bool, what: str) -> None:
        """However the code under test handles exceptions: the test fails."""
        if not holds:
            self.fail(AssertionError(what))

    def fail(self, error: BaseException) -> None:
        self.failure = self.failure or error
        raise error

    def end(self, owners: list[Owner]) -> None:
        """Every thread ends."""
        self.failure = None
        for owner in [*owners, *(thread.owner for thread in self._threads)]:
            owner.dead = True
        self.run(lambda: not any(thread.is_alive() for thread in self._threads), _NEVER)

    def _give_up_turn(self, me: LockstepThread) -> None:
        chosen = None if self._until() else self._choose()
        if chosen is me:
            return
        self._hand_over(chosen)
        me.turn.acquire()

    def ended(self, thread: LockstepThread) -> None:
        self._threads.remove(thread)
        self._hand_over(None if self._until() else self._choose())

    def began(self, thread: LockstepThread) -> None:
        self._threads.append(thread)

    def _hand_over(self, chosen: LockstepThread | None) -> None:
        self._current = chosen
        (self._test if chosen is None else chosen.turn).release()

    def _choose(self) -> LockstepThread | None:
        """None: nobody will ever go on."""
        while True:
            able = [thread for thread in self._threads if thread.is_able(self.now_s)]
            if able:
                return self.chance.choice(able)
            self._alarms_s = {at_s for at_s in self._alarms_s if at_s > self.now_s}
            next_s = min(*self._alarms_s, *(each.until_s for each in self._threads), _NEVER, _NEVER)
            if next_s == _NEVER:
                return None
            self.now_s = next_s

    def _waiting(self) -> list[str]:
        return [f"{thread.work}" for thread in self._threads]


def _taken() -> threading.Lock:
    """Whoever releases it lets one other thread go on. A semaphore takes several times as long."""
    made = threading.Lock()
    made.acquire()
    return made


class LockstepThread:
    """In the place of `threading.Thread`."""

    def __init__(self, lockstep: Lockstep, work: Callable[[], None], owner: Owner | None) -> None:
        self.owner = owner or Owner()
        self.work = work
        self.turn = _taken()
        self.ready: Callable[[], bool] | None = None
        self.until_s = _NEVER
        self._lockstep = lockstep
        self._alive = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._alive = True
        self._lockstep.began(self)
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> None:
        self._lockstep.wait(lambda: not self._alive, timeout_s)

    def is_alive(self) -> bool:
        return self._alive

    def is_able(self, now_s: float) -> bool:
        return self.owner.dead or self.ready is None or now_s >= self.until_s or self.ready()

    def end_if_dead(self) -> None:
        if self.owner.dead:
            raise KilledError

    def _run(self) -> None:
        self.turn.acquire()
        try:
            self.end_if_dead()
            self.work()
        except KilledError:
            pass
        except BaseException as error:
            self._lockstep.failure = self._lockstep.failure or error
        finally:
            self._alive = False
            self._lockstep.ended(self)


class LockstepSignal:
    """In the place of `control.Signal`."""

    def __init__(self, lockstep: Lockstep, fileno: int) -> None:
        self._lockstep = lockstep
        self._fileno = fileno
        self.is_set = False

    def fileno(self) -> int:
        return self._fileno

    def set(self) -> None:
        self._lockstep.pause()
        self.is_set = True

    def clear(self) -> None:
        self._lockstep.pause()
        self.is_set = False

    def close(self) -> None:
        return


class LockstepEvent:
    """In the place of `threading.Event`."""

    def __init__(self, lockstep: Lockstep) -> None:
        self._lockstep = lockstep
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._lockstep.wait(self.is_set, timeout_s)
