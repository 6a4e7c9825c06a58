"""Post-copy's bulk takes turns with faults: on links of all kinds, with vCPUs of all kinds."""

from __future__ import annotations

import statistics
import threading
from dataclasses import dataclass, field

import pytest

from migrator.engine.fault_turns import FREE, OPEN_EVERY_S, OPEN_S, QUIET_S, FaultClock, FaultTurns
from migrator.model import PAGE_SIZE_BYTES

MBIT = 1_000_000 / 8


@dataclass
class Link:
    """One link, a vCPU that runs into missing pages, and bulk that always has something to send."""

    bytes_per_s: float
    latency_s: float
    """From the last byte of an answer until its vCPU's next request is here, its work left out."""
    work_s: float
    """Of the vCPU, between two missing pages."""
    queue_bytes: int
    """What bulk has under way where it is free to send."""
    clock: FaultClock | None
    now: float = 0.0
    free_at: float = 0.0
    """The link has sent all that it was given."""
    asks_at: float = 0.0
    bulk_at: float = 0.0
    bulk_bytes: int = 0
    waits_s: list[float] = field(default_factory=list)

    def send(self, size: int) -> float:
        self.free_at = max(self.free_at, self.now) + size / self.bytes_per_s
        return self.free_at

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = max(self.now, min(self.asks_at, self.bulk_at))
            if self.asks_at <= self.now:
                self.answer()
            else:
                self.give()

    def answer(self) -> None:
        if self.clock is not None:
            self.clock.asked(self.now)
        there_at = self.send(PAGE_SIZE_BYTES)
        if self.clock is not None:
            self.clock.answered(self.now, PAGE_SIZE_BYTES, self.bytes_per_s)
            self.bulk_at = self.now
        self.waits_s.append(there_at - self.now + self.latency_s)
        self.asks_at = there_at + self.latency_s + self.work_s

    def give(self) -> None:
        turn = FREE if self.clock is None else self.clock.turn(self.now, self.bytes_per_s)
        if turn.size_bytes == 0:
            assert 0 < turn.wait_s <= 0.1
            self.bulk_at = self.now + max(turn.wait_s, 1e-7)
            return
        size = turn.size_bytes
        if size is None:
            size = PAGE_SIZE_BYTES
            self.bulk_at = self.free_at - (self.queue_bytes - size) / self.bytes_per_s
            if self.bulk_at > self.now:
                return
        self.send(size)
        self.bulk_bytes += size

    @property
    def share(self) -> float:
        """Of the link, that was used."""
        sent = self.bulk_bytes + len(self.waits_s) * PAGE_SIZE_BYTES
        return sent / (self.now * self.bytes_per_s)


LINKS = {
    "20 Mbit/s": (20 * MBIT, 0.000_2, 8_192),
    "200 Mbit/s": (200 * MBIT, 0.000_2, 16_384),
    "1 Gbit/s": (1_000 * MBIT, 0.000_06, 65_536),
}


@pytest.mark.parametrize("work_s", [0.0, 0.000_02, 0.000_06])
@pytest.mark.parametrize("name", LINKS)
def test_a_fault_waits_for_nothing_and_the_link_stays_full(name: str, work_s: float) -> None:
    rate, latency_s, queue_bytes = LINKS[name]
    link = Link(rate, latency_s, work_s, queue_bytes, FaultClock())
    link.run(6.0)
    page_s = PAGE_SIZE_BYTES / rate
    assert statistics.median(link.waits_s) < 1.1 * (page_s + latency_s) + max(page_s, 0.0002)
    assert link.share > 0.85


def test_it_halves_what_a_fault_costs() -> None:
    rate, latency_s, queue_bytes = LINKS["200 Mbit/s"]
    before = Link(rate, latency_s, 0.000_02, queue_bytes, None)
    since = Link(rate, latency_s, 0.000_02, queue_bytes, FaultClock())
    before.run(3.0)
    since.run(3.0)
    assert statistics.median(since.waits_s) < 0.5 * statistics.median(before.waits_s)
    assert since.share > 0.95 * before.share


def test_where_the_hosts_are_what_takes_long_the_link_stays_full() -> None:
    link = Link(1_000 * MBIT, 0.000_6, 0.0, 65_536, FaultClock())
    link.run(6.0)
    assert link.share > 0.97


def test_bulk_is_free_where_nobody_asks_and_where_the_rate_isnt_known() -> None:
    clock = FaultClock()
    assert clock.turn(1.0, 125e6) == FREE
    clock.asked(1.0)
    clock.answered(1.00001, PAGE_SIZE_BYTES, 125e6)
    assert clock.turn(1.0001, None) == FREE
    assert clock.turn(1.0 + 2 * QUIET_S, 125e6) == FREE


def clock_that_holds_back(now: float, rate: float) -> FaultClock:
    """Its open time is over."""
    clock = FaultClock()
    clock.asked(now - 2 * OPEN_S)
    assert not clock.holds_back(now - 2 * OPEN_S, rate)
    clock.asked(now)
    assert clock.holds_back(now, rate)
    return clock


def test_its_queue_alone_bounds_it_for_a_tenth_of_the_time() -> None:
    clock, rate = clock_that_holds_back(10.0, 125e6), 125e6
    free = 0
    for at in range(1_000):
        clock.asked(10.0 + at * 0.01)
        free += not clock.holds_back(10.0 + at * 0.01, rate)
    assert free / 1_000 == pytest.approx(OPEN_S / OPEN_EVERY_S, rel=0.2)


def test_vcpus_that_ask_without_a_break_dont_starve_bulk() -> None:
    rate, given = 125e6, 0
    clock = clock_that_holds_back(10.0, rate)
    for at in range(1_000):
        now = 10.0 + at * 0.0001
        clock.answered(now, PAGE_SIZE_BYTES, rate)
        clock.asked(now)
        turn = clock.turn(now, rate)
        if clock.holds_back(now, rate):
            assert turn.size_bytes is not None
            given += turn.size_bytes
    assert given >= 50 * PAGE_SIZE_BYTES


def test_whoever_waits_for_its_turn_gets_it_when_a_fault_is_answered() -> None:
    turns, got = FaultTurns(), threading.Event()
    turns.asked()
    turns.holds_back(125e6)
    threading.Event().wait(OPEN_S)  # The time in which its queue alone bounds it.
    turns.asked()

    def bulk() -> None:
        for _ in range(3):
            assert turns.wait(125e6) != 0
        got.set()

    thread = threading.Thread(target=bulk, daemon=True)
    thread.start()
    turns.answered(PAGE_SIZE_BYTES, 125e6)
    assert got.wait(5.0)
    thread.join(5.0)
