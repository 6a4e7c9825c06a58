"""An engine that fails says why, whatever becomes of its clearing up."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable, Iterator

import msgspec
import pytest

from migrator import cores, shortage, wire
from migrator.engine import process
from migrator.engine.control import Control
from migrator.engine_messages import Configure, EngineFailed, FromEngine
from migrator.model import Role


class HalfMade:
    """Not all of its threads could be started, and it joins those that were not."""

    def __init__(self, *_: object) -> None:
        pass

    def run(self) -> None:
        raise RuntimeError("can't start new thread")

    def close(self) -> None:
        raise RuntimeError("cannot join thread before it is started")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, socket.socket]]:
    """The engine's end of the socketpair, and its agent's."""
    configure = Configure(
        role=Role.DESTINATION,
        migration_id="m1",
        secret=b"",
        pid=1,
        regions=(),
        streams=1,
        bind_address="",
    )
    sockets: list[socket.socket] = []

    def receive(control: Control, waiting: Callable[[], None]) -> tuple[Configure, list[int]]:
        sockets.append(control._sock)
        return configure, []

    monkeypatch.setattr(Control, "receive_configure", receive)
    monkeypatch.setattr(process, "DestinationEngine", HalfMade)
    monkeypatch.setattr(process, "Path", lambda _: NoFile())
    monkeypatch.setattr(shortage, "set_adjustment", lambda *_: None)
    monkeypatch.setattr(cores, "set_niceness", lambda *_: True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "setswitchinterval", lambda _: None)
    ours, theirs = socket.socketpair()
    with ours:
        yield theirs.detach(), ours
    for each in sockets:  # Its end closes an engine's.
        each.close()


class NoFile:
    """In place of /proc/self/comm: this process keeps its name."""

    def write_text(self, _: str) -> None:
        pass


def test_it_says_why_though_it_cannot_be_closed(told: tuple[int, socket.socket]) -> None:
    descriptor, agent = told
    assert process.main(["--fd", str(descriptor)]) == 1
    (frame,) = wire.FrameDecoder().feed(agent.recv(65_536))
    message = frame.decode(msgspec.msgpack.Decoder(FromEngine))
    assert message == EngineFailed(reason=shortage.OF_TASKS)
