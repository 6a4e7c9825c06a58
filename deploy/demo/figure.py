"""The demo's picture: what the client received over time, with the migrations marked.

After the figure of the classic web-server relocation (Clark et al., "Live Migration of Virtual
Machines", NSDI 2005): throughput over time, the pre-copy as a span, the blackout named. Below it
the waits for the packets of each millisecond and the durations of short requests, on a
logarithmic scale; to the right of both, enlarged, the migration with the longest gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from deploy.demo.observations import SAMPLE_S, Sample
from deploy.demo.report import ClientSide, blackout_window, longest_gap_ms, windows
from migrator.errors import FerryError
from migrator.model import Migration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

WIDTH_INCHES: Final = 13.0
HEIGHT_INCHES: Final = 7.5
DOTS_PER_INCH: Final = 110
_STREAM: Final = "#1f5fa8"
_SPAN: Final = "#f3d9a8"
_BLACKOUT: Final = "#c62828"
_GAP: Final = "#5b4b8a"
_REQUEST: Final = "#2e8b57"
_ZOOM_MARGIN_S: Final = 0.5


def draw(path: Path, title: str, migrations: Sequence[Migration], side: ClientSide) -> None:
    """Write the PNG. Raises FerryError if there is nothing to draw or it can't be written."""
    if not side.samples:
        raise FerryError("there is nothing to draw: the client has seen nothing")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 4)
    origin_s = side.samples[0].at_s
    throughput, waits = _column(figure, grid[0, :3])
    _draw_throughput(throughput, side.samples, origin_s)
    _draw_waits(waits, side, origin_s)
    _mark(throughput, migrations, origin_s, label=True)
    _mark(waits, migrations, origin_s, label=False)
    throughput.set_title(
        f"One TCP download, each {SAMPLE_S * 1e3:.0f} ms. Shaded: a migration; red: its blackout",
        fontsize="medium",
    )
    throughput.set_ylabel("MB/s")
    waits.set_ylabel("ms")
    waits.set_xlabel("seconds")
    waits.legend(loc="upper right", fontsize="small", ncols=3)
    if migrations:
        _draw_enlarged(_column(figure, grid[0, 3]), migrations, side, origin_s)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=DOTS_PER_INCH, format="png")
    except OSError as error:
        raise FerryError(f"the picture {path} can't be written: {error.strerror}") from error


def _column(figure: Figure, place: SubplotSpec) -> tuple[Axes, Axes]:
    """Two panels above each other, with the same times."""
    rows = place.subgridspec(2, 1, height_ratios=(3, 2))
    upper = figure.add_subplot(rows[0])
    lower = figure.add_subplot(rows[1], sharex=upper)
    upper.tick_params(labelbottom=False)
    return upper, lower


def _draw_throughput(axes: Axes, samples: Sequence[Sample], origin_s: float) -> None:
    starts = [each.at_s - origin_s for each in samples]
    rates = [each.stream_bytes / SAMPLE_S / 1e6 for each in samples]
    axes.fill_between(starts, rates, step="post", color=_STREAM, alpha=0.15, linewidth=0)
    axes.step(starts, rates, where="post", color=_STREAM, linewidth=1.0)
    # What was held up arrives in one sample: such a peak may be cut off.
    usual = sorted(rates)[int(len(rates) * 0.98)]
    axes.set_ylim(0, max(0.1, usual) * 1.6)
    axes.set_xlim(0, starts[-1] + SAMPLE_S)
    axes.grid(axis="y", alpha=0.3)


def _mark(axes: Axes, migrations: Sequence[Migration], origin_s: float, *, label: bool) -> None:
    """A span for each migration, a line for its blackout."""
    for number, migration in enumerate(migrations):
        begun_s = migration.created_at_s - origin_s
        ended_s = (migration.ended_at_s or migration.created_at_s) - origin_s
        axes.axvspan(begun_s, ended_s, color=_SPAN, alpha=0.8, linewidth=0, zorder=0)
        dark = blackout_window(migration)
        if dark is not None:
            axes.axvspan(
                dark.from_s - origin_s, dark.to_s - origin_s, color=_BLACKOUT, alpha=0.8, lw=0.8
            )
        if label:
            # Neighbours at different heights: the labels of short migrations would touch.
            height = 0.99 if number % 2 == 0 else 0.87
            axes.text(
                (begun_s + ended_s) / 2,
                height,
                _label(migration),
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize="small",
                bbox={"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.75},
            )


def _label(migration: Migration) -> str:
    dark = "" if migration.blackout_ms is None else f"\nblackout {migration.blackout_ms:.0f} ms"
    return f"{migration.source} → {migration.destination}{dark}"


def _draw_waits(axes: Axes, side: ClientSide, origin_s: float) -> None:
    gaps = [each for each in side.samples if each.longest_gap_ms > 0]
    axes.plot(
        [each.gap_ended_at_s - origin_s for each in gaps],
        [each.longest_gap_ms for each in gaps],
        ".",
        color=_GAP,
        markersize=4,
        label=f"longest wait for a packet (one is sent each ms), each {SAMPLE_S * 1e3:.0f} ms",
    )
    answered = [each for each in side.requests if each.error is None]
    axes.plot(
        [each.at_s - origin_s for each in answered],
        [each.seconds * 1e3 for each in answered],
        "x",
        color=_REQUEST,
        markersize=4,
        label="a short HTTP request",
    )
    failed = [each.at_s - origin_s for each in side.requests if each.error is not None]
    if failed:
        style: dict[str, Any] = {"color": _BLACKOUT, "marker": "X", "linestyle": "none"}
        axes.plot(failed, [1.0] * len(failed), label="a request that failed", **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.5), max(high, 100.0) * 3)
    axes.grid(axis="y", alpha=0.3)


def _draw_enlarged(
    column: tuple[Axes, Axes], migrations: Sequence[Migration], side: ClientSide, origin_s: float
) -> None:
    """The migration with the longest gap, from shortly before to shortly after it."""
    spans = windows(migrations)
    gaps = [longest_gap_ms(side.samples, span) for span in spans]
    worst = gaps.index(max(gaps))
    migration = migrations[worst]
    throughput, waits = column
    _draw_throughput(throughput, side.samples, origin_s)
    _draw_waits(waits, side, origin_s)
    for axes in column:
        _mark(axes, [migration], origin_s, label=False)
    throughput.set_title(
        f"{migration.source} → {migration.destination}: {len(migration.iterations)} iterations,\n"
        f"longest gap {gaps[worst]:.0f} ms",
        fontsize="medium",
    )
    waits.set_xlim(
        migration.created_at_s - _ZOOM_MARGIN_S - origin_s,
        (migration.ended_at_s or migration.created_at_s) + _ZOOM_MARGIN_S - origin_s,
    )
    waits.set_xlabel("seconds")
