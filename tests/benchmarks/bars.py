"""What the figures are held against: the bars of issues 2, 3 and 5.

Pure. A bar is held, not held, or not measured. It compares medians within one run of the
benchmark: ratios, never absolute seconds of another machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from tests.benchmarks.cases import select
from tests.benchmarks.results import DrainFigures, Run, median, worst

Runs = Mapping[tuple[str, str], Sequence[Run]]

HELD: Final = "held"
NOT_HELD: Final = "not held"
NOT_MEASURED: Final = "not measured"


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """One bar's outcome."""

    name: str
    value: float | None
    limit: float
    at_least: bool = False
    """The value must reach the limit rather than stay under it."""
    note: str = ""

    @property
    def outcome(self) -> str:
        if self.value is None:
            return NOT_MEASURED
        good = self.value >= self.limit if self.at_least else self.value <= self.limit
        return HELD if good else NOT_HELD


def _ratio(left: float | None, right: float | None) -> float | None:
    return None if left is None or not right else left / right


class _Figures:
    """Medians of completed runs, by case and engine."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    def of(self, case: str, engine: str) -> list[Run]:
        return [run for run in self._runs.get((case, engine), ()) if run.completed]

    def all(self, case: str, engine: str) -> Sequence[Run]:
        return self._runs.get((case, engine), ())

    def blackout(self, case: str, engine: str) -> float | None:
        return median(run.blackout_ms for run in self.of(case, engine))

    def total(self, case: str, engine: str) -> float | None:
        return median(run.total_s for run in self.of(case, engine))

    def transfer(self, case: str, engine: str) -> float | None:
        return median(run.transfer_s for run in self.of(case, engine))


def judge(runs: Runs) -> list[Bar]:
    """Every bar of the two issues that a benchmark can measure."""
    figures = _Figures(runs)
    found: list[Bar] = []
    for case in ("1", "1-noise", "1-10g", "2", "2-noise", "2-capped", "3", "3-10g"):
        found += _everyday(figures, case)
    found += _never_converging(figures)
    found += _bytes(figures)
    found += _raw_speed(figures)
    found += _slowdown(figures)
    found += _demo(figures)
    found += _drain(figures)
    return [*found, _loop(runs)]


def _everyday(figures: _Figures, case: str) -> list[Bar]:
    tuned = "qemu-10ms"
    blackout = figures.blackout(case, "ferry")
    longest = worst(run.blackout_ms for run in figures.of(case, "ferry"))
    total = figures.total(case, "ferry")
    bars = [
        Bar(
            name=f"case {case}: blackout / QEMU's tuned to 10 ms",
            value=_ratio(blackout, figures.blackout(case, tuned)),
            limit=1.0,
        ),
        Bar(
            name=f"case {case}: worst blackout / (2 x median + 10 ms)",
            value=None if blackout is None else _ratio(longest, 2 * blackout + 10),
            limit=1.0,
            note=f"{len(figures.of(case, 'ferry'))} runs",
        ),
        Bar(
            name=f"case {case}: total / QEMU's tuned to 10 ms",
            value=_ratio(total, figures.total(case, tuned)),
            limit=0.6,
        ),
        Bar(
            name=f"case {case}: total / multifd's",
            value=_ratio(total, figures.total(case, "qemu-multifd")),
            limit=1.0,
        ),
        Bar(
            name=f"case {case}: total / multifd's with zstd",
            value=_ratio(total, figures.total(case, "qemu-zstd")),
            limit=1.0,
            note="stricter than the bar",
        ),
        Bar(
            name=f"case {case}: total of `ferry migrate` / of `virsh migrate`",
            value=_ratio(figures.total(case, "ferry-command"), figures.total(case, "libvirt")),
            limit=0.5,
        ),
        Bar(
            name=f"case {case}: total / QEMU's at its defaults (issue 2)",
            value=_ratio(total, figures.total(case, "qemu-300ms")),
            limit=1.0,
        ),
        Bar(
            name=f"case {case}: total / QEMU's tuned, its destination started beforehand",
            value=_ratio(total, figures.transfer(case, tuned)),
            limit=0.6,
            note="stricter than the bar",
        ),
    ]
    if case.startswith("2"):
        share = median(run.line_rate_share for run in figures.of(case, "ferry"))
        name = f"case {case}: share of the line's rate in the full-speed pass"
        bars.append(Bar(name=name, value=share, limit=0.95, at_least=True))
    return bars


def _never_converging(figures: _Figures) -> list[Bar]:
    bars: list[Bar] = []
    for case in ("4", "5-50", "5-100", "5-200", "5-200-packed"):
        tried, done = figures.all(case, "ferry-hybrid"), figures.of(case, "ferry-hybrid")
        share = len(done) / len(tried) if tried else None
        blackout = worst(run.blackout_ms for run in done)
        link = select(case)[0].link_bytes_per_s
        least_s = median(run.in_use_bytes / link for run in done if run.in_use_bytes)
        worked = median(_ratio(run.work_during, run.work_before) for run in done)
        bars += [
            Bar(name=f"case {case}: hybrid ends", value=share, limit=1.0, at_least=True),
            Bar(name=f"case {case}: hybrid's worst blackout, ms", value=blackout, limit=30.0),
            Bar(
                name=f"case {case}: hybrid's total / (memory in use / link)",
                value=_ratio(figures.total(case, "ferry-hybrid"), least_s),
                limit=1.3,
            ),
            Bar(
                name=f"case {case}: the guest's work in post-copy / before",
                value=worked,
                limit=0.5,
                at_least=True,
            ),
        ]
    return bars


def _bytes(figures: _Figures) -> list[Bar]:
    bars: list[Bar] = []
    for case in ("1", "2", "3", "6-4GiB", "6-8GiB"):
        needed = median(
            _ratio(run.uncompressed_bytes, run.in_use_bytes + (run.dirtied_bytes or 0))
            for run in figures.of(case, "ferry")
            if run.in_use_bytes
        )
        name = f"case {case}: bytes before compression / (in use + dirtied between scans)"
        bars.append(Bar(name=name, value=needed, limit=1.02))
    for case in ("6-4GiB", "6-8GiB"):
        runs = figures.of(case, "ferry")
        in_use = median(run.in_use_bytes for run in runs)
        bars.append(
            Bar(
                name=f"case {case}: bytes sent / in use",
                value=_ratio(median(run.bytes_sent for run in runs), in_use),
                limit=1.05,
            )
        )
    return bars


def _raw_speed(figures: _Figures) -> list[Bar]:
    def rate(engine: str) -> float | None:
        runs = figures.of("7", engine)
        return median(_ratio(run.bytes_sent, run.transfer_s) for run in runs)

    plain = rate("ferry")
    return [
        Bar(
            name="case 7: rate of one stream / a plain copy's",
            value=_ratio(plain, rate("plain-copy")),
            limit=0.8,
            at_least=True,
        ),
        Bar(
            name="case 7: the same, both into prefaulted memory",
            value=_ratio(rate("ferry-prefaulted"), rate("plain-copy")),
            limit=0.8,
            at_least=True,
            note="easier than the bar",
        ),
        Bar(
            name="case 7: the same, both into memory that nobody touched",
            value=_ratio(plain, rate("plain-copy-cold")),
            limit=0.8,
            at_least=True,
            note="easier than the bar",
        ),
        Bar(
            name="case 7: rate by TLS / in the clear",
            value=_ratio(rate("ferry-tls"), plain),
            limit=0.6,
            at_least=True,
        ),
    ]


def _slowdown(figures: _Figures) -> list[Bar]:
    runs = figures.of("slow", "ferry")
    during = median(_ratio(run.work_during, run.work_before) for run in runs)
    after = median(_ratio(run.work_after, run.work_before) for run in runs)
    return [
        Bar(
            name="the guest's work in pre-copy / before",
            value=during,
            limit=0.85,
            at_least=True,
            note="2,000 pages/s dirtied",
        ),
        Bar(
            name="the guest's work after a cancelled pre-copy / before",
            value=after,
            limit=0.95,
            at_least=True,
        ),
    ]


def _demo(figures: _Figures) -> list[Bar]:
    runs = figures.of("demo", "ferry")
    blackout = median(run.blackout_ms for run in runs)
    total = _ratio(figures.total("demo", "ferry"), figures.total("demo", "qemu-300ms"))
    return [
        Bar(name="issue 2: median blackout, ms", value=blackout, limit=25.0),
        Bar(
            name="issue 2: worst blackout, ms",
            value=worst(run.blackout_ms for run in runs),
            limit=100.0,
            note=f"{len(runs)} runs",
        ),
        Bar(name="issue 2: total / QEMU's own, single stream", value=total, limit=1.0),
    ]


def _planned(case: str, runs: Sequence[DrainFigures]) -> Bar:
    trips = [trip for run in runs for trip in run.trips]
    off = ", ".join(f"{trip.operation} {trip.off:.2f}" for trip in trips)
    return Bar(
        name=f"{case}: |time - planned| / planned, the worst way there or back",
        value=worst(trip.off for trip in trips),
        limit=0.15,
        note=off,
    )


def _drain(figures: _Figures) -> list[Bar]:
    runs = [run.drain for run in figures.of("drain", "ferry") if run.drain is not None]
    fast = [run.drain for run in figures.of("drain-unshaped", "ferry") if run.drain is not None]
    ratios = [move.blackout_ratio for run in runs for move in run.moves]
    errors = [run.client_errors for run in runs]
    plans = figures.of("plan", "ferry")
    return [
        Bar(
            name="drain: time / (1.15 x bytes to move / link + 3 s)",
            value=worst(run.actual_s / (1.15 * run.link_s + 3.0) for run in runs),
            limit=1.0,
        ),
        _planned("drain", runs),
        _planned("drain-unshaped", fast),
        Bar(
            name="drain: a guest's blackout / when it moves alone, the worst",
            value=worst(ratios),
            limit=1.5,
            note=f"median {median(ratios) or 0.0:.2f} of {len(ratios)}",
        ),
        Bar(
            name="drain: errors of clients behind HAProxy",
            value=worst(errors),
            limit=0.0,
            note=f"of {sum(run.requests for run in runs)} requests",
        ),
        Bar(
            name="plan: 20 of 1,000 nodes, s", value=worst(run.total_s for run in plans), limit=5.0
        ),
        Bar(
            name="plan: time planned / lower bound",
            value=worst(run.plan_over_bound for run in plans),
            limit=1.1,
        ),
    ]


def _loop(runs: Runs) -> Bar:
    blocked = worst(run.loop_blocked_ms for each in runs.values() for run in each)
    return Bar(name="issue 2: the agents' event loop blocked, ms", value=blocked, limit=50.0)
