"""Whoever measures on labs takes them down, however it is ended."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Final, NoReturn

EXIT_STATUS: Final = 130


def end_as_by_ctrl_c() -> None:
    """SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread from here on.

    One that is ignored stays so: that is what `nohup` is for.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


@contextlib.contextmanager
def interruptible(name: str) -> Iterator[None]:
    """Ends the program with one sentence and EXIT_STATUS when it is interrupted within."""
    end_as_by_ctrl_c()
    try:
        yield
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(EXIT_STATUS)


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt
