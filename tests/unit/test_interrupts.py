"""Programs that measure on labs: a kill takes down what they made, as Ctrl-C does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interrupts import EXIT_STATUS

_WORK = """
import signal, sys, time
from tests.interrupts import interruptible
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # These tests may run under nohup.
for number in sys.argv[1:]:
    signal.signal(int(number), signal.SIG_IGN)
with interruptible("work"):
    try:
        print("made", flush=True)
        time.sleep(30)
    finally:
        print("taken down", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_what_was_made_is_taken_down(number: signal.Signals) -> None:
    status, out, err = _signalled(number)
    assert (status, out, err) == (EXIT_STATUS, "taken down\n", "work: interrupted\n")


def test_what_is_told_to_outlive_its_terminal_does() -> None:
    status, out, _ = _signalled(signal.SIGHUP, signal.SIGTERM, ignored=signal.SIGHUP)
    assert (status, out) == (EXIT_STATUS, "taken down\n")


def _signalled(
    *numbers: signal.Signals, ignored: signal.Signals | None = None
) -> tuple[int, str, str]:
    """(exit status, what it printed since it was up, its errors)."""
    arguments = [] if ignored is None else [str(ignored.value)]
    with subprocess.Popen(
        [sys.executable, "-c", _WORK, *arguments],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "made\n"
            for number in numbers:
                os.kill(process.pid, number)
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    return process.returncode, out, err
