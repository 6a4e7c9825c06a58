"""What post-copy's answers travel as."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from migrator import ranges
from migrator.engine import codecs
from migrator.engine.answers import SLOW_BYTES_PER_S, AnswerPacker
from migrator.engine.codecs import LADDER, Codec
from migrator.engine.frames import FrameKind
from migrator.engine.memory import MappedRegion
from migrator.engine.packing_policy import PackingPolicy
from migrator.engine_messages import RegionLayout

PAGE = 4096
SIZE = 64 * PAGE
SLOW, FAST = 25e6, 1.25e9


@pytest.fixture
def region() -> Iterator[MappedRegion]:
    """16 pages of text, 16 zero pages, 32 of noise."""
    fd = os.memfd_create("region")
    os.ftruncate(fd, SIZE)
    layout = RegionLayout(name="ram", size_bytes=SIZE, page_size_bytes=PAGE)
    made = MappedRegion(0, fd, layout)
    made.view[: 16 * PAGE] = (b"line after line of what a guest keeps\n" * SIZE)[: 16 * PAGE]
    made.view[32 * PAGE :] = os.urandom(32 * PAGE)
    yield made
    os.close(fd)


def packer(idle: float = 8.0, usable: tuple[Codec, ...] = LADDER) -> AnswerPacker:
    made = AnswerPacker(PackingPolicy(lambda: idle))
    made.usable = usable
    return made


def pages(first: int, last: int) -> ranges.Ranges:
    return ranges.from_pairs([(first * PAGE, last * PAGE)])


def test_bulk_is_packed_and_zero_pages_are_told_apart(region: MappedRegion) -> None:
    answer = packer().bulk(region, pages(8, 24), SLOW)
    assert answer.content.tolist() == pages(8, 16).tolist()
    assert answer.zeroes.tolist() == pages(16, 24).tolist()
    assert answer.kind in {codec.kind for codec in LADDER}
    (payload,) = answer.payload
    assert len(payload) < PAGE
    whole = codecs.decompress(answer.kind, payload, 8 * PAGE)
    assert whole == region.view[8 * PAGE : 16 * PAGE]
    assert sum(map(len, answer.vector(0)[1:])) == len(payload)


@pytest.mark.parametrize(
    ("made", "rate"),
    [
        (packer(), FAST),
        (packer(), None),
        (packer(idle=0.0), SLOW),
        (packer(usable=()), SLOW),
    ],
    ids=["a fast link", "an unknown one", "no idle core", "an older destination"],
)
def test_else_it_goes_as_it_is(
    region: MappedRegion, made: AnswerPacker, rate: float | None
) -> None:
    answer = made.bulk(region, pages(8, 24), rate)
    assert answer.kind is FrameKind.PAGES
    assert answer.content.tolist() == pages(8, 16).tolist()
    assert answer.zeroes.tolist() == pages(16, 24).tolist()
    assert b"".join(answer.payload) == region.view[8 * PAGE : 16 * PAGE]


def test_noise_goes_as_it_is(region: MappedRegion) -> None:
    answer = packer().bulk(region, pages(32, 64), SLOW)
    assert answer.kind is FrameKind.PAGES
    assert b"".join(answer.payload) == region.view[32 * PAGE :]


def test_nothing_is_left_of_zero_pages(region: MappedRegion) -> None:
    for made in (packer(), packer(idle=0.0)):
        answer = made.bulk(region, pages(16, 32), SLOW)
        assert not len(answer.content)
        assert answer.zeroes.tolist() == pages(16, 32).tolist()


def test_a_faults_page_is_packed_on_a_slow_link_where_that_is_understood(
    region: MappedRegion,
) -> None:
    made = packer()
    assert made.fault(region, pages(3, 4)).kind is FrameKind.PAGES  # No rate is known yet.
    made.bulk(region, pages(0, 1), SLOW_BYTES_PER_S / 2)
    answer = made.fault(region, pages(3, 4))
    assert answer.kind is FrameKind.PACKED
    whole = codecs.decompress(answer.kind, answer.payload[0], PAGE)
    assert whole == region.view[3 * PAGE : 4 * PAGE]
    assert made.fault(region, pages(40, 41)).kind is FrameKind.PAGES  # Noise.
    made.usable = ()
    assert made.fault(region, pages(3, 4)).kind is FrameKind.PAGES
    made.usable = LADDER
    made.bulk(region, pages(0, 1), SLOW_BYTES_PER_S * 2)
    assert made.fault(region, pages(3, 4)).kind is FrameKind.PAGES
