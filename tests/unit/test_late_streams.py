"""A stream whose hello is answered late: its other end may have given it up, and come again."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from migrator import wire
from migrator.engine.destination import DestinationEngine
from migrator.engine.frames import StreamHello, StreamKind
from migrator.engine.intake import ConnectionEndedError
from migrator.engine.receiver import Connection, Memory
from migrator.engine.transport import StreamSocket
from tests.integration.stream_ends import Ends, Host, hello


class _BusyHost(Host):
    """Has no time for a hello, until it has."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.has_time = threading.Event(), threading.Event()
        self.taken: list[StreamSocket] = []

    def refusal_of(self, hello: StreamHello, peer: str | None) -> str:
        self.asked.set()
        assert self.has_time.wait(30.0)
        return ""

    def device_stream(self, sock: StreamSocket) -> None:
        self.taken.append(sock)

    def post_copy_stream(self, kind: StreamKind, sock: StreamSocket) -> None:
        self.taken.append(sock)


@pytest.fixture
def host() -> _BusyHost:
    return _BusyHost()


@pytest.fixture
def busy(host: _BusyHost) -> Iterator[Ends]:
    made = Ends()
    made.host = host
    yield made
    host.has_time.set()
    made.close()


def _said_hello(ends: Ends, host: _BusyHost, kind: StreamKind) -> tuple[socket.socket, Connection]:
    sock = socket.create_connection(ends.listener.getsockname())
    ends.accept()
    greeting = msgspec.structs.replace(hello(), kind=kind)
    sock.sendall(wire.encode_frame(wire.FrameKind.HELLO, greeting))
    assert host.asked.wait(30.0)
    return sock, ends.connections[-1]


def _open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("kind", [StreamKind.DEVICE, StreamKind.FAULTS, StreamKind.BULK])
def test_one_that_was_given_up_takes_no_other_s_place(
    busy: Ends, host: _BusyHost, kind: StreamKind
) -> None:
    """What it replaces may be carrying the device state: the switchover would fail."""
    open_before = _open_descriptors()
    sock, connection = _said_hello(busy, host, kind)
    sock.close()
    host.has_time.set()
    assert connection.join(30.0)
    assert host.taken == []
    assert _open_descriptors() == open_before


def test_page_streams_too_are_let_in_only_while_they_live() -> None:
    """The one that was dialled instead may have its place, and be in the midst of a pass."""
    ours, theirs = socket.socketpair()
    connection = Connection(ours, cast(Memory, None), Host(), 1.0)
    assert connection.alive
    theirs.close()
    assert not connection.alive
    ours.close()
    engine = SimpleNamespace(
        _admitting=threading.Lock(),
        _streams={},
        _health=SimpleNamespace(restored=lambda index: None),
    )
    with pytest.raises(ConnectionEndedError, match="given up"):
        DestinationEngine.admit(cast(DestinationEngine, engine), connection)
    assert engine._streams == {}


def test_one_that_waited_is_taken(busy: Ends, host: _BusyHost) -> None:
    sock, connection = _said_hello(busy, host, StreamKind.DEVICE)
    with sock:
        host.has_time.set()
        assert connection.join(30.0)
        (taken,) = host.taken
        taken.close()
