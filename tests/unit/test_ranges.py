"""Range arithmetic against Python's own sets of pages."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from migrator import ranges

PAGE = 4096
STRIPE = 8 * PAGE

pages = st.sets(st.integers(0, 120), max_size=80)
raw = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=20)


def of(numbers: set[int]) -> ranges.Ranges:
    return ranges.from_page_starts(np.array(sorted(numbers), dtype=np.int64) * PAGE, PAGE)


def to_set(array: ranges.Ranges) -> set[int]:
    return {int(start) // PAGE for start in ranges.page_starts(array, PAGE)}


def assert_canonical(array: ranges.Ranges) -> None:
    assert array.dtype == np.int64
    assert (array[:, 0] < array[:, 1]).all()
    assert (array[1:, 0] > array[:-1, 1]).all()


@given(raw)
def test_canonical_holds_the_same_bytes(pairs: list[tuple[int, int]]) -> None:
    array = ranges.from_pairs(pairs)
    assert_canonical(array)
    wanted = {byte for start, end in pairs for byte in range(start, end)}
    assert {byte for start, end in array.tolist() for byte in range(start, end)} == wanted


@given(pages, pages)
def test_set_operations(left: set[int], right: set[int]) -> None:
    for result, wanted in (
        (ranges.union(of(left), of(right)), left | right),
        (ranges.subtract(of(left), of(right)), left - right),
        (ranges.intersect(of(left), of(right)), left & right),
    ):
        assert_canonical(result)
        assert to_set(result) == wanted
        assert ranges.page_count(result, PAGE) == len(wanted)


@given(pages, st.integers(1, 5))
def test_each_page_keeps_its_stream(numbers: set[int], streams: int) -> None:
    parts = ranges.split_by_stripe(of(numbers), streams, STRIPE)
    assert len(parts) == streams
    for index, part in enumerate(parts):
        wanted = {page for page in numbers if page * PAGE // STRIPE % streams == index}
        assert to_set(part) == wanted


@given(pages, st.integers(1, 20), st.integers(1, 6))
def test_take_goes_through_everything_once(numbers: set[int], size: int, count: int) -> None:
    rest, seen = of(numbers), []
    while len(rest):
        head, rest = ranges.take(rest, size * PAGE, count)
        assert 0 < ranges.byte_count(head) <= size * PAGE
        assert 0 < len(head) <= count
        seen += [int(start) // PAGE for start in ranges.page_starts(head, PAGE)]
    assert seen == sorted(numbers)


@given(pages)
def test_cut_keeps_the_bytes(numbers: set[int]) -> None:
    pieces = ranges.cut(of(numbers), STRIPE)
    assert (pieces[:, 0] // STRIPE == (pieces[:, 1] - 1) // STRIPE).all()
    assert to_set(ranges.canonical(pieces)) == numbers


@given(raw)
def test_align_outward_covers(pairs: list[tuple[int, int]]) -> None:
    array = ranges.from_pairs(pairs)
    grown = ranges.align_outward(array, 16)
    assert_canonical(grown)
    assert (grown % 16 == 0).all()
    assert not len(ranges.subtract(array, grown))
    assert ranges.byte_count(grown) <= ranges.byte_count(array) + 30 * len(array)


def test_the_empty_set() -> None:
    nothing = ranges.empty()
    assert ranges.byte_count(ranges.union(nothing, nothing)) == 0
    assert [len(part) for part in ranges.split_by_stripe(nothing, 3)] == [0, 0, 0]
    assert len(ranges.take(nothing, 1, 1)[0]) == 0
    assert len(ranges.page_starts(nothing, PAGE)) == 0
