"""What the CLI prints: tables for people, JSON for programs, sizes both ways.

The options `--api`, `--context`, `--lab` and `--json` may stand anywhere on the command line;
`main` takes them out and puts them into `settings`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from node_agent.cli.client import ApiClient, find_address
from node_agent.cli.errors import CliError, ExitCode

_UNITS: Final = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_SIZE: Final = re.compile(r"^(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?$", re.IGNORECASE)


@dataclasses.dataclass(slots=True)
class Settings:
    """The options that every command shares."""

    api: str | None = None
    lab: str | None = None
    context: str | None = None
    json: bool = False

    def client(self) -> ApiClient:
        """The agent that those options, the environment, or the current context choose."""
        if self.api is None and self.lab is None:
            variables = {"FERRY_API", "FERRY_LAB"} & os.environ.keys()
            name = self.context or (None if variables else os.environ.get("FERRY_CONTEXT"))
            if name is not None or not variables:
                from node_agent.cli.context_file import chosen

                context = chosen(name)
                if context is not None:
                    return context.client()
        return ApiClient(find_address(self.api, self.lab))


_PARTS: Final = re.compile(r"([^0-9]*)([0-9]*)", re.ASCII)

settings: Final = Settings()


def show(value: object, text: str) -> None:
    """`value` as JSON with `--json`, else `text`."""
    print(
        msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
        if settings.json
        else text
    )


def note(text: str) -> None:
    """For people only: to stderr with `--json`."""
    print(text, file=sys.stderr if settings.json else sys.stdout, flush=True)


def aside(text: str) -> None:
    """For people only, where stdout is one value that a script takes as it is: to stderr."""
    print(text, file=sys.stderr, flush=True)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be; nothing but the headings where there are no rows."""
    lines = [tuple(headings), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def by_number(name: str) -> tuple[tuple[str, int], ...]:
    """A key to sort names by, for people: n2 before n10."""
    return tuple((text, int(digits or -1)) for text, digits in _PARTS.findall(name))


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """`name:  value` lines; empty values are left out."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0) + 2
    return "\n".join(f"{name + ':':<{width}} {value}" for name, value in shown)


def parse_size(text: str, what: str) -> int:
    """Bytes of "512M", "1.5G", "4096". CliError (usage) otherwise, which names the option."""
    matched = _SIZE.match(text.strip())
    if matched is None:
        raise CliError(f"{what}: {text} is not a size: 4096, 512M, 1.5G", ExitCode.USAGE)
    return int(float(matched[1]) * _UNITS[matched[2].upper()])


def size(count: float | None) -> str:
    """1536 -> "1.5 KiB"; None -> "-"."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def moment(at_s: float) -> str:
    """Local date and time, to the millisecond."""
    whole = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s))
    return f"{whole}.{int(at_s % 1 * 1000):03d}"
