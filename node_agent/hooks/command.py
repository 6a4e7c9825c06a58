"""A program as a hook: argv as it is, no shell, the call as JSON on standard input.

Exit status 0 is success; else the last line of its standard error is the reason. It runs in a
session of its own, with an environment of PATH and FERRY_* alone; when it has ended, or its time is
over, its whole process group is killed.
"""

from __future__ import annotations

from typing import Final

import msgspec

from migrator import programs
from node_agent.hooks.model import CommandHook, HookCall
from node_agent.hooks.port import HookDriver, HookError

_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_REASON_CHARACTERS_MAX: Final = 300


class CommandDriver(HookDriver[CommandHook]):
    """See the module."""

    async def run(self, settings: CommandHook, call: HookCall, *, deadline_s: float) -> str:
        program = settings.argv[0]
        try:
            ended = await programs.run(
                settings.argv,
                stdin=msgspec.json.encode(call) + b"\n",
                timeout_s=deadline_s,
                folder="/",
                environment={
                    "PATH": _PATH,
                    "FERRY_HOOK_POINT": call.point.value,
                    "FERRY_DOMAIN": call.domain or "",
                    "FERRY_NODE": call.node,
                },
                with_group=True,  # A hook has no say about later.
            )
        except TimeoutError as error:
            said = f"{program} wasn't done within {deadline_s:g} s and was killed"
            raise HookError(said) from error
        except OSError as error:
            raise HookError(f"{program} can't be run: {error.strerror}") from error
        if ended.status != 0:
            lines = ended.err.decode(errors="replace").strip().splitlines()
            reason = lines[-1][:_REASON_CHARACTERS_MAX] if lines else "it gave no reason"
            raise HookError(f"{program} ended with {_status(ended.status)}: {reason}")
        return f"{program} ended with status 0"


def _status(code: int) -> str:
    if code < 0:
        return f"signal {-code}"
    return f"status {code}"
