"""What a sample tells of a guest's contents."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np
import pytest

from migrator import ranges
from migrator.engine.codecs import LADDER
from migrator.engine.memory import MappedRegion
from migrator.engine.sampling import content_shares, pending_packed_share
from migrator.engine_messages import RegionLayout

PAGE = 4096
PAGES = 8192
"""More than are looked at."""


@contextlib.contextmanager
def region_of(pages: int, page_size: int = PAGE) -> Iterator[MappedRegion]:
    fd = os.memfd_create("region")
    os.ftruncate(fd, pages * PAGE)
    layout = RegionLayout(name="ram", size_bytes=pages * PAGE, page_size_bytes=page_size)
    yield MappedRegion(0, fd, layout)
    os.close(fd)


@pytest.fixture
def region() -> Iterator[MappedRegion]:
    with region_of(PAGES) as made:
        yield made


def all_of(pages: int) -> list[ranges.Ranges]:
    return [np.array([[0, pages * PAGE]], dtype=np.int64)]


def test_zeros_are_counted_and_the_rest_is_packed(region: MappedRegion) -> None:
    quarter = PAGES // 4 * PAGE
    region.view[:quarter] = os.urandom(quarter)
    region.view[quarter : 2 * quarter] = b"an even text. \n\n" * (quarter // 16)
    zero_share, packed_share = content_shares([region], all_of(PAGES))
    assert zero_share == pytest.approx(0.5, abs=0.01)
    assert packed_share == pytest.approx(0.5, abs=0.02)


def test_what_cant_be_packed_is_left_at_that(region: MappedRegion) -> None:
    region.view[: 300 * PAGE] = os.urandom(300 * PAGE)
    assert content_shares([region], all_of(300)) == (0.0, 1.0)


def test_of_what_is_pending_a_few_pages_tell_what_is_left_on_the_wire(
    region: MappedRegion,
) -> None:
    region.view[: 1000 * PAGE] = os.urandom(1000 * PAGE)
    region.view[1000 * PAGE : 2000 * PAGE] = b"an even text. \n\n" * (1000 * PAGE // 16)
    noise, text, zeros = ([[at * PAGE, (at + 1000) * PAGE]] for at in (0, 1000, 2000))

    def share(*extents: list[list[int]]) -> float | None:
        content = np.array([each for extent in extents for each in extent], dtype=np.int64)
        return pending_packed_share([region], [content], LADDER[-1])

    assert share(noise) == 1.0
    assert share(text) == pytest.approx(0.0, abs=0.01)
    assert share(noise, text) == pytest.approx(0.5, abs=0.02)
    assert share(noise, zeros) == pytest.approx(0.5, abs=0.02), "zeros cost next to nothing"
    assert pending_packed_share([region], [ranges.empty()], LADDER[0]) is None


def test_nothing_but_zeros_and_nothing_at_all(region: MappedRegion) -> None:
    assert content_shares([region], all_of(PAGES)) == (1.0, 1.0)
    assert content_shares([region], [ranges.empty()]) == (0.0, 1.0)


def test_huge_pages_travel_as_they_are(region: MappedRegion) -> None:
    """No engine packs them, or leaves those of zeros out."""
    text = b"an even text. \n\n"
    with region_of(2 * PAGES, 512 * PAGE) as huge:
        assert content_shares([huge], all_of(2 * PAGES)) == (0.0, 1.0)
        huge.view[: PAGES * PAGE] = text * (PAGES * PAGE // len(text))
        assert content_shares([huge], all_of(2 * PAGES)) == (0.0, 1.0)
        region.view[: PAGES // 2 * PAGE] = text * (PAGES // 2 * PAGE // len(text))
        extents = [*all_of(2 * PAGES), *all_of(PAGES)]
        zero_share, packed_share = content_shares([huge, region], extents)
    assert zero_share == pytest.approx(1 / 6, abs=0.01)
    assert packed_share == pytest.approx(0.8, abs=0.01)


def test_a_region_counts_by_what_it_has(region: MappedRegion) -> None:
    """And not by how much of it is looked at."""
    region.view[:] = os.urandom(PAGES * PAGE)
    with region_of(PAGES // 4) as small:
        zero_share, packed_share = content_shares(
            [region, small], [*all_of(PAGES), *all_of(PAGES // 4)]
        )
    assert zero_share == pytest.approx(0.2, abs=0.01)
    assert packed_share == 1.0
