"""An engine that was started ahead: it looks at its host until it is told its migration."""

from __future__ import annotations

import socket

import pytest

from migrator import wire
from migrator.engine import control
from migrator.engine.control import AgentGoneError, Control
from migrator.engine_messages import Configure
from migrator.model import Role

CONFIGURE = Configure(role=Role.DESTINATION, migration_id="m", secret=b"s", pid=0, regions=())


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_SPARE_WAIT_S", 0.001)


def test_it_looks_around_until_it_is_configured() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        looks = 0

        def look() -> None:
            nonlocal looks
            looks += 1
            if looks == 3:
                ours.sendall(wire.encode_frame(wire.FrameKind.ENGINE, CONFIGURE))

        configure, descriptors = Control(theirs).receive_configure(look)
        assert (configure, descriptors) == (CONFIGURE, [])
        assert looks >= 3


def test_it_ends_with_its_agent() -> None:
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(AgentGoneError):
        Control(theirs).receive_configure(ours.close)
