"""Guests of huge pages are counted in pages of 4 KiB, as all others: decisions are made by that."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import msgspec
import pytest

from migrator import ranges
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.channel import ChannelHealth
from migrator.engine.control import Signal
from migrator.engine.delivery import Delivery, delivered
from migrator.engine.dirty_log import DirtyLog, LogClaim
from migrator.engine.packing_policy import PackingPolicy
from migrator.engine.stream import Endpoint, PageStream, Piece
from migrator.model import PassKind
from tests.integration.stream_ends import MIB, PAGE, AcceptingWaiter, Ends, hello

HUGE = 2 * MIB
CONTENT = ranges.from_pairs([(0, 4 * HUGE)])


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    made.source.layout = msgspec.structs.replace(made.source.layout, page_size_bytes=HUGE)
    yield made
    made.close()


@pytest.mark.parametrize("cut", [False, True])
def test_what_was_sent_and_what_was_cut(ends: Ends, cut: bool) -> None:
    bucket = TokenBucket(None, time.monotonic())
    endpoint = Endpoint(host="127.0.0.1", port=ends.listener.getsockname()[1])
    stream = PageStream(endpoint, hello(), bucket)
    policy = PackingPolicy(lambda: 0.0)
    made = Delivery(stream, [Piece(0, CONTENT)], [ends.source], bucket, policy, skip_zeroes=True)
    with contextlib.closing(Signal()) as stop:
        waiter = AcceptingWaiter(stop, ends, 0)
        stream.connect(waiter)
        if cut:
            made.end()
        made.run(ChannelHealth(lambda message: None), 30.0, waiter)
        stream.bye()
        stream.close()
    report = delivered(1, PassKind.FIRST, [made])
    assert (report.pages, report.cut_pages) == ((0, 2048) if cut else (2048, 0))
    assert report.payload_bytes == (0 if cut else 2048 * PAGE)


def test_what_is_pending(ends: Ends) -> None:
    """256 MiB would be 128 pages: next to nothing, by which the guest is stopped."""
    log = DirtyLog(-1, -1, [ends.source.layout], LogClaim(ends.source.fd))
    log.restore(0, CONTENT)
    assert log.pending_pages() == log.pending_bytes() // PAGE == 2048
