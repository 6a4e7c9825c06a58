"""The plots of a benchmark: blackouts and totals, a group a case, a bar an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.benchmarks.results import Run, median

Runs = Mapping[tuple[str, str], Sequence[Run]]

_FIGURES: Final[Sequence[tuple[str, str, Callable[[Run], float | None]]]] = (
    ("blackout", "blackout by host clocks, ms", lambda run: run.blackout_ms),
    ("client-gap", "longest silence at the client, ms", lambda run: run.client_gap_ms),
    ("total", "from the command to its end, s", lambda run: run.total_s),
)


def draw(folder: Path, runs: Runs) -> list[Path]:
    """One PNG a figure; none, if matplotlib isn't installed. Medians as bars, runs as dots."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return []
    written: list[Path] = []
    if not runs:
        return written
    cases = list(dict.fromkeys(case for case, _ in runs))
    engines = list(dict.fromkeys(engine for _, engine in runs))
    width = 0.8 / max(len(engines), 1)
    for name, label, figure_of in _FIGURES:
        drawing, axes = pyplot.subplots(figsize=(10, 5))
        for index, engine in enumerate(engines):
            places = [place + (index + 0.5) * width - 0.4 for place in range(len(cases))]
            values = [
                [
                    value
                    for run in runs.get((case, engine), ())
                    if run.completed and (value := figure_of(run)) is not None
                ]
                for case in cases
            ]
            medians = [median(each) or 0.0 for each in values]
            axes.bar(places, medians, width, label=engine, alpha=0.7)
            for place, each in zip(places, values, strict=True):
                axes.plot([place] * len(each), each, "k.", markersize=3)
        axes.set_xticks(range(len(cases)), [f"case {case}" for case in cases])
        axes.set_ylabel(label)
        if any(figure_of(run) for each in runs.values() for run in each):
            axes.set_yscale("log")
        axes.legend(fontsize="small")
        drawing.tight_layout()
        path = folder / f"bench-{name}.png"
        drawing.savefig(path, dpi=120)
        pyplot.close(drawing)
        written.append(path)
    return written
