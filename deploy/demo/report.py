"""Lays what the client saw beside what the migrations say of themselves. Pure.

A migration answers for all that the client noticed from its creation until `SETTLE_S` after its
end, or until the next one was created:

    ──[created ── pre-copy ── blackout ── ended]── settle ──┤   [created ── ...
      └───────────────── its window ────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, TypeVar

import msgspec

from deploy.demo.observations import (
    SAMPLE_S,
    Duplicate,
    Farewell,
    Late,
    Loss,
    Observation,
    Reboot,
    Request,
    Sample,
    Stream,
    StreamState,
)
from deploy.guest.records import DiskReport
from migrator.model import Migration, MigrationState

_Kind = TypeVar("_Kind")

SETTLE_S: Final = 2.0
"""A switch that learnt the new port late, or a TCP that repeats a segment late, is still its
doing."""
BLACKOUT_PHASES: Final = (
    "final pass",
    "device state",
    "load",
    "ownership record",
    "fence",
    "activate",
)
"""The timeline's names for the parts of a blackout."""
PROBLEMS_MAX: Final = 5
"""How many of a disk's problems are told one by one."""


class MigrationResult(msgspec.Struct, frozen=True, kw_only=True):
    """One migration, from both sides. The fields are those of `ferry demo --json`."""

    source: str
    destination: str
    iterations: int
    bytes_sent: int
    total_s: float
    blackout_ms: float | None
    """By the hosts' clocks."""
    client_longest_gap_ms: float
    """Longest time without a packet at the client. A packet is due each millisecond."""
    packets_lost: int


class DrainResult(msgspec.Struct, frozen=True, kw_only=True):
    """A node that was drained, and undrained."""

    domains: int
    planned_s: float
    actual_s: float
    """Of the drain, without the way back."""
    client_errors: int
    """Of the visitors that asked the guests for pages, through HAProxy, all the while."""
    worst_blackout_ms: float | None
    """Of both ways."""


class DemoResult(msgspec.Struct, frozen=True, kw_only=True):
    """The line that `ferry demo --json` prints last."""

    migrations: tuple[MigrationResult, ...]
    tcp_connection_survived: bool
    http_errors: int
    guest_corruptions: int
    plot: str
    drain: DrainResult | None = None
    """None: it was not come to."""


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """A span of the hosts' wall clock, seconds."""

    from_s: float
    to_s: float

    def overlaps(self, from_s: float, to_s: float) -> bool:
        return from_s < self.to_s and to_s >= self.from_s


class ClientSide(msgspec.Struct, frozen=True, kw_only=True):
    """What the client saw, sorted by kind."""

    samples: tuple[Sample, ...] = ()
    losses: tuple[Loss, ...] = ()
    late: tuple[Late, ...] = ()
    duplicates: tuple[Duplicate, ...] = ()
    reboots: tuple[Reboot, ...] = ()
    requests: tuple[Request, ...] = ()
    stream: tuple[Stream, ...] = ()
    farewell: Farewell | None = None

    @property
    def seen_until_s(self) -> float:
        """Up to when the samples reach; 0 before the first."""
        return self.samples[-1].at_s + SAMPLE_S if self.samples else 0.0

    @property
    def http_errors(self) -> int:
        return sum(request.error is not None for request in self.requests)

    @property
    def stream_error(self) -> str | None:
        """Why the download broke; None: it didn't."""
        broken = [each for each in self.stream if each.state is StreamState.BROKEN]
        return (broken[0].error or "for no known reason") if broken else None

    @property
    def stream_started(self) -> bool:
        return any(each.state is StreamState.STARTED for each in self.stream)


def sort_observations(observations: Iterable[Observation]) -> ClientSide:
    """Every kind in a tuple of its own, in the order of the lines."""
    kinds: dict[type, list[Observation]] = {}
    for observation in observations:
        kinds.setdefault(type(observation), []).append(observation)

    def those(kind: type[_Kind]) -> tuple[_Kind, ...]:
        return tuple(each for each in kinds.get(kind, ()) if isinstance(each, kind))

    last = those(Farewell)
    return ClientSide(
        samples=those(Sample),
        losses=those(Loss),
        late=those(Late),
        duplicates=those(Duplicate),
        reboots=those(Reboot),
        requests=those(Request),
        stream=those(Stream),
        farewell=last[-1] if last else None,
    )


def windows(migrations: Sequence[Migration]) -> list[Window]:
    """The span that each answers for. `migrations` have ended and are in the order of creation."""
    found: list[Window] = []
    for number, migration in enumerate(migrations):
        ended_at_s = migration.ended_at_s
        until_s = (migration.created_at_s if ended_at_s is None else ended_at_s) + SETTLE_S
        if number + 1 < len(migrations):
            until_s = min(until_s, migrations[number + 1].created_at_s)
        found.append(Window(from_s=migration.created_at_s, to_s=until_s))
    return found


