"""Compressed pages over a real connection: a delivery here, the destination's receiver there."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence

import numpy as np
import pytest

from migrator import ranges
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.channel import ChannelHealth
from migrator.engine.codecs import LADDER, Codec
from migrator.engine.control import Signal
from migrator.engine.delivery import Delivery
from migrator.engine.known import KnownPages
from migrator.engine.packing_policy import Plan
from migrator.engine.stream import Endpoint, PageStream, Piece
from tests.integration.stream_ends import (
    MIB,
    PAGE,
    SIZE,
    AcceptingWaiter,
    AlwaysPacks,
    Ends,
    hello,
)


def _names(tried: tuple[Codec, ...]) -> str:
    return tried[0].name if len(tried) == 1 else "all"


class _FullLink(PageStream):
    """Has enough to do always: nothing goes plain because this machine is busy."""

    in_hand_s = 1.0


@pytest.mark.parametrize("cut_at", [0, 12])
@pytest.mark.parametrize("tried", [*((codec,) for codec in LADDER), LADDER], ids=_names)
def test_memory_arrives_compressed(ends: Ends, tried: tuple[Codec, ...], cut_at: int) -> None:
    view = ends.source.view
    text = b"a guest's memory repeats itself, more or less: %6d\n"
    for at in range(0, 8 * MIB, 52):
        view[at : at + 52] = (text % (at % 999_983))[:52].ljust(52)
    view[8 * MIB : 10 * MIB] = os.urandom(2 * MIB)
    scattered = np.arange(16 * MIB, 20 * MIB, 3 * PAGE)
    for start in scattered.tolist():
        view[start : start + 64] = b"x" * 64
    content = ranges.union(
        ranges.from_pairs([(0, 12 * MIB)]),  # Of which the last 2 MiB are zeros.
        ranges.from_page_starts(scattered, PAGE),
    )
    ends.arrived[:] = b"\xff" * SIZE
    bucket = TokenBucket(24 * MIB, time.monotonic())
    endpoint = Endpoint(host="127.0.0.1", port=ends.listener.getsockname()[1])
    stream = _FullLink(endpoint, hello(), bucket)
    stop = Signal()
    waiter = AcceptingWaiter(stop, ends, cut_at)
    stream.connect(waiter)
    delivery = Delivery(
        stream,
        [Piece(0, content)],
        [ends.source],
        bucket,
        AlwaysPacks(tried),
        skip_zeroes=False,
    )
    try:
        delivery.run(ChannelHealth(lambda message: None), 30.0, waiter)
    finally:
        stream.bye()
        stream.close()
        stop.close()
    assert delivery.empty
    assert delivery.left_bytes == 0
    for start, end in content.tolist():
        assert ends.arrived[start:end] == view[start:end]
    assert ends.arrived[12 * MIB : 16 * MIB] == b"\xff" * (4 * MIB)  # Not asked for.
    assert delivery.zero_pages >= 2 * MIB // PAGE
    if not cut_at:
        assert delivery.zero_pages == 2 * MIB // PAGE
        assert delivery.payload_bytes == ranges.byte_count(content) - 2 * MIB
        assert stream.bytes_sent < 0.6 * delivery.payload_bytes
        assert set(delivery.packed_bytes) <= {codec.name for codec in tried}
        assert delivery.packed_bytes.total() > 6 * MIB


class _Stingy(AlwaysPacks):
    """Has time for a frame now and then."""

    _frames = 0

    @property
    def affordable(self) -> bool:  # type: ignore[override]
        self._frames += 1
        return self._frames % 5 == 0


@pytest.mark.parametrize("full_link", [False, True])
def test_a_budget_is_awaited_while_the_link_has_enough_to_do(ends: Ends, full_link: bool) -> None:
    """Else pages go as they are: either way all arrive."""
    content = ranges.from_pairs([(0, 6 * MIB)])
    for at in range(0, 6 * MIB, PAGE):
        ends.source.view[at : at + 16] = b"page %11d" % at
    bucket = TokenBucket(24 * MIB, time.monotonic())
    endpoint = Endpoint(host="127.0.0.1", port=ends.listener.getsockname()[1])
    stream = (_FullLink if full_link else PageStream)(endpoint, hello(), bucket)
    with contextlib.closing(Signal()) as stop:
        waiter = AcceptingWaiter(stop, ends, 0)
        stream.connect(waiter)
        regions = [ends.source]
        delivery = Delivery(
            stream, [Piece(0, content)], regions, bucket, _Stingy(), skip_zeroes=False
        )
        delivery.run(ChannelHealth(lambda message: None), 30.0, waiter)
        stream.bye()
        stream.close()
    assert ends.arrived[: 6 * MIB] == ends.source.view[: 6 * MIB]
    packed = delivery.packed_bytes.total()
    assert packed == 6 * MIB if full_link else packed < 6 * MIB


class _Late(AlwaysPacks):
    """Its cores are busy for the first frames."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self._busy = frames

    def plan(self, link_bytes_per_s: float | None, usable: Sequence[Codec]) -> Plan | None:
        self._busy -= 1
        return None if self._busy >= 0 else super().plan(link_bytes_per_s, usable)

    def could_pay(self, link_bytes_per_s: float | None, usable: Sequence[Codec]) -> bool:
        return True


