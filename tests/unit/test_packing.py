"""When pages are compressed, and what becomes of them: pure parts, by figures."""

from __future__ import annotations

import os
from collections.abc import Iterator

import lz4.block
import numpy as np
import pytest

from migrator import ranges
from migrator.engine.link import LinkGauge, TcpFigures
from migrator.engine.memory import MappedRegion
from migrator.engine.packing import Packed, PackingPolicy, pack
from migrator.engine_messages import RegionLayout

PAGE = 4096
PAGES = 64


@pytest.fixture
def region() -> Iterator[MappedRegion]:
    fd = os.memfd_create("region")
    os.ftruncate(fd, PAGES * PAGE)
    layout = RegionLayout(name="ram", size_bytes=PAGES * PAGE, page_size_bytes=PAGE)
    yield MappedRegion(0, fd, layout)
    os.close(fd)


def _pages(*numbers: int) -> ranges.Ranges:
    return ranges.from_page_starts(np.array(numbers, dtype=np.int64) * PAGE, PAGE)


def test_pages_are_packed_and_zero_pages_told_apart(region: MappedRegion) -> None:
    for number in (3, 4, 9, 20):
        region.view[number * PAGE : (number + 1) * PAGE] = bytes([number]) * PAGE
    region.view[10 * PAGE + PAGE - 1] = 1  # All but one byte of it is zero.
    packed = pack(region, _pages(3, 4, 5, 9, 10, 11, 20), compress=True)
    assert packed.compressed
    assert packed.content.tolist() == _pages(3, 4, 9, 10, 20).tolist()
    assert packed.zeroes.tolist() == _pages(5, 11).tolist()
    content = lz4.block.decompress(packed.payload, uncompressed_size=5 * PAGE)
    expected = b"".join(bytes(region.view[n * PAGE : (n + 1) * PAGE]) for n in (3, 4, 9, 10, 20))
    assert content == expected


def test_what_doesnt_become_smaller_is_left_as_it_is(region: MappedRegion) -> None:
    noise = os.urandom(2 * PAGE)
    region.view[: 2 * PAGE] = noise
    for compress in (True, False):
        packed = pack(region, _pages(0, 1), compress=compress)
        assert not packed.compressed
        assert bytes(packed.payload) == noise


def test_nothing_but_zeros(region: MappedRegion) -> None:
    packed = pack(region, _pages(1, 2), compress=True)
    assert not len(packed.payload)
    assert not len(packed.content)
    assert packed.zeroes.tolist() == _pages(1, 2).tolist()


def test_what_is_packed_is_a_copy(region: MappedRegion) -> None:
    region.view[:PAGE] = (noise := os.urandom(PAGE))
    packed = pack(region, _pages(0), compress=True)
    region.view[:PAGE] = bytes(PAGE)
    assert bytes(packed.payload) == noise


def _packed(size: int, seconds: float) -> Packed:
    return Packed(ranges.empty(), ranges.empty(), memoryview(bytes(size)), True, seconds)


def test_packing_pays_on_slow_links_of_idle_hosts() -> None:
    policy = PackingPolicy(lambda: 4.0)
    assert policy.pays(125e6)
    assert not policy.pays(None)
    assert not policy.pays(1.25e9)
    assert not PackingPolicy(lambda: 0.0).pays(125e6)


def test_packing_stops_paying_where_it_is_slower_than_the_link() -> None:
    policy = PackingPolicy(lambda: 4.0)
    for _ in range(50):
        policy.note(500_000, _packed(250_000, 500_000 / 0.1e9), tried=True)
    assert not policy.pays(125e6)
    assert policy.pays(12e6)
    assert policy.ratio == pytest.approx(2.0, rel=0.01)


def test_where_nothing_is_gained_only_now_and_then_one_tries() -> None:
    policy = PackingPolicy(lambda: 4.0)
    tries = 0
    for _ in range(170):
        if tried := policy.should_compress():
            tries += 1
        policy.note(500_000, _packed(500_000, 1e-3), tried=tried)
    assert tries == 10
    for _ in range(20):
        policy.note(500_000, _packed(100_000, 1e-3), tried=True)
    assert all(policy.should_compress() for _ in range(20))


def test_where_trying_is_cheap_one_always_tries() -> None:
    policy = PackingPolicy(lambda: 4.0)
    for _ in range(100):
        policy.pays(125e6)
        tried = policy.should_compress()
        assert tried
        policy.note(500_000, _packed(500_000, 1e-3), tried=tried)


class _Link:
    """A connection's figures after each 30 ms."""

    def __init__(self) -> None:
        self.gauge = LinkGauge()
        self.now = 0.0
        self._figures = TcpFigures(0, 0, 0.0, 0.0)
        self.gauge.note(self.now, self._figures)

    def window(self, rate: float, *, busy: float = 1.0, receiver: float = 0.0) -> None:
        seconds, old = 0.03, self._figures
        self.now += seconds
        self._figures = TcpFigures(
            old.acknowledged_bytes + int(rate * seconds * busy),
            1_000_000,
            old.busy_s + busy * seconds,
            old.receiver_limited_s + receiver * seconds,
        )
        self.gauge.note(self.now, self._figures)


def test_a_busy_link_gives_its_rate() -> None:
    link = _Link()
    assert not link.gauge.judged
    for _ in range(10):
        link.window(117e6, busy=0.8)
    assert link.gauge.bytes_per_s == pytest.approx(117e6, rel=0.01)
    assert link.gauge.queued_s == pytest.approx(1 / 117, rel=0.01)


def test_a_slow_destination_isnt_a_slow_link() -> None:
    link = _Link()
    link.window(117e6)
    link.window(117e6, receiver=0.5)
    assert link.gauge.bytes_per_s is None
    assert link.gauge.judged


def test_an_idle_link_is_measured_anew_in_the_end() -> None:
    link = _Link()
    link.window(117e6)
    for _ in range(5):
        link.window(117e6, busy=0.3)
    assert link.gauge.bytes_per_s is not None
    for _ in range(20):
        link.window(117e6, busy=0.3)
    assert link.gauge.bytes_per_s is None


def test_standing_idle_is_no_window() -> None:
    link = _Link()
    link.window(117e6)
    link.gauge.restart()
    link.now += 60.0
    link.window(117e6)
    assert link.gauge.bytes_per_s == pytest.approx(117e6, rel=0.01)
