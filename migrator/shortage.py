"""Which process the kernel ends first where a host has no memory left (oom_score_adj, proc(5)).

And what is said where it has no process or thread left.

By itself it takes the process that has mapped most: a guest that runs. What a migration receives
is written to a file that nobody has mapped yet, so it counts for nobody, and another guest would
die for it (seen: that guest twice, then the agent). So those say that they go first by whose end
nothing is lost but a migration:

    FIRST     a destination's hypervisor, until it is loaded: its guest runs at the source
    NEXT      engines. A source's has mapped its guest's memory, which counts a second time for it
    as ours   guests; agents too, that are small, and whose end costs a guest nothing

"Ours" is what this process was started with, so that a unit's OOMScoreAdjust is what it is for.
"""

from __future__ import annotations

import contextlib
import errno
import signal
from pathlib import Path
from typing import Final

FIRST: Final = 1000
NEXT: Final = 500
WHO_KNOWS: Final = "if for want of memory, `journalctl -k` says so"
"""Of an end that nobody of us asked for. The kernel tells its log alone."""
OF_TASKS: Final = (
    "no process or thread is left: see TasksMax= of the agent's unit, and /proc/sys/kernel/pid_max"
)
_PROC: Final = Path("/proc")


def ours() -> int:
    """What this process was started with, and so what it starts."""
    return adjustment_of("self")


def adjustment_of(process: int | str) -> int:
    """OSError: it is gone."""
    return int((_PROC / str(process) / "oom_score_adj").read_text())


def set_adjustment(process: int | str, adjustment: int) -> None:
    """Where the kernel refuses, or it is gone, nothing is changed."""
    with contextlib.suppress(OSError):
        (_PROC / str(process) / "oom_score_adj").write_text(str(adjustment))


def killed_by(number: int) -> str:
    """How a process ended, for a sentence that begins with it. `number`: the signal's."""
    hint = f" ({WHO_KNOWS})" if number == signal.SIGKILL else ""
    return f"was killed by signal {number}{hint}"


def unstarted(error: OSError) -> str:
    """Why a program can't be started, for the end of a sentence. fork(2), clone(2): EAGAIN."""
    return OF_TASKS if error.errno == errno.EAGAIN else str(error)
