"""One line of the log for one record, whatever names and texts of others stand in it."""

from __future__ import annotations

import logging


class LogLines(logging.Formatter):
    """Nobody who may put a text into the log can write lines of their own, or to a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return one_line(super().formatMessage(record))


def one_line(text: str) -> str:
    r"""The text with every line break and control character as an escape: \n, \x1b, \u2028."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii")
        for each in text
    )
