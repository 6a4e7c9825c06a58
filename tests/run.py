"""All tests, in two sessions side by side: `python -m tests.run`, which `make test` calls.

    in front   tests/integration: real guests, which mostly wait; their output is shown as it comes
    behind     all others, at a lower priority; their output is shown when both have ended

Together they take as long as the first alone. Exits with the first status that isn't 0. Ctrl-C ends
both. Each session has its own mark, labs and leak check (see conftest.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

IN_FRONT: Final = ["tests/integration"]
BEHIND: Final = ["tests", "--ignore=tests/integration"]
_AUTOGROUP_NICE: Final = "10"
"""Where the kernel schedules sessions as groups (autogroup), `nice` alone counts for nothing."""
_END_S: Final = 60.0
"""An interrupted pytest may need this long to take its labs down."""


def _start(arguments: Sequence[str], output: int | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=output is not None,
    )


def _lower(pid: int) -> None:
    """A wish: a kernel that refuses runs both alike."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, 10)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(_AUTOGROUP_NICE, encoding="ascii")


def _end(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C would; by force if that takes too long."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """0: every test passed. Otherwise pytest's status, or 130 after Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryFile() as kept:
        behind = _start(BEHIND, kept.fileno())
        _lower(behind.pid)
        front: subprocess.Popen[bytes] | None = None
        try:
            front = _start(IN_FRONT, None)
            statuses = [front.wait(), behind.wait()]
        except KeyboardInterrupt:
            statuses = [130]
        finally:
            for process in (front, behind):
                if process is not None:
                    _end(process)
            kept.seek(0)
            sys.stdout.buffer.write(kept.read())
            sys.stdout.flush()
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
