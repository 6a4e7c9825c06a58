"""The order of the runs, and how long they may take. Pure but for the clock that it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """One run to be made."""

    case: str
    engine: str


def turns(
    case: str, engines: Sequence[str], repeats: int, judged: str | None = None
) -> Iterator[Turn]:
    """All engines, alternating; the order is turned round with each repeat.

    `judged`: the only one that is repeated; the others take one turn. None: all are.
    """
    for repeat in range(repeats):
        takers = [name for name in engines if not repeat or judged in (None, name)]
        for name in takers if repeat % 2 == 0 else reversed(takers):
            yield Turn(case, name)


class Budget:
    """Says whether another run may begin. `total_s` bounds their beginnings, not the last one."""

    def __init__(self, total_s: float, runs: int, now_s: float) -> None:
        self._total_s = total_s
        self._runs = runs
        self._began_s = now_s
        self._done = 0

    def begin(self, now_s: float) -> bool:
        """Before each run."""
        if now_s - self._began_s >= self._total_s:
            return False
        self._done += 1
        return True

    def where(self, now_s: float) -> str:
        """For people: which run it is, and how long it has taken and may take."""
        return (
            f"[{self._done}/{self._runs}, {_minutes(now_s - self._began_s)} of at most "
            f"{_minutes(self._total_s)}]"
        )


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
