"""What a post-copy's source makes of a destination that says what can't be."""

from __future__ import annotations

import os
from typing import cast

import pytest

from migrator import ranges
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.control import HelperWaiter, Signal
from migrator.engine.delivery import ChannelHealth
from migrator.engine.frames import FrameKind, Header, StreamHello, StreamKind
from migrator.engine.memory import MappedRegion
from migrator.engine.packing_policy import PackingPolicy
from migrator.engine.page_server import PageServer
from migrator.engine.page_socket import PageSocket
from migrator.engine.stream import Endpoint
from migrator.engine_messages import RegionLayout
from migrator.errors import RemoteProtocolError
from migrator.ranges import Ranges

PAGE = 4096
SIZE = 16 * PAGE


class _Asks:
    """A stream on which a page is asked for, and so many are said to be missing."""

    def __init__(self, left_pages: int) -> None:
        self._left_pages = left_pages

    def receive(self) -> tuple[Header, Ranges]:
        header = Header(FrameKind.PULL, 0, 1, self._left_pages, 0)
        return header, ranges.from_pairs([(0, PAGE)])


def test_more_than_there_is_cant_be_missing() -> None:
    """Told to the agent in bytes, it wouldn't fit into any number there."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, SIZE)
    layout = RegionLayout(name="ram", size_bytes=SIZE, page_size_bytes=PAGE)
    server = PageServer(
        Endpoint(host="", port=0),
        lambda kind: StreamHello(version=1, migration_id="m", secret=b"", kind=kind),
        [MappedRegion(0, fd, layout)],
        TokenBucket(None, 0.0),
        ChannelHealth(lambda message: None),
        PackingPolicy(lambda: 0.0),
        reconnect_s=1.0,
        fault=lambda error: None,
    )
    stop = Signal()
    with pytest.raises(RemoteProtocolError, match="can't be missing"):
        server._serve(StreamKind.FAULTS, cast(PageSocket, _Asks(2**64 - 1)), HelperWaiter(stop))
    assert server.left_pages == 0
    server.close()
    stop.close()
    os.close(fd)
