"""One line of the log for one record, whatever names and texts of others stand in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from migrator.errors import StoreError

TOLD_AGAIN_S: Final = 60.0
_NOT_ACCEPTED: Final = "socket.accept() out of system resource"
"""What asyncio's record of it begins with."""
_TOLD_OF_THAT: Final = "connections to this process wait, as none can be accepted now"


class LogLines(logging.Formatter):
    """Nobody who may put a text into the log can write lines of their own, or to a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return one_line(super().formatMessage(record))


class FewerRepeats(logging.Filter):
    """What goes wrong again and again is told once a minute.

    A store that is away: each part that needs it tries again every few seconds, and says why not.
    What differs by more than the reason, another domain say, is told all the same.

    A process without a descriptor, or memory, for one more connection: asyncio tries again each
    second, and says so with a traceback, some versions of it a hundred times.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._monotonic = monotonic
        self._told_at_s: dict[tuple[object, ...], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args if isinstance(record.args, tuple) else ()
        if record.name == "asyncio" and str(record.msg).startswith(_NOT_ACCEPTED):
            error = record.exc_info[1] if record.exc_info else None
            record.msg, record.args, args = "%s: %s", (_TOLD_OF_THAT, error), ()
            record.exc_info = record.exc_text = None
        elif not any(isinstance(each, StoreError) for each in args):
            return True
        now_s = self._monotonic()
        self._told_at_s = {
            what: at_s for what, at_s in self._told_at_s.items() if now_s - at_s < TOLD_AGAIN_S
        }
        what = (record.name, record.msg, *(each for each in args if isinstance(each, str)))
        new = what not in self._told_at_s
        if new:
            self._told_at_s[what] = now_s
        return new


def one_line(text: str) -> str:
    r"""The text with every line break and control character as an escape: \n, \x1b, \u2028."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii")
        for each in text
    )
