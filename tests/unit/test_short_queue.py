"""How much of post-copy's bulk may be under way, on links of all kinds."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from migrator.engine.link import TcpFigures, tcp_figures
from migrator.engine.short_queue import BYTES_MAX, BYTES_MIN, ShortQueue
from migrator.engine.transport import limit_send_buffer

STEP_S = 0.001


@dataclass
class Link:
    """A bottleneck: what is under way beyond its round trip stands in its queue."""

    bytes_per_s: float
    round_trip_s: float
    delay_s: float = 0.0
    """What the two sides take before they go on sending."""
    busy_share: float = 1.0
    now: float = 0.0
    acknowledged: float = 0.0
    busy_s: float = 0.0

    def rate(self, under_way: int) -> float:
        return min(self.bytes_per_s, under_way / (self.round_trip_s + self.delay_s))

    def queue_s(self, under_way: int) -> float:
        return max(0.0, under_way / self.bytes_per_s - self.round_trip_s - self.delay_s)

    def run(self, queue: ShortQueue, seconds: float) -> float:
        """The bytes a second that went through meanwhile."""
        began, before = self.now, self.acknowledged
        while self.now - began < seconds:
            self.now += STEP_S
            self.acknowledged += self.rate(queue.bytes) * STEP_S * self.busy_share
            self.busy_s += STEP_S * self.busy_share
            figures = TcpFigures(
                int(self.acknowledged), 0, self.busy_s, 0.0, round_trip_s=self.round_trip_s
            )
            queue.note(self.now, figures)
        return (self.acknowledged - before) / seconds


MBIT = 1_000_000 / 8
LINKS = {
    "200 Mbit/s": Link(200 * MBIT, 0.00002),
    "1 Gbit/s": Link(1_000 * MBIT, 0.0001),
    "10 Gbit/s": Link(10_000 * MBIT, 0.0001),
    "10 Gbit/s, far": Link(10_000 * MBIT, 0.0003),
    "busy hosts": Link(1_000 * MBIT, 0.0001, delay_s=0.001),
    "another town": Link(1_000 * MBIT, 0.02),
}


@pytest.mark.parametrize("name", LINKS)
def test_the_link_is_filled_and_its_queue_stays_short(name: str) -> None:
    model = LINKS[name]
    link = Link(model.bytes_per_s, model.round_trip_s, model.delay_s)
    queue = ShortQueue()
    link.run(queue, 2.0)
    assert link.run(queue, 5.0) > 0.9 * link.bytes_per_s
    assert link.queue_s(queue.bytes) < 0.001 + 0.5 * (link.round_trip_s + link.delay_s)


@pytest.mark.parametrize(("before", "after"), [(1_000, 100), (100, 1_000), (200, 10_000)])
def test_a_link_that_changes_is_followed_within_seconds(before: int, after: int) -> None:
    link, queue = Link(before * MBIT, 0.0001), ShortQueue()
    link.run(queue, 3.0)
    link.bytes_per_s = after * MBIT
    link.run(queue, 3.0)
    assert link.run(queue, 2.0) > 0.9 * link.bytes_per_s
    assert link.queue_s(queue.bytes) < 0.002


def test_a_stream_that_mostly_stands_idle_tells_nothing() -> None:
    link, queue = Link(1_000 * MBIT, 0.0001, busy_share=0.3), ShortQueue()
    before = queue.bytes
    link.run(queue, 3.0)
    assert queue.bytes == before


@pytest.mark.parametrize(
    ("rate", "holds"),
    [(1 * MBIT, lambda size: size == BYTES_MIN), (1e12, lambda size: size <= BYTES_MAX)],
)
def test_the_bounds_have_bounds(rate: float, holds: Callable[[int], bool]) -> None:
    link, queue = Link(rate, 0.0001), ShortQueue()
    link.run(queue, 10.0)
    assert holds(queue.bytes)


def test_without_figures_it_stays_as_it_is() -> None:
    queue = ShortQueue()
    before = queue.bytes
    assert not any(queue.note(at * 0.1, None) for at in range(100))
    assert queue.bytes == before


def test_what_the_faults_take_of_the_link_counts() -> None:
    """Half of the link is theirs from the second second on: bulk's buffer isn't what is small."""
    link, queue = Link(200 * MBIT, 0.0001), ShortQueue()
    link.run(queue, 2.0)
    held, beside = queue.bytes, 0.0
    for step in range(2_000):
        link.now += STEP_S
        link.acknowledged += 0.5 * link.bytes_per_s * STEP_S
        beside += 0.5 * link.bytes_per_s * STEP_S
        link.busy_s += STEP_S
        figures = TcpFigures(int(link.acknowledged), 0, link.busy_s, 0.0, link.round_trip_s)
        queue.note(link.now, figures, int(beside))
        assert queue.bytes <= 2 * held + BYTES_MIN, step


@pytest.mark.parametrize(("limit", "fits"), [(8192, True), (0, False)])
def test_a_limited_buffer_takes_no_more_than_a_packet_beyond(limit: int, fits: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        figures = tcp_figures(near)
        assert figures is not None
        assert 0.0 < figures.round_trip_s < 1.0
        if limit:
            limit_send_buffer(near, limit)
        near.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                near.send(bytes(4096))
        unacknowledged = bytearray(4)
        fcntl.ioctl(near, termios.TIOCOUTQ, unacknowledged)
        assert (int.from_bytes(unacknowledged, sys.byteorder) <= limit + 65_536) == fits


def test_what_was_sent_while_bulk_held_back_is_not_the_links_rate() -> None:
    link = Link(200 * MBIT, 0.00002)
    queue = ShortQueue()
    link.run(queue, 2.0)
    for _ in range(20):
        link.busy_share = 0.7
        for _ in range(1_000):
            link.now += STEP_S
            link.acknowledged += link.rate(queue.bytes) * STEP_S * link.busy_share
            link.busy_s += STEP_S * link.busy_share
            queue.restart()
        link.busy_share = 1.0
        link.run(queue, 0.15)
    assert queue.bytes_per_s == pytest.approx(200 * MBIT, rel=0.03)


@pytest.mark.parametrize("busy_share", [0.55, 0.8])
def test_bulk_that_waits_for_a_core_doesnt_make_its_link_slow(busy_share: float) -> None:
    """The pages of faults come beside it, all the time."""
    link, queue = Link(1_000 * MBIT, 0.0001, busy_share=busy_share), ShortQueue()
    beside = 0.0
    for _ in range(3_000):
        link.now += STEP_S
        link.busy_s += STEP_S * busy_share
        link.acknowledged += 0.9 * link.bytes_per_s * STEP_S * busy_share
        beside += 0.1 * link.bytes_per_s * STEP_S
        figures = TcpFigures(int(link.acknowledged), 0, link.busy_s, 0.0, link.round_trip_s)
        queue.note(link.now, figures, int(beside))
    assert queue.bytes_per_s == pytest.approx(1_000 * MBIT, rel=0.03)
