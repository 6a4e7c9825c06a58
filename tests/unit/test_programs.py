"""Programs are over with their own end, whatever they leave behind; also those that are hooks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator import programs
from migrator.errors import StorageError
from node_agent.hooks.command import CommandDriver
from node_agent.hooks.model import CommandHook, HookCall, HookPoint
from node_agent.hooks.port import HookError
from storage.hooks import call_hook
from tests.time_limits import Limit

PATIENCE_S = 20.0
LIMIT_S = 600.0


class Script:
    """Of a shell; `leave` begins a daemon in it, which holds what the script has open."""

    leave = (
        """setsid sh -c 'echo $$ >"$1"; exec sleep 600' sh "$1" & """
        'while [ ! -s "$1" ]; do sleep 0.01; done'
    )

    def __init__(self, folder: Path) -> None:
        self.pid_file = folder / "pid"

    def __call__(self, text: str) -> list[str]:
        return ["/bin/sh", "-c", text, "sh", str(self.pid_file)]

    def end(self) -> None:
        """What it has left."""
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            os.kill(int(self.pid_file.read_text()), signal.SIGKILL)
        self.pid_file.unlink(missing_ok=True)

    def runs(self) -> bool:
        """What it has left."""
        try:
            state = Path(f"/proc/{int(self.pid_file.read_text())}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):  # The latter: it went as it was read.
            return False
        return state.rpartition(")")[2].split()[0] != "Z"

    async def begun(self) -> None:
        """What it leaves has."""
        async with asyncio.timeout(PATIENCE_S):
            while not (self.pid_file.exists() and self.pid_file.read_text()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    made = Script(tmp_path)
    yield made
    made.end()


async def test_it_ends_though_a_daemon_holds_its_pipes(script: Script) -> None:
    async with asyncio.timeout(PATIENCE_S):
        ended = await programs.run(
            script(f"{script.leave}; echo said; echo complained >&2; exit 3"),
            timeout_s=600,
            with_group=True,
        )
    assert ended == programs.Ended(3, b"said\n", b"complained\n")
    assert script.runs(), "it has a session of its own"


async def test_a_late_one_is_killed_though_a_daemon_holds_its_pipes(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = Limit(monkeypatch, LIMIT_S)
    program = script(f"{script.leave}; sleep 600")
    running = asyncio.create_task(programs.run(program, timeout_s=LIMIT_S, with_group=True))
    await script.begun()
    await limit.is_over()
    with pytest.raises(TimeoutError):
        await running
    assert script.runs()


async def test_its_group_ends_with_it(script: Script) -> None:
    async with asyncio.timeout(PATIENCE_S):
        ended = await programs.run(
            script('sleep 600 & echo $! >"$1"'), timeout_s=600, with_group=True
        )
        assert ended.status == 0
        while script.runs():  # noqa: ASYNC110  Not our child.
            await asyncio.sleep(0.01)


async def test_a_cancelled_one_is_killed(script: Script) -> None:
    running = asyncio.create_task(
        programs.run(script('echo $$ >"$1"; exec sleep 600'), timeout_s=600)
    )
    await script.begun()
    assert script.runs()
    running.cancel()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(asyncio.CancelledError):
            await running
    assert not script.runs()


async def test_all_that_it_printed_comes_in_its_order(script: Script) -> None:
    text = "seq 1 200000; seq 1 200000 >&2"
    ended = await programs.run(script(text), timeout_s=PATIENCE_S)
    expected = "".join(f"{number}\n" for number in range(1, 200_001)).encode()
    assert (ended.out, ended.err) == (expected, expected)


async def test_what_is_too_much_is_dropped(script: Script) -> None:
    text = f"head -c {3 * programs.OUTPUT_BYTES_MAX} /dev/zero"
    ended = await programs.run(script(text), timeout_s=PATIENCE_S)
    assert (ended.status, len(ended.out)) == (0, programs.OUTPUT_BYTES_MAX)


async def test_it_may_read_what_it_is_given_or_not(script: Script) -> None:
    given = bytes(range(256)) * 4096
    ended = await programs.run(script("cat"), stdin=given, timeout_s=PATIENCE_S)
    assert ended == programs.Ended(0, given, b"")
    ended = await programs.run(script("exit 4"), stdin=given, timeout_s=PATIENCE_S)
    assert ended.status == 4
    ended = await programs.run(script("kill -9 $$"), timeout_s=PATIENCE_S)
    assert ended.status == -signal.SIGKILL
    with pytest.raises(FileNotFoundError):
        await programs.run(["/nowhere/program"], timeout_s=PATIENCE_S)


async def test_a_storage_s_hook_is_over_with_its_program(script: Script) -> None:
    hook = script(f"{script.leave}; echo '{{}}'")
    async with asyncio.timeout(PATIENCE_S):
        assert await call_hook(hook, {}, dict[str, Any], timeout_s=600) == {}


async def test_a_storage_s_hook_that_is_late_is_told_in_time(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = Limit(monkeypatch, LIMIT_S)
    hook = script(f"{script.leave}; sleep 600")
    running = asyncio.create_task(call_hook(hook, {}, dict[str, Any], timeout_s=LIMIT_S))
    await script.begun()
    await limit.is_over()
    with pytest.raises(StorageError, match="no answer in 600 s; it was killed"):
        await running


async def test_a_moment_s_hook_is_over_with_its_program(script: Script) -> None:
    call = HookCall(point=HookPoint.BEFORE_MIGRATION, node="n1")
    async with asyncio.timeout(PATIENCE_S):
        hook = CommandHook(argv=tuple(script(script.leave)))
        assert "status 0" in await CommandDriver().run(hook, call, deadline_s=600)
        script.end()
        hook = CommandHook(argv=tuple(script(f"{script.leave}; echo no room >&2; exit 3")))
        with pytest.raises(HookError, match="status 3: no room"):
            await CommandDriver().run(hook, call, deadline_s=600)
