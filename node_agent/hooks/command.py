"""A program as a hook: argv as it is, no shell, the call as JSON on standard input.

Exit status 0 is success; else the last line of its standard error is the reason. It runs in a
session of its own, with an environment of PATH and FERRY_* alone; when its time is over, its whole
process group is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from typing import Final

import msgspec

from node_agent.hooks.model import CommandHook, HookCall
from node_agent.hooks.port import HookDriver, HookError

_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_REASON_CHARACTERS_MAX: Final = 300
_END_S: Final = 5.0


class CommandDriver(HookDriver[CommandHook]):
    """See the module."""

    async def run(self, settings: CommandHook, call: HookCall, *, deadline_s: float) -> str:
        program = settings.argv[0]
        try:
            process = await asyncio.create_subprocess_exec(
                *settings.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
                cwd="/",
                env={
                    "PATH": _PATH,
                    "FERRY_HOOK_POINT": call.point.value,
                    "FERRY_DOMAIN": call.domain or "",
                    "FERRY_NODE": call.node,
                },
            )
        except OSError as error:
            raise HookError(f"{program} can't be run: {error.strerror}") from error
        try:
            async with asyncio.timeout(deadline_s):
                _, errors = await process.communicate(msgspec.json.encode(call) + b"\n")
        except TimeoutError as error:
            said = f"{program} wasn't done within {deadline_s:g} s and was killed"
            raise HookError(said) from error
        finally:
            # Also what it left in the background: a hook has no say about later.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await process.wait()
        if process.returncode != 0:
            lines = errors.decode(errors="replace").strip().splitlines()
            reason = lines[-1][:_REASON_CHARACTERS_MAX] if lines else "it gave no reason"
            raise HookError(f"{program} ended with {_status(process.returncode)}: {reason}")
        return f"{program} ended with status 0"


def _status(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}"
    return f"status {code}"
