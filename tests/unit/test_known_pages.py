"""Which pages needn't be sent again, by their hashes."""

from __future__ import annotations

import os

import numpy as np
import pytest

from migrator import ranges
from migrator.engine.known import KnownPages
from migrator.engine.memory import MappedRegion
from migrator.engine_messages import RegionLayout

PAGE = 4096
PAGES = 8192


@pytest.fixture
def known() -> KnownPages:
    fd = os.memfd_create("known")
    os.ftruncate(fd, PAGES * PAGE)
    layout = RegionLayout(name="ram", size_bytes=PAGES * PAGE, page_size_bytes=PAGE)
    made = KnownPages([MappedRegion(0, fd, layout)])
    os.close(fd)
    return made


def _pages(*numbers: int) -> ranges.Ranges:
    return ranges.from_page_starts(np.array(numbers, dtype=np.int64) * PAGE, PAGE)


def test_only_what_equals_the_last_content_of_the_same_page_is_known(known: KnownPages) -> None:
    one, other = os.urandom(PAGE), os.urandom(PAGE)
    where = _pages(1, 2, 7)
    assert not known.same(0, where, known.hash(memoryview(one * 3))).any()
    known.sent(0, where, known.hash(memoryview(one + other + one)))
    found = known.same(0, where, known.hash(memoryview(one + one + one)))
    assert found.tolist() == [True, False, True]
    # The same content elsewhere tells nothing of a page that was never sent.
    assert not known.same(0, _pages(3), known.hash(memoryview(one))).any()


def test_what_went_another_way_is_forgotten(known: KnownPages) -> None:
    one = os.urandom(PAGE)
    digests = known.hash(memoryview(one * 2))
    known.sent(0, _pages(4, 5), digests)
    known.sent(0, _pages(4), None)
    assert known.same(0, _pages(4, 5), digests).tolist() == [False, True]


def test_two_engines_hash_differently(known: KnownPages) -> None:
    """So nobody can prepare two pages that an engine will take for one."""
    page = memoryview(os.urandom(PAGE))
    assert (known.hash(page) != KnownPages([]).hash(page)).any()


def test_comparing_stops_where_it_finds_nothing_and_is_tried_again(known: KnownPages) -> None:
    content = ranges.from_pairs([(0, 5000 * PAGE)])
    digests = np.ones((5000, 2), dtype=np.uint64)
    known.sent(0, content, digests)
    assert known.should_hash()
    assert not known.same(0, content, digests + 1).any()
    answers = [known.should_hash() for _ in range(34)]
    assert 1 <= sum(answers) <= 5
    assert known.same(0, content, digests).all()
    assert known.should_hash()
