"""What `ferry demo` prints: a story for people, colours and a table on a terminal, plain elsewhere.

With `--json` the story goes to stderr, and stdout has one line: the result.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from deploy.demo.report import DemoResult, MigrationResult
from node_agent.cli.output import size, table

_HEADINGS: Final = (
    "migration",
    "iterations",
    "sent",
    "total",
    "blackout",
    "longest gap",
    "lost packets",
)
_FRAMES_PER_S: Final = 5
"""Of the spinner: the machine has better things to do."""
_WHERE: Final = (
    "blackout: by the hosts' clocks; gap and lost packets: at the client, so with the time that an "
    "emulated guest needs to get going again"
)


class Screen:
    """Where the demo speaks. `as_json`: the story to stderr."""

    def __init__(self, *, as_json: bool) -> None:
        self._json = as_json
        stream = sys.stderr if as_json else sys.stdout
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)

    @property
    def _terminal(self) -> bool:
        return self._console.is_terminal

    def say(self, text: str = "", style: str = "") -> None:
        """A paragraph. Wrapped by the terminal, where there is one."""
        self._console.print(text, style=style, soft_wrap=not self._terminal)
        self._console.file.flush()

    def heading(self, text: str) -> None:
        """What happens next."""
        self.say()
        self.say(text, style="bold")

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Something that takes its time: a spinner on a terminal, a line elsewhere."""
        if self._terminal:
            with self._console.status(text, refresh_per_second=_FRAMES_PER_S):
                yield
        else:
            self.say(f"{text} ...")
            yield

    def summary(self, migrations: Sequence[MigrationResult]) -> None:
        """The table."""
        rows = [_row(each) for each in migrations]
        if not self._terminal:
            self.say(table(_HEADINGS, rows))
            self.say(f"({_WHERE})")
            return
        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=_WHERE)
        for heading in _HEADINGS:
            side: Literal["left", "right"] = "left" if heading == "migration" else "right"
            # Only headings of two words may be broken.
            drawn.add_column(heading, justify=side, no_wrap=" " not in heading)
        for row in rows:
            drawn.add_row(*row)
        self._console.print(drawn)

    def result(self, result: DemoResult) -> None:
        """The last line, for programs."""
        if self._json:
            print(msgspec.json.encode(result).decode(), flush=True)


def milliseconds(value: float | None) -> str:
    """7.25 -> "7.2 ms", None -> "-"."""
    return "-" if value is None else f"{value:.1f} ms"


def _row(each: MigrationResult) -> tuple[str, ...]:
    return (
        f"{each.source} -> {each.destination}",
        str(each.iterations),
        size(each.bytes_sent),
        f"{each.total_s:.2f} s",
        milliseconds(each.blackout_ms),
        milliseconds(each.client_longest_gap_ms),
        str(each.packets_lost),
    )
