"""The network's figures as rows: printed as they are found, and written beside build/bench.json."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

import msgspec

from tests.benchmarks.bars import HELD, NOT_HELD, NOT_MEASURED

FILE = "bench-network.json"


class Judged(StrEnum):
    """What is held against the limit."""

    MEDIAN = "median"
    WORST = "worst"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of a fabric, of each move; the name says in what."""

    fabric: str
    name: str
    values: tuple[float, ...]
    expected: int = 0
    """How many values there have to be; 0: any number."""
    limit: float | None = None
    """None: no bar is set for it."""
    judged: Judged = Judged.MEDIAN
    note: str = ""

    @property
    def outcome(self) -> str:
        """By the limit; where a move has no value, whatever was to happen didn't: not held."""
        if self.limit is None:
            return ""
        if not self.values and not self.expected:
            return NOT_MEASURED
        if len(self.values) < self.expected:
            return NOT_HELD
        return HELD if self._of(self.judged) <= self.limit else NOT_HELD

    @property
    def text(self) -> str:
        """One line for people."""
        measured = "none"
        if self.values:
            measured = f"{self._of(Judged.MEDIAN):.2f} (worst {self._of(Judged.WORST):.2f})"
        if len(self.values) < self.expected:
            measured += f", {len(self.values)} of {self.expected}"
        bar = "" if self.limit is None else f"{self.judged} {self.limit:g}: {self.outcome}"
        return f"{self.name:52} {self.note or measured:42} {bar}".rstrip()

    def _of(self, judged: Judged) -> float:
        return statistics.median(self.values) if judged is Judged.MEDIAN else max(self.values)


class Rows:
    """Those of one run; of the fabric that `begin` named last."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._fabric = ""
        self._rows: list[Row] = []

    def begin(self, fabric: str) -> None:
        print(f"--- {fabric}", flush=True)
        self._fabric = fabric

    def add(
        self,
        name: str,
        values: Iterable[float | None],
        limit: float | None = None,
        judged: Judged = Judged.MEDIAN,
        *,
        expected: int = 0,
        note: str = "",
    ) -> None:
        """Print and keep one; the file is whole after each. `values`: of each move that has one."""
        known = tuple(value for value in values if value is not None)
        row = Row(
            fabric=self._fabric,
            name=name,
            values=known,
            expected=expected,
            limit=limit,
            judged=judged,
            note=note,
        )
        print(row.text, flush=True)
        self._rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(list(map(_told, self._rows)))))
        partial.replace(self.path)


def _told(row: Row) -> dict[str, object]:
    return {
        "fabric": row.fabric,
        "name": row.name,
        "moves": len(row.values),
        "median": statistics.median(row.values) if row.values else None,
        "worst": max(row.values, default=None),
        "limit": row.limit,
        "judged": row.judged,
        "outcome": row.outcome or None,
        "note": row.note,
    }
