"""What a post-copy's source makes of a destination that says what can't be."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import cast

import pytest

from migrator import ranges
from migrator.engine import page_server
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.channel import ChannelHealth
from migrator.engine.control import HelperWaiter, Signal
from migrator.engine.frames import FrameKind, Header, StreamHello, StreamKind, StreamWelcome
from migrator.engine.memory import MappedRegion
from migrator.engine.packing_policy import PackingPolicy
from migrator.engine.page_server import PageServer
from migrator.engine.page_socket import PageSocket, StreamEndedError
from migrator.engine.stream import Endpoint, StreamBrokenError, StreamRefusedError, open_welcomed
from migrator.engine_messages import ChannelBroken, ChannelRestored, FromEngine, RegionLayout
from migrator.errors import RemoteProtocolError
from migrator.ranges import Ranges

PAGE = 4096
SIZE = 16 * PAGE


def region_of(name: str) -> MappedRegion:
    fd = os.memfd_create(name)
    os.ftruncate(fd, SIZE)
    return MappedRegion(0, fd, RegionLayout(name=name, size_bytes=SIZE, page_size_bytes=PAGE))


class _Asks:
    """A stream on which a page is asked for, and so many are said to be missing."""

    def __init__(self, left_pages: int) -> None:
        self._left_pages = left_pages

    def receive(self) -> tuple[Header, Ranges]:
        header = Header(FrameKind.PULL, 0, 1, self._left_pages, 0)
        return header, ranges.from_pairs([(0, PAGE)])


@pytest.mark.parametrize("kind", [StreamBrokenError, StreamRefusedError, RemoteProtocolError])
def test_the_destination_is_dialled_for_as_long_as_it_takes(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """The engine gave up, and with it went the pages of a guest whose hypervisor had died."""
    ours, theirs = socket.socketpair()
    tries = iter(range(12))
    told: list[FromEngine] = []
    faults: list[BaseException] = []

    def open_welcomed(*_: object) -> tuple[socket.socket, StreamWelcome]:
        if next(tries, None) is not None:
            raise kind("nobody's there")
        return ours, StreamWelcome()

    monkeypatch.setattr(page_server, "open_welcomed", open_welcomed)
    monkeypatch.setattr(page_server, "_KINDS", (StreamKind.FAULTS,))
    monkeypatch.setattr(page_server, "_BACKOFF_S", 0.002)
    monkeypatch.setattr(page_server, "_REFUSED_S", 0.002)
    region = region_of("guest")
    server = PageServer(
        Endpoint(host="", port=0),
        lambda kind: StreamHello(version=1, migration_id="m", secret=b"", kind=kind),
        [region],
        TokenBucket(None, 0.0),
        ChannelHealth(told.append),
        PackingPolicy(lambda: 0.0),
        reconnect_s=0.004,
        fault=faults.append,
    )
    opened = threading.Event()
    server.start(opened.set)
    assert opened.wait(10.0)
    assert not faults
    reasons = [each.reason for each in told if isinstance(each, ChannelBroken)]
    assert len(reasons) > 1
    assert all("nobody's there" in each for each in reasons)
    assert isinstance(told[-1], ChannelRestored)
    server.close()
    for end in (ours, theirs):
        end.close()
    os.close(region.fd)


def server_of(region: MappedRegion) -> PageServer:
    """One that nobody hears of."""
    return PageServer(
        Endpoint(host="", port=0),
        lambda kind: StreamHello(version=1, migration_id="m", secret=b"", kind=kind),
        [region],
        TokenBucket(None, 0.0),
        ChannelHealth(lambda message: None),
        PackingPolicy(lambda: 0.0),
        reconnect_s=60.0,
        fault=lambda error: None,
    )


def test_more_than_there_is_cant_be_missing() -> None:
    """Told to the agent in bytes, it wouldn't fit into any number there."""
    region = region_of("guest")
    server = server_of(region)
    stop = Signal()
    with pytest.raises(RemoteProtocolError, match="can't be missing"):
        server._serve(StreamKind.FAULTS, cast(PageSocket, _Asks(2**64 - 1)), HelperWaiter(stop))
    assert server.left_pages == 0
    server.close()
    stop.close()
    os.close(region.fd)


def test_a_server_that_was_closed_holds_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine goes on with the next one, for each engine that the destination has."""

    def open_welcomed(*_: object) -> tuple[socket.socket, StreamWelcome]:
        raise StreamBrokenError("nobody's there")

    monkeypatch.setattr(page_server, "open_welcomed", open_welcomed)
    region = region_of("guest")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        server = server_of(region)
        server.start()
        server.close()
        server.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    os.close(region.fd)


def test_why_pages_dont_come_is_told_in_words() -> None:
    """Users read it. None of the kernel's numbers."""
    ours, theirs = socket.socketpair()
    stream = PageSocket(ours, [], 5.0)
    theirs.close()
    with pytest.raises(StreamEndedError, match=r"^sending: Broken pipe$"):
        stream.send(FrameKind.LIST)
    stream.close()
    stop = Signal()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    hello = StreamHello(version=1, migration_id="m", secret=b"", kind=StreamKind.BULK)
    endpoint = Endpoint(host="127.0.0.1", port=port)
    with pytest.raises(StreamBrokenError, match=rf"^connecting to .*:{port}: Connection refused$"):
        open_welcomed(endpoint, hello, HelperWaiter(stop))
    stop.close()
