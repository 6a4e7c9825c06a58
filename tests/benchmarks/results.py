"""One run's figures, and what many runs come to. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from migrator.model import PassReport

BEFORE_S: Final = 0.02
AFTER_S: Final = 0.3
"""Around the blackout, where the client's longest silence is looked for."""


class MoveFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One guest of a drain: as planned, as it went, and what it had when it moved alone."""

    domain: str
    planned_start_s: float
    planned_s: float
    started_s: float
    took_s: float
    """By the drain's clock; `total_s` by the migration's own."""
    total_s: float
    begin_s: float
    """From the drain's decision to the migration's creation."""
    seen_s: float
    """From the migration's end to the drain's notice."""
    setup_s: float
    leave_s: float
    passes_s: tuple[float, ...]
    blackout_ms: float
    alone_ms: tuple[float, ...]
    """Its blackouts."""
    alone_total_s: tuple[float, ...]
    parts: tuple[tuple[str, float], ...]
    """Its timeline, seconds."""

    @property
    def blackout_ratio(self) -> float | None:
        """To the mean of what it had alone."""
        alone = sum(self.alone_ms)
        return self.blackout_ms * len(self.alone_ms) / alone if alone else None


class TripFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A drain, or the way home after it: the plan beside what became of it."""

    operation: str
    parallel: int
    planned_s: float
    actual_s: float

    @property
    def off(self) -> float:
        """How far off the plan was, as a share of it."""
        return abs(self.actual_s - self.planned_s) / self.planned_s


class DrainFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A node that was emptied."""

    domains: int
    parallel: int
    planned_s: float
    actual_s: float
    link_s: float
    """What had to be moved / the link's speed."""
    moves: tuple[MoveFigures, ...]
    client_errors: int
    requests: int
    trips: tuple[TripFigures, ...]
    """In their order: there and back, and again with what the nodes have learnt."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One migration, as its engine, the host's clocks and the client saw it."""

    completed: bool
    error: str | None = None
    blackout_ms: float | None = None
    """Host clocks: the source's vCPUs stop until the destination's run."""
    total_s: float | None = None
    """From the user's command to its end, the start of the destination's process included."""
    transfer_s: float | None = None
    """Without the destination's start: from the first byte to the end, or QEMU's own command."""
    bytes_sent: int = 0
    line_rate_share: float | None = None
    """Of the link, or of the migration's cap, on the wire, in the full-speed pass."""
    stopped_at_s: float | None = None
    """Wall clock; when the guest's vCPUs stopped."""
    client_gap_ms: float | None = None
    """The longest silence at the client around the blackout."""
    client_before_ms: float | None = None
    """How long before the vCPUs stopped that silence began."""
    client_after_ms: float | None = None
    """How long after the vCPUs ran again it ended."""
    corruptions: int | None = None
    timeline: tuple[tuple[str, float], ...] = ()
    """Where the blackout went: (part, ms)."""
    passes: tuple[PassReport, ...] = ()
    """Ferry's own, as the migration reports them."""
    in_use_bytes: int | None = None
    dirtied_bytes: int | None = None
    """What was found dirty by the scans between the passes."""
    uncompressed_bytes: int | None = None
    """What would have been sent without compression."""
    compressors: tuple[str, ...] = ()
    """What compressed the first pass: that of the most pages first."""
    post_copy_at_s: tuple[float, float] | None = None
    """Wall clock; from the guest's resumption to the last page."""
    work_before: float | None = None
    """The guest's own work, pages a second, before the migration: the median."""
    work_during: float | None = None
    """In post-copy; where the slowdown is measured, in pre-copy."""
    work_after: float | None = None
    loop_blocked_ms: float | None = None
    """The longest block of an agent's event loop."""
    drain: DrainFigures | None = None
    plan_over_bound: float | None = None
    """How much longer a plan is than its lower bound, a factor."""
    load_average: float | None = None
    """The machine's, of the last minute: what else was going on."""


class CaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """A row of build/bench.json."""

    case: str
    engine: str
    repeats: int
    blackout_ms_median: float | None
    blackout_ms_worst: float | None
    total_s_median: float | None
    bytes_sent: int | None
    line_rate_share: float | None
    completed: int


def median(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def worst(values: Iterable[float | None]) -> float | None:
    """The greatest of those that are known."""
    return max((value for value in values if value is not None), default=None)


def summarise(case: str, engine: str, runs: Sequence[Run]) -> CaseResult:
    """Figures are of the runs that completed."""
    done = [run for run in runs if run.completed]
    sent = median(run.bytes_sent for run in done)
    return CaseResult(
        case=case,
        engine=engine,
        repeats=len(runs),
        blackout_ms_median=_rounded(median(run.blackout_ms for run in done), 2),
        blackout_ms_worst=_rounded(worst(run.blackout_ms for run in done), 2),
        total_s_median=_rounded(median(run.total_s for run in done), 3),
        bytes_sent=None if sent is None else int(sent),
        line_rate_share=_rounded(median(run.line_rate_share for run in done), 3),
        completed=len(done),
    )


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def longest_gap_s(
    arrivals_ns: Sequence[int], from_s: float, to_s: float
) -> tuple[float, float] | None:
    """The two ends (wall clock) of the longest silence that touches the time between the two."""
    first_ns, last_ns = int(from_s * 1e9), int(to_s * 1e9)
    gaps = [
        (after - before, before, after)
        for before, after in itertools.pairwise(arrivals_ns)
        if after >= first_ns and before <= last_ns
    ]
    if not gaps:
        return None
    _, before_ns, after_ns = max(gaps)
    return before_ns / 1e9, after_ns / 1e9


def work_rate(
    at_ns: Sequence[int], work: Sequence[int], from_s: float, to_s: float
) -> float | None:
    """Pages a second between these moments (wall clock): the median of what lies between two looks.

    A look that only its neighbour lies in reach of counts: a short time has one at least.
    """
    rates = [
        (work[index + 1] - work[index]) / ((at_ns[index + 1] - at_ns[index]) / 1e9)
        for index in range(len(work) - 1)
        if at_ns[index + 1] > from_s * 1e9
        and at_ns[index] < to_s * 1e9
        and at_ns[index + 1] > at_ns[index]
    ]
    return median(rates)


def with_work(
    run: Run, at_ns: Sequence[int], work: Sequence[int], asked_at_s: float, settled_s: float
) -> Run:
    """The run with how fast the guest worked in the time before it, and in its post-copy."""
    before = work_rate(at_ns, work, asked_at_s - settled_s / 2, asked_at_s)
    during = None if run.post_copy_at_s is None else work_rate(at_ns, work, *run.post_copy_at_s)
    return msgspec.structs.replace(run, work_before=before, work_during=during)


def with_client(
    run: Run, arrivals_ns: Sequence[int], ended_at_s: float, corruptions: int | None
) -> Run:
    """The run with what the client saw of it, until `ended_at_s`: a guest may stay silent."""
    run = msgspec.structs.replace(run, corruptions=corruptions)
    if run.stopped_at_s is None or run.blackout_ms is None:
        return run
    resumed_at_s = run.stopped_at_s + run.blackout_ms / 1e3
    arrivals_ns = [*arrivals_ns, int(ended_at_s * 1e9)]
    gap = longest_gap_s(arrivals_ns, run.stopped_at_s - BEFORE_S, resumed_at_s + AFTER_S)
    if gap is None:
        return run
    return msgspec.structs.replace(
        run,
        client_gap_ms=(gap[1] - gap[0]) * 1e3,
        client_before_ms=(run.stopped_at_s - gap[0]) * 1e3,
        client_after_ms=(gap[1] - resumed_at_s) * 1e3,
    )
