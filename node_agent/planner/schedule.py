"""Plays a set of placed moves: when each begins, at which rate it sends, when it ends.

    setup ──► transfer (shares the links with the others, `shares.fair_rates`) ──► finish

A source has so many moves under way at once, and a destination so many arrivals; when one ends, the
next begins. Which: the one with the highest priority whose destination can take it now, and of
those the first whose destination has the fewest arrivals. The
coordinator does the same with real moves, so that plan and outcome differ by figures alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from node_agent.planner.model import PlanOptions, Rate
from node_agent.planner.shares import Floats, fair_rates

_LOOKAHEAD: Final = 64
"""How far down its queue a source looks for an idle destination."""
_RATE_CHANGE: Final = 0.01
"""A smaller change of a rate isn't worth a line in the plan."""


class Job:
    """One live move to be scheduled. Mutable: the schedule fills in the times."""

    __slots__ = (
        *("destination", "end_s", "key", "priority", "rates", "sent_s", "source", "start_s"),
        "wire",
    )

    def __init__(self, key: str, source: int, destination: int, wire: int, priority: int) -> None:
        self.key = key
        self.source = source
        self.destination = destination
        self.wire = wire
        self.priority = priority
        self.start_s = 0.0
        self.sent_s = 0.0
        self.end_s = 0.0
        self.rates: list[Rate] = []


def pick_next(
    queue: Sequence[tuple[int, int]],
    arrivals: Callable[[int], int],
    most: Callable[[int], int],
) -> int | None:
    """The index in `queue`, (priority, destination) in order, of the move that begins next.

    `arrivals`: how many are on their way to a destination now; `most`: how many may be. None: none
    may begin now.
    """
    best: int | None = None
    fewest, highest = -1, None
    for index, (priority, destination) in enumerate(queue[:_LOOKAHEAD]):
        if highest is not None and priority < highest:
            break
        count = arrivals(destination)
        if count >= most(destination):
            continue
        highest = priority
        if fewest < 0 or count < fewest:
            best, fewest = index, count
        if count == 0:
            break
    return best


class Limits(NamedTuple):
    """Of each node: what its link carries each way, and how many moves it takes part in."""

    egress: Floats
    ingress: Floats
    leaving: Sequence[int]
    arriving: Sequence[int]


def run(jobs: Sequence[Job], limits: Limits, options: PlanOptions) -> float:
    """Fill in the jobs' times; returns when the last ends. `jobs` in each source's order."""
    return _Play(jobs, limits, options).run()


class _Play:
    def __init__(self, jobs: Sequence[Job], limits: Limits, options: PlanOptions) -> None:
        self._limits = limits
        self._options = options
        self._queues: list[list[Job]] = [[] for _ in limits.egress]
        for job in jobs:
            self._queues[job.source].append(job)
        for queue in self._queues:
            queue.sort(key=lambda job: -job.priority)
        self._sources = [at for at, queue in enumerate(self._queues) if queue]
        self._held: set[int] = set()
        """Sources that wait for a destination to have a lane free."""
        self._active = [0] * len(limits.egress)
        self._arriving = [0] * len(limits.ingress)
        self._sending: list[Job] = []
        self._left = np.zeros(0)
        self._rates = np.zeros(0)
        self._now = 0.0
        self._timed: list[tuple[float, int, str, Job]] = []
        self._number = 0

    def run(self) -> float:
        for source in self._sources:
            self._fill(source)
        last = 0.0
        while self._timed or self._sending:
            timed_s = self._timed[0][0] if self._timed else np.inf
            done_s = np.inf
            if self._sending:
                with np.errstate(divide="ignore"):
                    done_s = self._now + float((self._left / self._rates).min())
            if not np.isfinite(min(timed_s, done_s)):
                raise AssertionError("a move that gets no share of its links")
            self._advance(min(timed_s, done_s))
            changed = self._finish_transfers()
            while self._timed and self._timed[0][0] <= self._now + 1e-9:
                _, _, what, job = heapq.heappop(self._timed)
                if what == "send":
                    self._sending.append(job)
                    self._left = np.append(self._left, float(job.wire))
                    changed = True
                else:
                    job.end_s = self._now
                    last = max(last, self._now)
                    self._active[job.source] -= 1
                    self._arriving[job.destination] -= 1
                    for source in sorted({job.source, *self._held}):
                        self._fill(source)
            if changed:
                self._share()
        return last

    def _fill(self, source: int) -> None:
        queue = self._queues[source]
        self._held.discard(source)
        while queue and self._active[source] < self._limits.leaving[source]:
            ahead = [(job.priority, job.destination) for job in queue[:_LOOKAHEAD]]
            at = pick_next(ahead, self._arriving.__getitem__, self._limits.arriving.__getitem__)
            if at is None:
                self._held.add(source)
                return
            job = queue.pop(at)
            job.start_s = self._now
            self._active[source] += 1
            self._arriving[job.destination] += 1
            self._at(self._now + self._options.setup_s, "send", job)

    def _at(self, when_s: float, what: str, job: Job) -> None:
        self._number += 1
        heapq.heappush(self._timed, (when_s, self._number, what, job))

    def _advance(self, to_s: float) -> None:
        if self._sending:
            self._left = self._left - self._rates * (to_s - self._now)
        self._now = to_s

    def _finish_transfers(self) -> bool:
        if not self._sending:
            return False
        done = self._left <= 1e-3
        if not done.any():
            return False
        for job, over in zip(self._sending, done, strict=True):
            if over:
                job.sent_s = self._now
                self._at(self._now + self._options.finish_s, "end", job)
        self._sending = [job for job, over in zip(self._sending, done, strict=True) if not over]
        self._left = self._left[~done]
        return True

    def _share(self) -> None:
        self._rates = fair_rates(
            np.array([job.source for job in self._sending], dtype=np.int64),
            np.array([job.destination for job in self._sending], dtype=np.int64),
            self._limits.egress,
            self._limits.ingress,
            self._options.move_bytes_per_s,
        )
        for job, rate in zip(self._sending, self._rates, strict=True):
            rates = job.rates
            if not rates or abs(rates[-1].bytes_per_s - rate) > _RATE_CHANGE * rate:
                rates.append(Rate(at_s=self._now, bytes_per_s=float(rate)))