def longest_gap_ms(samples: Iterable[Sample], window: Window) -> float:
    """The longest wait for a packet that lay, at least in part, within the window."""
    inside = (each.longest_gap_ms for each in samples if window.overlaps(*_gap(each)))
    return max(inside, default=0.0)


def longest_quiet_gap_ms(samples: Iterable[Sample], busy: Sequence[Window]) -> float:
    """The longest wait for a packet outside all migrations: what the machine does by itself."""
    outside = (
        each.longest_gap_ms
        for each in samples
        if not any(window.overlaps(*_gap(each)) for window in busy)
    )
    return max(outside, default=0.0)


def _gap(sample: Sample) -> tuple[float, float]:
    """When the sample's longest gap began and ended. Seconds."""
    return sample.gap_ended_at_s - sample.longest_gap_ms / 1e3, sample.gap_ended_at_s


def packets_lost(side: ClientSide, window: Window) -> int:
    """Numbers skipped within the window that never arrived."""
    late = {each.sequence for each in side.late}
    return sum(
        loss.count - sum(first <= number < first + loss.count for number in late)
        for loss in side.losses
        for first in (loss.first_sequence,)
        if window.overlaps(loss.at_s, loss.at_s)
    )


def results(migrations: Sequence[Migration], side: ClientSide) -> list[MigrationResult]:
    """One for each migration that completed, in their order."""
    return [
        MigrationResult(
            source=migration.source,
            destination=migration.destination,
            iterations=len(migration.iterations),
            bytes_sent=migration.progress.bytes_sent,
            total_s=round(migration.total_s or 0.0, 3),
            blackout_ms=_rounded(migration.blackout_ms),
            client_longest_gap_ms=round(longest_gap_ms(side.samples, window), 2),
            packets_lost=packets_lost(side, window),
        )
        for migration, window in zip(migrations, windows(migrations), strict=True)
        if migration.state is MigrationState.COMPLETED
    ]


def tcp_survived(side: ClientSide, migrations: Sequence[Migration]) -> bool:
    """Whether the one download never broke, and brought bytes also after the last migration."""
    if not side.stream_started or side.stream_error is not None:
        return False
    last_s = max((each.ended_at_s or each.created_at_s for each in migrations), default=0.0)
    return any(sample.stream_bytes for sample in side.samples if sample.at_s > last_s)


def blackout_window(migration: Migration) -> Window | None:
    """When no vCPU ran, by the hosts' clocks; None: not known."""
    if migration.blackout_ms is None:
        return None
    for phase in migration.timeline:
        if phase.name == "stop":
            paused_at_s = phase.started_at_s + phase.seconds
            return Window(from_s=paused_at_s, to_s=paused_at_s + migration.blackout_ms / 1e3)
    return None


def slowest_blackout(migrations: Sequence[Migration]) -> str:
    """The parts of the longest blackout, by its timeline: "final pass 1.5 ms, ..."; "": unknown."""
    dark = [each for each in migrations if each.blackout_ms is not None]
    if not dark:
        return ""
    slowest = max(dark, key=lambda each: each.blackout_ms or 0.0)
    return ", ".join(
        f"{phase.name} {phase.seconds * 1e3:.1f} ms"
        for phase in slowest.timeline
        if phase.name in BLACKOUT_PHASES
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def faults(migrations: Sequence[Migration], side: ClientSide, disk: DiskReport | None) -> list[str]:
    """Everything that a migration must not do to a guest and its users. Lost packets aren't here:
    UDP promises nothing, and the table says how many.

    `disk`: what the guest's disk held after it was stopped; None: not looked at.
    """
    found = [
        f"the migration {each.source} -> {each.destination} {each.state}: {each.error}"
        for each in migrations
        if each.state is not MigrationState.COMPLETED
    ]
    if not tcp_survived(side, migrations):
        found.append(f"the TCP connection broke: {side.stream_error or 'it brings nothing more'}")
    errors = [request.error for request in side.requests if request.error is not None]
    if errors:
        found.append(f"{len(errors)} HTTP requests failed, the first: {errors[0]}")
    if side.duplicates:
        found.append(f"{len(side.duplicates)} packets arrived twice: two copies of the guest?")
    if side.reboots:
        found.append("the guest was booted anew")
    status = side.farewell.status if side.farewell else None
    if status is None:
        why = side.farewell.error if side.farewell else "the client said no farewell"
        found.append(f"the guest couldn't be asked for its own checks: {why}")
    elif status.corruptions:
        found.append(f"the guest found {status.corruptions} corruptions of its memory or disk")
    if disk is not None:
        found += [f"disk slot {each.slot}: {each.detail}" for each in disk.problems[:PROBLEMS_MAX]]
        if status is not None and disk.last_sequence < status.disk_last_sequence:
            found.append(
                f"the disk ends with record {disk.last_sequence}, but record "
                f"{status.disk_last_sequence} had been acknowledged"
            )
    return found
