"""Whole post-copies, through engines and connections that end at any moment: no page is lost.

A seed replays a failure.
"""

from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.post_copy_wiring import small
from tests.unit.post_copy_world import World


@given(st.integers(0, 2**32), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_whatever_ends_meanwhile_the_guest_finds_each_page_as_it_left_it(
    seed: int, bad_days: int
) -> None:
    """And each that it has written since as it wrote it; and nobody waits for ever."""
    with contextlib.ExitStack() as stack:
        world = World(seed, stack)
        with small(world):
            world.run(bad_days)
