"""All tests, in several sessions, two at a time: `python -m tests.run`, which `make test` calls.

    in front   tests/integration: real guests, which mostly wait; their output is shown as it comes
    behind     all that isn't integration, at a lower priority
    beside     of tests/integration the files in BESIDE, in which processes are killed, servers
               restarted, waits waited: a session for each group of them, the next one whenever
               one of the sessions above, or before it, has ended

What the others print is shown when all have ended. Exits with the first status that isn't 0.
Ctrl-C ends all. Each session has its own mark, labs and leak check (see conftest.py). Two at a
time, because two cores have three only just: agents and guests that wait for a core for seconds
are judged as silent, as they should be.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests import interrupts

_FOLDER: Final = "tests/integration"
BESIDE: Final = [
    [f"{_FOLDER}/test_{name}.py" for name in group]
    for group in (
        ("kill_matrix",),
        ("storage_pools", "clocks"),
        ("lab", "adoption", "host_shutdown"),
        ("etcd_lab", "takeover", "demo"),
    )
]
"""A third of the time. Nothing in them is judged by how long it takes."""
IN_FRONT: Final = [
    _FOLDER,
    *(f"--ignore={path}" for path in itertools.chain.from_iterable(BESIDE)),
]
BEHIND: Final = ["tests", f"--ignore={_FOLDER}"]
_ALL: Final = ["--durations=10"]
_AT_A_TIME: Final = 2
_NICE: Final = 5
"""Of the session's group, too: where the kernel schedules by groups (autogroup), it is that alone
which counts."""
_END_S: Final = 60.0
"""An interrupted pytest may need this long to take its labs down."""


def _start(arguments: Sequence[str], output: int | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *_ALL, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,  # A terminal's Ctrl-C is for us, who pass it on once.
    )


def _lower(pid: int) -> None:
    """A wish: a kernel that refuses runs both alike."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, _NICE)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(_NICE), encoding="ascii")


def _one_has_ended(running: list[subprocess.Popen[bytes]]) -> None:
    """Waits until one has, and takes all that have off the list. They are our only children."""
    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    running[:] = [each for each in running if each.poll() is None]


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """As Ctrl-C would; by force if that takes too long."""
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + _END_S
    for process in started:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> int:
    """0: every test passed. Otherwise pytest's status, or 130 after Ctrl-C or SIGTERM."""
    interrupts.end_as_by_ctrl_c()
    started: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in (BEHIND, *BESIDE)]
        behind, *beside = outputs
        try:
            started.append(_start(IN_FRONT, None))
            started.append(_start(BEHIND, behind.fileno()))
            _lower(started[-1].pid)
            running = list(started)
            for files, output in zip(BESIDE, beside, strict=True):
                while len(running) >= _AT_A_TIME:
                    _one_has_ended(running)
                started.append(_start(files, output.fileno()))
                running.append(started[-1])
            statuses = [process.wait() for process in started]
        except KeyboardInterrupt:
            statuses = [interrupts.EXIT_STATUS]
        finally:
            _end(started)
            for output in outputs:
                output.seek(0)
                sys.stdout.buffer.write(output.read())
            sys.stdout.flush()
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
