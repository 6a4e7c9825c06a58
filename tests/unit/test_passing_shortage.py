"""A kernel that has no memory for a socket at a moment costs a connection, and not an engine.

Where it has none for the guest's pages, the migration ends: the same numbers, from elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from migrator import ranges
from migrator.engine import channel, frames, kernel
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.channel import ChannelHealth, reconnect
from migrator.engine.control import POLL_IN, Signal, Waiter, poll
from migrator.engine.delivery import Delivery
from migrator.engine.frames import FrameKind
from migrator.engine.intake import ConnectionEndedError, Intake
from migrator.engine.landing import Landing
from migrator.engine.memory import MappedRegion
from migrator.engine.missing import make_hole
from migrator.engine.packing_policy import PackingPolicy
from migrator.engine.relay import Pumps
from migrator.engine.stream import Endpoint, PageStream, Piece
from migrator.errors import EngineError
from tests.integration.stream_ends import MIB, PAGE, AcceptingWaiter, Ends, hello

SHORTAGES = [errno.ENOBUFS, errno.ENOMEM]
LONG_S = 30.0


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def _fails(
    call: Callable[..., Any], number: int, when: Callable[..., bool], at: int = 1
) -> Callable[..., Any]:
    """Once: at the so manieth of the calls that `when` is about."""
    calls = itertools.count(1)

    def scarce(*what: Any, **more: Any) -> Any:
        if when(*what, **more) and next(calls) == at:
            raise OSError(number, os.strerror(number))
        return call(*what, **more)

    return scarce


def _from_socket(*what: Any, **more: Any) -> bool:
    return "offset_dst" not in more


def _deliver(ends: Ends, region: MappedRegion) -> tuple[Delivery, list[object]]:
    """Pages and zeros, and what the agent was told meanwhile."""
    told: list[object] = []
    bucket = TokenBucket(None, time.monotonic())
    endpoint = Endpoint(host="127.0.0.1", port=ends.listener.getsockname()[1])
    stream = PageStream(endpoint, hello(), bucket)
    zeroes = Piece(0, ranges.from_pairs([(24 * MIB, 28 * MIB)]), FrameKind.ZERO)
    pages = Piece(0, ranges.from_pairs([(0, 20 * MIB)]))
    with contextlib.closing(Signal()) as stop:
        waiter = AcceptingWaiter(stop, ends, 0)
        stream.connect(waiter)
        policy = PackingPolicy(lambda: 0.0)
        made = Delivery(stream, [zeroes, pages], [region], bucket, policy, skip_zeroes=False)
        made.run(ChannelHealth(told.append), LONG_S, waiter)
        stream.bye()
        stream.close()
    return made, told


@pytest.mark.parametrize("number", SHORTAGES, ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("owner", "name", "when", "at"),
    [
        (socket.socket, "recv_into", lambda *what: len(what[1]) == frames.HEADER_BYTES, 3),
        (os, "splice", _from_socket, 5),
        (socket.socket, "sendall", lambda *what: len(what[1]) == frames.HEADER_BYTES, 2),
        (socket.socket, "sendmsg", lambda *what: True, 3),
        (os, "sendfile", lambda *what: True, 3),
    ],
    ids=["a header", "pages", "an acknowledgement", "sending", "sending from a file"],
)
def test_a_stream_is_made_anew_and_all_arrives(
    ends: Ends,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    when: Callable[..., bool],
    at: int,
    number: int,
) -> None:
    ends.source.view[: 20 * MIB] = os.urandom(20 * MIB)
    ends.arrived[:] = b"\xff" * len(ends.arrived)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _fails(getattr(owner, name), number, when, at))
        made, told = _deliver(ends, ends.source)
    assert ends.host.faults == []
    assert made.empty
    assert len(told) == 2, "broken, and whole again"
    assert len(ends.connections) == 2
    assert ends.arrived[: 20 * MIB] == ends.source.view[: 20 * MIB]
    assert not any(ends.arrived[24 * MIB : 28 * MIB : PAGE])


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOSPC], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["splice", "punch_hole"])
def test_memory_that_isnt_to_be_had_for_the_guest_ends_the_engine(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    owner: Any = os if name == "splice" else kernel

    def when(*what: Any, **more: Any) -> bool:
        return owner is kernel or not _from_socket(*what, **more)

    monkeypatch.setattr(owner, name, _fails(getattr(owner, name), number, when))
    ends.arrived[:] = b"\xff" * len(ends.arrived)
    sock = ends.connect()
    content = ranges.from_pairs([(0, PAGE)])
    kind = FrameKind.PAGES if name == "splice" else FrameKind.ZERO
    sock.sendall(frames.encode(kind, sequence=1, region=0, content=content))
    if kind is FrameKind.PAGES:
        sock.sendall(bytes(PAGE))
    assert ends.connections[0].join(LONG_S)
    sock.close()
    (fault,) = ends.host.faults
    assert isinstance(fault, EngineError)
    assert str(fault) == f"memory region destination can't be written to: {os.strerror(number)}"


def test_memory_that_cant_be_emptied_for_post_copy_ends_the_engine(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever touches such a page wouldn't wait for it."""
    scarce = _fails(kernel.punch_hole, errno.ENOMEM, lambda *what: True)
    monkeypatch.setattr(kernel, "punch_hole", scarce)
    with pytest.raises(EngineError, match="region source can't be written to: Cannot allocate"):
        make_hole(ends.source, 0, PAGE)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.EFAULT, EngineError), *((each, ConnectionEndedError) for each in SHORTAGES)],
    ids=["EFAULT", "ENOBUFS", "ENOMEM"],
)
def test_of_a_mapping_that_is_received_into_only_a_fault_is_told(
    ends: Ends, number: int, expected: type[Exception]
) -> None:
    """Huge pages that are used up."""
    huge = ends.source
    huge.layout = msgspec.structs.replace(huge.layout, page_size_bytes=2 * MIB)
    sock = SimpleNamespace(recvmsg_into=_fails(lambda *what: None, number, lambda *what: True))
    landing = Landing(Intake(cast(socket.socket, sock), 1.0))
    with pytest.raises(expected):
        landing.receive(huge, ranges.from_pairs([(0, 2 * MIB)]))
    landing.close()


