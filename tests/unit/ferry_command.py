"""`ferry` as it is typed, in a thread: its commands are synchronous, and the API runs in the test's
loop. A test that uses it is marked `allow_blocking`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import pytest

from node_agent.cli import main
from tests.unit.agent_world import MAC


class Result(NamedTuple):
    code: int
    out: str
    err: str


Ferry = Callable[..., Coroutine[Any, Any, Result]]


def ferry_command(capfd: pytest.CaptureFixture[str], *options: str) -> Ferry:
    """With `options` behind each command. A call fails whose exit code isn't `code` (None: any)."""

    async def run(*arguments: str, code: int | None = 0) -> Result:
        capfd.readouterr()
        got = await asyncio.to_thread(main.run, [*arguments, *options])
        out, err = capfd.readouterr()
        result = Result(got, out, err)
        assert "Traceback" not in err
        if code is not None:
            assert got == code, result
        return result

    return run


async def define(ferry: Ferry, *more: str) -> Result:
    nic = f"bridge=br0,mac={MAC.upper()},ip=10.0.0.7"
    flags = ["--memory", "64M", "--disk", "root", "--nic", nic]
    return await ferry("domain", "define", "web", *flags, *more)
