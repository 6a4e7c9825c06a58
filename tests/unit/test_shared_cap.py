"""Streams share a bandwidth cap and the idle cores for as long as they have something to send."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from migrator import ranges
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.channel import ChannelHealth
from migrator.engine.codecs import LADDER
from migrator.engine.control import Signal, StoppedError
from migrator.engine.delivery import Delivery
from migrator.engine.packing_policy import PackingPolicy
from migrator.engine.stream import Endpoint, PageStream, Piece
from tests.integration.stream_ends import MIB, AcceptingWaiter, Ends, hello

CAP = 32 * MIB


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def _stream(ends: Ends, bucket: TokenBucket) -> PageStream:
    endpoint = Endpoint(host="127.0.0.1", port=ends.listener.getsockname()[1])
    return PageStream(endpoint, hello(), bucket)


def test_the_last_stream_packs_by_all_of_the_cap(ends: Ends) -> None:
    """It packed by its part of it, with a slower codec than the cap leaves time for."""
    bucket = TokenBucket(CAP, 0.0)
    stream = _stream(ends, bucket)
    policy = PackingPolicy(lambda: 0.3, sharers=lambda: bucket.sharers)
    assert stream.gauge() == CAP, "it sends between passes, as nobody else does"
    with bucket.in_use():
        assert (stream.gauge(), bucket.sharers) == (CAP, 1)
        assert policy.plan(stream.gauge(), LADDER) is not None
        with bucket.in_use():
            assert (stream.gauge(), bucket.sharers) == (CAP / 2, 2)
            assert policy.plan(125e6, LADDER) is None, "half of the idle cores is too little"
        assert (stream.gauge(), bucket.sharers) == (CAP, 1)
    stream.capped = False
    assert stream.gauge() is None


class _Looking(AcceptingWaiter):
    """Notes how many streams share the cap; ends the delivery, if that is asked for."""

    def __init__(self, stop: Signal, ends: Ends, bucket: TokenBucket) -> None:
        super().__init__(stop, ends, 0)
        self._bucket = bucket
        self.seen: set[int] = set()
        self.ends_it = False

    def tick(self) -> None:
        super().tick()
        self.seen.add(self._bucket.sharers)
        if self.ends_it:
            raise StoppedError


@pytest.mark.parametrize("beside_another", [False, True])
@pytest.mark.parametrize("ends_it", [False, True])
def test_a_delivery_shares_it_until_it_is_over(
    ends: Ends, beside_another: bool, ends_it: bool
) -> None:
    bucket = TokenBucket(CAP, time.monotonic())
    stream = _stream(ends, bucket)
    content = ranges.from_pairs([(0, 4 * MIB)])
    policy = PackingPolicy(lambda: 0.0)
    made = Delivery(stream, [Piece(0, content)], [ends.source], bucket, policy, skip_zeroes=False)
    another = bucket.in_use() if beside_another else contextlib.nullcontext()
    with contextlib.closing(Signal()) as stop, another:
        waiter = _Looking(stop, ends, bucket)
        stream.connect(waiter)
        waiter.ends_it = ends_it
        with pytest.raises(StoppedError) if ends_it else contextlib.nullcontext():
            made.run(ChannelHealth(lambda message: None), 30.0, waiter)
        assert waiter.seen == {2 if beside_another else 1}
        assert bucket.sharers == 1
        stream.close()
    assert bucket.sharers == 1