@pytest.mark.parametrize("carries", [True, False])
def test_one_that_breaks_whenever_it_is_made_isnt_made_as_fast_as_it_goes(carries: bool) -> None:
    """A shortage that lasts: each time costs both engines some work, and their agents, too."""
    waited: list[float] = []
    stream = SimpleNamespace(
        index=0, carries=carries, close=lambda: None, connect=lambda waiter: None
    )
    waiter = SimpleNamespace(wait=lambda source, events, seconds: waited.append(seconds))
    health = ChannelHealth(lambda message: None)
    reconnect(cast(PageStream, stream), health, "no memory", LONG_S, cast(Waiter, waiter))
    assert waited == ([] if carries else [channel._IN_VAIN_S])


def test_a_connection_carries_once_something_came_back(ends: Ends) -> None:
    endpoint = Endpoint(host="127.0.0.1", port=ends.listener.getsockname()[1])
    stream = PageStream(endpoint, hello(), TokenBucket(None, 0.0))
    with contextlib.closing(Signal()) as stop:
        waiter = AcceptingWaiter(stop, ends, 0)
        stream.connect(waiter)
        assert not stream.carries
        stream.barrier(waiter)
        stream.await_acknowledged(waiter)
        assert stream.carries
        stream.connect(waiter)
        assert not stream.carries
        stream.bye()
        stream.close()


def test_a_hypervisor_that_lacks_a_part_of_its_stream_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would wait for what comes behind, and stand still until somebody's time is over."""
    hypervisor, ours = socket.socketpair()
    peer, theirs = socket.socketpair()
    scarce = _fails(socket.socket.sendall, errno.ENOBUFS, lambda *what: what[0] is ours)
    monkeypatch.setattr(socket.socket, "sendall", scarce)
    pumps = Pumps(ours, theirs, at_source=False, begun=lambda: None)
    running = threading.Thread(target=pumps.run, daemon=True)
    running.start()
    peer.sendall(b"\x01\x04\x00\x00\x00data")
    told = poll({hypervisor.fileno(): POLL_IN}, 5.0)
    assert told and hypervisor.recv(1) == b"", "its end of file"
    running.join(LONG_S)
    assert not running.is_alive()
    hypervisor.close()
    peer.close()
