"""An engine's process as its agent has it, and the socketpair between the two."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from migrator import engine_messages as m
from migrator import wire
from migrator.engine import client, control
from migrator.engine.client import EngineProcess
from migrator.engine.control import AgentGoneError, Control


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ETOOMANYREFS])
async def test_one_that_cant_be_told_anything_is_ended(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    """It would wait for what was dropped, and its guest for its pages."""
    monkeypatch.setattr(client, "SEND_TIMEOUT_S", 0.2)
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    process = await EngineProcess.spawn(
        log_path=tmp_path / "log", on_message=lambda message: None, on_exit=ended.set_result
    )

    class _Full:
        def sendmsg(self, *what: object) -> int:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(process, "_sock", Mock(wraps=process._sock, sendmsg=_Full().sendmsg))
    process.send(m.PullAll())
    async with asyncio.timeout(20.0):
        assert await ended == -signal.SIGKILL
    assert f"can't be told anything: {os.strerror(number)}" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM])
async def test_what_it_cant_be_told_for_a_moment_it_is_told_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The kernel has no memory for a message now and then, and the engine may be all that has the
    guest's pages.
    """
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    process = await EngineProcess.spawn(
        log_path=tmp_path / "log", on_message=lambda message: None, on_exit=ended.set_result
    )
    sock, tries = process._sock, 0

    def sendmsg(*what: Any) -> int:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError(number, os.strerror(number))
        return sock.sendmsg(*what)

    monkeypatch.setattr(process, "_sock", Mock(wraps=sock, sendmsg=sendmsg))
    process.send(m.Stop())
    async with asyncio.timeout(20.0):
        assert await ended == 0


async def test_descriptors_that_cant_all_be_duplicated_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where none is left, each try would take some more."""
    made: list[int] = []
    duplicate = os.dup

    def scarce(fd: int) -> int:
        if made:
            raise OSError(24, "Too many open files")
        made.append(duplicate(fd))
        return made[0]

    ended = asyncio.Event()
    process = await EngineProcess.spawn(
        log_path=tmp_path / "log",
        on_message=lambda message: None,
        on_exit=lambda status: ended.set(),
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", scarce)
        with pytest.raises(OSError, match="Too many"):
            process.send(m.PullAll(), fds=(0, 1))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(made[0])
    assert await process.stop(30.0)
    assert ended.is_set()


async def test_a_log_that_opens_when_nobody_waits_for_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk hung, and the migration was cancelled."""
    begun, gate, closed = threading.Event(), threading.Event(), threading.Event()
    made: list[int] = []
    open_file, close_file = os.open, os.close

    def slow(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if Path(path) != tmp_path / "log":
            return open_file(path, flags, mode)
        begun.set()
        assert gate.wait(30.0)
        made.append(open_file(path, flags, mode))
        return made[0]

    def close(fd: int) -> None:
        close_file(fd)
        if fd in made:
            closed.set()

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", slow)
        patch.setattr(os, "close", close)
        spawning = asyncio.create_task(
            EngineProcess.spawn(
                log_path=tmp_path / "log",
                on_message=lambda message: None,
                on_exit=lambda status: None,
            )
        )
        assert await asyncio.to_thread(begun.wait, 30.0)
        spawning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await spawning
        gate.set()
        assert await asyncio.to_thread(closed.wait, 5.0)


async def test_an_engine_that_can_not_be_killed_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A migration's end waits for its engine's."""
    monkeypatch.setattr(client, "KILLED_S", 0.05)
    process = await EngineProcess.spawn(
        log_path=tmp_path / "log", on_message=lambda message: None, on_exit=lambda status: None
    )
    os.kill(process.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(process, "kill", lambda: None)
        async with asyncio.timeout(20.0):
            assert not await process.stop(0.05)
    assert f"engine {process.pid} was killed and doesn't end" in caplog.text
    process.kill()
    async with asyncio.timeout(20.0):
        await asyncio.wait([process._watch])


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM])
@pytest.mark.parametrize("lasts", [True, False])
def test_an_engine_whose_word_cant_be_sent_for_a_moment_doesnt_take_its_agent_for_gone(
    monkeypatch: pytest.MonkeyPatch, number: int, lasts: bool
) -> None:
    monkeypatch.setattr(control, "SEND_TIMEOUT_S", 0.2)
    ours, theirs = socket.socketpair()
    tries = 0

    def send(data: memoryview) -> int:
        nonlocal tries
        tries += 1
        if lasts or tries < 3:
            raise OSError(number, os.strerror(number))
        return theirs.send(data)

    engine = Control(theirs)
    monkeypatch.setattr(engine, "_sock", SimpleNamespace(send=send))
    with ours, theirs:
        if lasts:
            with pytest.raises(AgentGoneError, match=os.strerror(number)):
                engine.send(m.Pong())
        else:
            engine.send(m.Pong())
            assert ours.recv(4096) == wire.encode_frame(wire.FrameKind.ENGINE, m.Pong())
