"""Which pages can be made smaller, and queues of pieces."""

from __future__ import annotations

import base64
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator import ranges
from migrator.engine.sorting import (
    _ALIKE,
    _GLANCES_APART,
    _RANGES_MAX,
    AHEAD_BYTES,
    PieceQueue,
    Sorted,
    is_hard,
)
from migrator.engine.stream import Piece

PAGE = 4096
FRAME = 128 * PAGE
TEXT = b"a guest's memory repeats itself, more or less; that is what packing lives on\n"


def _words(content: bytes) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.frombuffer(content, dtype=np.uint64)


def _whole(content: bytes) -> ranges.Ranges:
    return ranges.from_pairs([(0, len(content))])


@pytest.mark.parametrize(
    ("content", "hard"),
    [
        (os.urandom(FRAME), True),
        (os.urandom(PAGE), True),
        ((TEXT * FRAME)[:FRAME], False),
        ((TEXT * FRAME)[:PAGE], False),
        (base64.b64encode(os.urandom(FRAME))[:FRAME], False),  # Nothing in it repeats.
        (bytes(FRAME), False),
        # Every other page, and so every other that is looked at.
        (b"".join(os.urandom(PAGE) + (TEXT * PAGE)[:PAGE] for _ in range(64)), False),
    ],
    ids=["noise", "a page of noise", "text", "a page of text", "base64", "zeros", "mixed"],
)
def test_a_glance_tells_what_can_be_made_smaller(content: bytes, hard: bool) -> None:
    assert is_hard(_words(content), _whole(content)) is hard


def test_only_what_is_asked_for_is_looked_at() -> None:
    content = os.urandom(FRAME) + (TEXT * FRAME)[:FRAME]
    scattered = np.arange(0, FRAME, 3 * PAGE)
    assert is_hard(_words(content), ranges.from_page_starts(scattered, PAGE))
    assert not is_hard(_words(content), ranges.from_page_starts(scattered + FRAME, PAGE))


def test_a_bit_off_a_large_piece_costs_no_more_than_off_a_small_one() -> None:
    starts = np.arange(0, 4 * _RANGES_MAX + 3, dtype=np.int64) * 2 * PAGE
    content = ranges.from_page_starts(starts, PAGE)
    queue = PieceQueue()
    queue.put(Piece(3, content, cold=True))
    assert queue.content_bytes == len(starts) * PAGE
    found = []
    while queue:
        assert len(queue.head.content) <= _RANGES_MAX
        piece = queue.take(1000 * PAGE)
        assert (piece.region, piece.cold) == (3, True)
        found.append(piece.content)
    assert np.concatenate(found).tolist() == content.tolist()
    assert queue.content_bytes == 0


def test_pieces_are_sorted_by_kind_until_there_is_enough_of_one() -> None:
    noise, text = os.urandom(FRAME), (TEXT * FRAME)[:FRAME]
    words = _words(noise + text)
    pieces = Sorted()
    assert not pieces
    for at in range(0, AHEAD_BYTES, FRAME):
        assert not pieces.full
        pieces.put(Piece(0, ranges.from_pairs([(0, FRAME)])), words)
        if at == 0:
            pieces.put(Piece(0, ranges.from_pairs([(FRAME, 2 * FRAME)])), words)
    assert pieces.full
    assert pieces.soft.content_bytes == FRAME
    assert pieces.soft.head.content.tolist() == [[FRAME, 2 * FRAME]]
    assert pieces.hard.content_bytes == AHEAD_BYTES


def test_where_all_were_soft_one_in_a_few_is_looked_at_until_one_is_hard() -> None:
    noise, text = os.urandom(FRAME), (TEXT * FRAME)[:FRAME]
    words = _words(noise + text)
    pieces = Sorted()
    for _ in range(_ALIKE):
        pieces.put(Piece(0, ranges.from_pairs([(FRAME, 2 * FRAME)])), words)
    for _ in range(_GLANCES_APART):
        pieces.put(Piece(0, ranges.from_pairs([(0, FRAME)])), words)
    missed = pieces.soft.content_bytes // FRAME - _ALIKE
    assert missed < _GLANCES_APART
    for _ in range(10):
        pieces.put(Piece(0, ranges.from_pairs([(0, FRAME)])), words)
    assert pieces.soft.content_bytes == (_ALIKE + missed) * FRAME


@given(
    st.lists(st.sets(st.integers(0, 60)), max_size=6),
    st.lists(st.tuples(st.integers(1, 9), st.none() | st.integers(1, 3), st.booleans())),
)
def test_a_queue_loses_nothing_and_keeps_the_order(
    contents: list[set[int]], takes: list[tuple[int, int | None, bool]]
) -> None:
    queue = PieceQueue()
    expected: list[tuple[int, int]] = []
    for region, pages in enumerate(contents):
        starts = np.array(sorted(pages), dtype=np.int64) * PAGE
        queue.put(Piece(region, ranges.from_page_starts(starts, PAGE)))
        expected += [(region, start) for start in starts.tolist()]
    found: list[tuple[int, int]] = []
    for pages_max, ranges_max, back in takes:
        assert queue.content_bytes == (len(expected) - len(found)) * PAGE
        if not queue:
            break
        piece = queue.take(pages_max * PAGE, ranges_max)
        assert 0 < ranges.byte_count(piece.content) <= pages_max * PAGE
        assert len(piece.content) <= (ranges_max or len(piece.content))
        if back:
            queue.put_back(piece)
            continue
        starts = ranges.page_starts(piece.content, PAGE).tolist()
        found += [(piece.region, start) for start in starts]
    while queue:
        piece = queue.take(PAGE)
        found += [(piece.region, int(piece.content[0, 0]))]
    assert found == expected
    assert queue.content_bytes == 0