@pytest.mark.parametrize("cut_at", [0, 6, 20])
def test_what_cant_be_made_smaller_goes_while_the_cores_are_busy(ends: Ends, cut_at: int) -> None:
    """So that what can still goes packed, wherever in memory it lies."""
    view = ends.source.view
    text = (b"what a guest has in its memory, line by line\n" * MIB)[: 4 * MIB]
    view[: 4 * MIB] = text
    view[4 * MIB : 12 * MIB] = os.urandom(8 * MIB)
    view[12 * MIB : 16 * MIB] = text
    bucket = TokenBucket(24 * MIB, time.monotonic())
    endpoint = Endpoint(host="127.0.0.1", port=ends.listener.getsockname()[1])
    stream = _FullLink(endpoint, hello(), bucket)
    with contextlib.closing(Signal()) as stop:
        waiter = AcceptingWaiter(stop, ends, cut_at)
        stream.connect(waiter)
        content = ranges.from_pairs([(0, 16 * MIB)])
        delivery = Delivery(
            stream, [Piece(0, content)], [ends.source], bucket, _Late(12), skip_zeroes=True
        )
        delivery.run(ChannelHealth(lambda message: None), 30.0, waiter)
        stream.bye()
        stream.close()
    assert ends.arrived[: 16 * MIB] == view[: 16 * MIB]
    assert delivery.empty
    assert delivery.left_bytes == 0
    if not cut_at:
        # All but a few frames, which went before anything else was found.
        assert delivery.packed_bytes.total() >= 7 * MIB
        assert stream.bytes_sent < 9.5 * MIB


@pytest.mark.parametrize("cut_at", [0, 3])
def test_pages_that_are_as_they_were_sent_stay_here(ends: Ends, cut_at: int) -> None:
    """Also where the connection breaks in between: what may not have arrived is sent again."""
    noise = os.urandom(8 * MIB)
    ends.source.view[: 8 * MIB] = noise
    content = ranges.from_pairs([(0, 8 * MIB)])
    bucket = TokenBucket(24 * MIB, time.monotonic())
    endpoint = Endpoint(host="127.0.0.1", port=ends.listener.getsockname()[1])
    stream = _FullLink(endpoint, hello(), bucket)
    stop = Signal()
    waiter = AcceptingWaiter(stop, ends, 0)
    stream.connect(waiter)
    known, policy = KnownPages([ends.source]), AlwaysPacks()

    def deliver() -> Delivery:
        made = Delivery(
            stream,
            [Piece(0, content)],
            [ends.source],
            bucket,
            policy,
            skip_zeroes=False,
            known=known,
        )
        made.run(ChannelHealth(lambda message: None), 30.0, waiter)
        return made

    try:
        first = deliver()
        assert first.same_pages == 0
        changed = [5, 700, 1999]
        for page in changed:
            ends.source.view[page * PAGE] ^= 1
        if cut_at:
            waiter.cut_in(cut_at)
        before = stream.bytes_sent
        second = deliver()
        # A page that is sent plain isn't looked at.
        assert second.same_pages + second.pages >= 8 * MIB // PAGE
        if not cut_at:
            assert second.same_pages > 1024
            assert stream.bytes_sent - before < 4 * MIB
        assert ends.arrived[: 8 * MIB] == ends.source.view[: 8 * MIB]
        assert bytes(ends.arrived[: 8 * MIB]) != noise
    finally:
        stream.bye()
        stream.close()
        stop.close()
