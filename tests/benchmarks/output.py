"""build/bench.json, the table, the plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from node_agent.cli.output import table
from tests.benchmarks.bars import Bar
from tests.benchmarks.results import CaseResult, Run, median, summarise

Runs = Mapping[tuple[str, str], Sequence[Run]]

RUNS_FILE: Final = "bench-runs.json"

_HEADINGS: Final = (
    "case",
    "engine",
    "done",
    "blackout",
    "worst",
    "client gap",
    "total",
    "transfer",
    "sent",
    "line",
)


def _figure(value: float | None, unit: str, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f} {unit}"


def say_run(where: str, case: str, engine: str, run: Run) -> None:
    """One line as it happens."""
    if not run.completed:
        what = f"not completed: {run.error}"
    elif (drain := run.drain) is not None:
        trips = ", ".join(
            f"{each.operation} {each.actual_s:.2f} s ({each.planned_s:.2f})" for each in drain.trips
        )
        what = (
            f"{drain.domains} guests (planned), {drain.parallel} at once: {trips}; worst blackout "
            f"{_figure(run.blackout_ms, 'ms')}, {drain.client_errors} errors of {drain.requests}"
        )
    elif run.blackout_ms is not None:
        what = (
            f"blackout {_figure(run.blackout_ms, 'ms')}, client gap "
            f"{_figure(run.client_gap_ms, 'ms')} ({_figure(run.client_before_ms, 'before')}, "
            f"{_figure(run.client_after_ms, 'after')}), total {_figure(run.total_s, 's', 2)}, "
            f"{run.bytes_sent / 2**20:.0f} MiB"
        )
        if run.compressors and run.uncompressed_bytes:
            ratio = run.uncompressed_bytes / run.bytes_sent
            what += f" ({ratio:.2f} by {', '.join(run.compressors)})"
    elif run.bytes_sent and run.transfer_s:
        what = f"{run.bytes_sent / run.transfer_s / 1e9:.2f} GB/s"
    else:
        what = f"total {_figure(run.total_s, 's', 2)}"
    if run.work_before and run.work_during is not None:
        what += f", the guest's work at {run.work_during / run.work_before:.0%}"
    if run.work_before and run.work_after is not None:
        what += f", {run.work_after / run.work_before:.0%} afterwards"
    print(f"{where} case {case:8} {engine:13} {what}", flush=True)


def write(folder: Path, runs: Runs, bars: Sequence[Bar]) -> None:
    """The two files, whole, after each case: an interrupted run has what it measured."""
    rows = [summarise(case, engine, each) for (case, engine), each in runs.items()]
    ratios = {
        bar.name: {
            "value": None if bar.value is None else round(bar.value, 3),
            "limit": bar.limit,
            "outcome": bar.outcome,
        }
        for bar in bars
    }
    _write(folder / "bench.json", {"cases": rows, "ratios": ratios})
    details = {f"{case} {engine}": list(each) for (case, engine), each in runs.items()}
    _write(folder / RUNS_FILE, details)


def read(folder: Path) -> dict[tuple[str, str], list[Run]]:
    """Each run that was written there; none if there are none, or of another version."""
    try:
        text = (folder / RUNS_FILE).read_bytes()
        found = msgspec.json.decode(text, type=dict[str, list[Run]])
    except (OSError, msgspec.DecodeError):
        return {}
    keys = {key: key.partition(" ") for key in found}
    return {(case, engine): found[key] for key, (case, _, engine) in keys.items()}


def _write(path: Path, value: object) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(value)))
    partial.replace(path)


def show(runs: Runs, bars: Sequence[Bar], folder: Path) -> None:
    """The table and the bars."""
    rows = [_row(summarise(*key, each), each) for key, each in runs.items()]
    print("\n" + table(_HEADINGS, rows))
    lines = [
        (
            bar.name,
            "-" if bar.value is None else f"{bar.value:.2f}",
            f"{'>=' if bar.at_least else '<='} {bar.limit:g}",
            bar.outcome,
            bar.note,
        )
        for bar in bars
        if bar.value is not None
    ]
    print("\n" + table(("bar", "value", "limit", "outcome", ""), lines))
    if len(lines) < len(bars):
        print(f"{len(bars) - len(lines)} other bars were not measured")
    print(f"\nwritten: {folder / 'bench.json'}")


def _row(result: CaseResult, runs: Sequence[Run]) -> tuple[str, ...]:
    done = [run for run in runs if run.completed]
    share = result.line_rate_share
    return (
        result.case,
        result.engine,
        f"{result.completed}/{result.repeats}",
        _figure(result.blackout_ms_median, "ms"),
        _figure(result.blackout_ms_worst, "ms"),
        _figure(median(run.client_gap_ms for run in done), "ms"),
        _figure(result.total_s_median, "s", 2),
        _figure(median(run.transfer_s for run in done), "s", 2),
        "-" if result.bytes_sent is None else f"{result.bytes_sent / 2**20:.0f} MiB",
        "-" if share is None else f"{share * 100:.0f} %",
    )
