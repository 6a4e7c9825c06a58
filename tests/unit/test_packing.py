"""What becomes of pages that are packed, and what a stream learns about its link."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest

from migrator import ranges
from migrator.engine import codecs, packing
from migrator.engine.codecs import LADDER, Codec
from migrator.engine.frames import FrameKind
from migrator.engine.idle_cores import IdleCores
from migrator.engine.link import LinkGauge, TcpFigures
from migrator.engine.memory import MappedRegion
from migrator.engine.packing import pack
from migrator.engine.packing_policy import Order
from migrator.engine_messages import RegionLayout
from migrator.errors import RemoteProtocolError

PAGE = 4096
PAGES = 64
PLAIN = Order(None)
SMALL = Order(LADDER[-1], compared=LADDER)
EACH_CODEC = pytest.mark.parametrize("codec", LADDER, ids=[codec.name for codec in LADDER])


@pytest.fixture
def region() -> Iterator[MappedRegion]:
    fd = os.memfd_create("region")
    os.ftruncate(fd, PAGES * PAGE)
    layout = RegionLayout(name="ram", size_bytes=PAGES * PAGE, page_size_bytes=PAGE)
    yield MappedRegion(0, fd, layout)
    os.close(fd)


def _pages(*numbers: int) -> ranges.Ranges:
    return ranges.from_page_starts(np.array(numbers, dtype=np.int64) * PAGE, PAGE)


@EACH_CODEC
def test_pages_are_packed_and_zero_pages_told_apart(region: MappedRegion, codec: Codec) -> None:
    for number in (3, 4, 9, 20):
        region.view[number * PAGE : (number + 1) * PAGE] = bytes([number]) * PAGE
    region.view[10 * PAGE + PAGE - 1] = 1  # All but one byte of it is zero.
    packed = pack(region, _pages(3, 4, 5, 9, 10, 11, 20), Order(codec))
    assert packed.codec is codec
    assert packed.content.tolist() == _pages(3, 4, 9, 10, 20).tolist()
    assert packed.zeroes.tolist() == _pages(5, 11).tolist()
    content = codecs.decompress(codec.kind, packed.payload, 5 * PAGE)
    expected = b"".join(bytes(region.view[n * PAGE : (n + 1) * PAGE]) for n in (3, 4, 9, 10, 20))
    assert content == expected


def test_what_doesnt_become_smaller_is_left_as_it_is(region: MappedRegion) -> None:
    noise = os.urandom(2 * PAGE)
    region.view[: 2 * PAGE] = noise
    for order in (SMALL, PLAIN):
        packed = pack(region, _pages(0, 1), order)
        assert packed.codec is None
        assert bytes(packed.payload) == noise
        assert (packed.trial is None) is (order.codec is None)
        assert [trial.codec for trial in packed.compared] == list(order.compared)


def test_a_part_tells_what_each_codec_is_like_and_one_is_sent(region: MappedRegion) -> None:
    text = b"".join(b"%x " % random.Random(n).randrange(10**6) for n in range(4000))
    region.view[: 4 * PAGE] = text[: 4 * PAGE]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "COMPARED_BYTES", 2 * PAGE)
        packed = pack(region, _pages(0, 1, 2, 3), SMALL)
    assert [trial.codec for trial in packed.compared] == list(LADDER)
    assert {trial.size for trial in packed.compared} == {2 * PAGE}
    left = {trial.codec.name: trial.wire_bytes for trial in packed.compared}
    assert left["zstd-1"] < 0.8 * left["lz4"]  # Digits in any order: LZ4 finds no repetition.
    assert packed.codec is not None
    assert packed.codec is SMALL.codec
    assert packed.trial is not None
    assert len(packed.payload) == packed.trial.wire_bytes
    assert codecs.decompress(packed.codec.kind, packed.payload, 4 * PAGE) == text[: 4 * PAGE]


def test_nothing_but_zeros(region: MappedRegion) -> None:
    packed = pack(region, _pages(1, 2), SMALL)
    assert not len(packed.payload)
    assert not len(packed.content)
    assert packed.zeroes.tolist() == _pages(1, 2).tolist()


def test_what_is_packed_is_a_copy(region: MappedRegion) -> None:
    region.view[:PAGE] = (noise := os.urandom(PAGE))
    packed = pack(region, _pages(0), SMALL)
    region.view[:PAGE] = bytes(PAGE)
    assert bytes(packed.payload) == noise


def test_a_destination_gets_what_it_knows() -> None:
    assert codecs.usable(codecs.FAMILIES) == LADDER
    assert [codec.kind for codec in codecs.usable(("lz4",))] == [FrameKind.PACKED]
    assert codecs.usable(("brotli",)) == ()


@EACH_CODEC
def test_whatever_comes_is_as_long_as_announced_or_refused(codec: Codec) -> None:
    """Bytes changed, lost, added: never another length, and never another kind of error."""
    chance = random.Random(codec.name)
    content = b"".join(b"page %5d " % chance.randrange(500) for _ in range(1500))[: 4 * PAGE]
    packed = codecs.compress(codec, memoryview(content))
    assert codecs.decompress(codec.kind, memoryview(packed), len(content)) == content
    for _ in range(500):
        broken = bytearray(packed)
        for _ in range(chance.randrange(1, 4)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        del broken[chance.randrange(2 * len(broken)) :]
        broken += chance.randbytes(chance.choice([0, 0, 1, 20]))
        try:
            found = codecs.decompress(codec.kind, memoryview(broken), len(content))
        except RemoteProtocolError:
            continue
        assert len(found) == len(content)


class _Host:
    """A clock, and how many core seconds nobody used."""

    def __init__(self) -> None:
        self.now = self.idle_s = 0.0
        self.cores = IdleCores(lambda: self.idle_s, lambda: self.now)

    def went_by(self, seconds: float, idle: float) -> None:
        self.now += seconds
        self.idle_s += seconds * idle


def test_idle_cores_are_those_of_the_last_windows() -> None:
    host = _Host()
    assert host.cores() == 0.0
    host.went_by(0.09, 2.0)
    assert host.cores() == 0.0  # Too short to tell.
    host.went_by(0.11, 2.0)
    assert host.cores() == pytest.approx(2.0)
    host.went_by(0.06, 0.0)
    assert host.cores() == pytest.approx(2.0)
    host.went_by(0.06, 0.0)
    assert host.cores() == pytest.approx(1.0)  # A moment's work isn't believed at once.
    for _ in range(6):
        host.went_by(0.11, 0.0)
        host.cores()
    assert host.cores() < 0.05


def test_short_passes_are_a_window_together() -> None:
    host = _Host()
    host.went_by(1.0, 2.0)
    for _ in range(30):
        host.cores.look()
        host.went_by(0.08, 0.0)
    assert host.cores() < 0.05


def test_what_packing_takes_it_may_have() -> None:
    """And what the sending thread takes beside it, it may not."""
    host = _Host()
    for _ in range(10):
        host.went_by(0.1, 0.3)
        host.cores.used(0.05)
        host.cores()
    assert host.cores() == pytest.approx(0.8)


def test_a_set_up_says_nothing_where_more_is_known() -> None:
    """Where its destination is started on the same host, too."""
    host = _Host()
    for _ in range(3):
        host.went_by(1.0, 1.5)
        host.cores.look()  # An engine that waits for its migration.
    host.went_by(0.2, 0.1)
    host.cores.begin()
    assert host.cores() == pytest.approx(1.5)
    host.went_by(0.11, 1.5)
    assert host.cores() == pytest.approx(1.5)


def test_who_knows_nothing_else_learns_from_the_set_up() -> None:
    host = _Host()
    host.went_by(0.3, 0.4)
    host.cores.begin()
    assert host.cores() == pytest.approx(0.4)


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


def test_what_is_expected_of_a_link_holds_until_it_was_seen() -> None:
    """By a window in which there was something to send, or by two others."""
    for busy, windows in ((1.0, 1), (0.2, 2)):
        link = _Link()
        link.gauge.expected_bytes_per_s = 117e6
        for _ in range(windows):
            assert link.gauge.expected_bytes_per_s == 117e6
            link.window(117e6, busy=busy)
        assert link.gauge.expected_bytes_per_s is None


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


def test_a_window_begins_when_there_is_something_to_send() -> None:
    """Looking for zero pages first isn't a link that is too fast."""
    link = _Link()
    link.window(117e6, busy=0.0)
    assert not link.gauge.judged
    link.window(117e6)
    assert link.gauge.bytes_per_s == pytest.approx(117e6, rel=0.01)
