"""Whether pressure is enough to act upon, and which move would relieve it. Pure.

Hysteresis: reports of `HIGH` or more for `SUSTAINED_S`, at least `REPORTS_MIN` of them, make it
due; a report below `LOW`, or none for `FORGOTTEN_S`, makes it forgotten. Between the two nothing
changes.
After a move nothing is moved on behalf of the same target for `COOLDOWN_S`: its effect has to show
first.

Which move: of the domains that may migrate live, the one that takes most load away for each second
of its move. A move that would only carry the load elsewhere isn't proposed: the destination
must be less loaded with the domain than the source is now.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Annotated, Final

import msgspec

from migrator.model import MaintenancePolicy, Name, Value
from migrator.ports import Struct
from node_agent.planner.model import DomainFacts, NodeFacts

HIGH: Final = 0.8
LOW: Final = 0.6
SUSTAINED_S: Final = 30.0
REPORTS_MIN: Final = 3
FORGOTTEN_S: Final = 120.0
COOLDOWN_S: Final = 600.0


class PressureKind(enum.StrEnum):
    """What there is too much of."""

    CPU = "cpu"
    MEMORY = "memory"
    NETWORK = "network"


class PressureReport(Value, frozen=True, kw_only=True):
    """Body of a report. Exactly one of `domain` and `node` is named."""

    domain: Name | None = None
    node: Name | None = None
    kind: PressureKind = PressureKind.CPU
    level: Annotated[float, msgspec.Meta(ge=0, le=100)]
    """Load over capacity: 1.0 is all that there is."""
    apply: bool = False
    """Move, when it is due; else only propose."""
    source: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """Who says so, for the event log."""


class History(Value, frozen=True, kw_only=True):
    """`pressure/TARGET` in the store: what was reported of one target so far."""

    since_s: float = 0.0
    """When the present pressure began; 0: there is none."""
    last_s: float = 0.0
    reports: int = 0
    moved_at_s: float = 0.0
    """When a domain was last moved because of it; 0: never."""


class Standing(enum.StrEnum):
    """What a report came to."""

    CALM = "calm"
    """There is no pressure."""
    NOTED = "noted"
    """There is, but not for long enough."""
    RESTING = "resting"
    """It was acted upon a short while ago."""
    NO_MOVE = "no-move"
    """No move would help; the reason says why."""
    PROPOSED = "proposed"
    MOVING = "moving"


class PressureAnswer(Value, frozen=True, kw_only=True):
    """What a report came to, and why."""

    standing: Standing
    reason: str
    domain: str | None = None
    source: str | None = None
    destination: str | None = None
    seconds: float | None = None
    """What the move is expected to take."""
    migration: str | None = None
    """With `moving`: its id."""


class Proposal(Struct, frozen=True, kw_only=True):
    """A move that would help."""

    domain: str
    source: str
    destination: str
    seconds: float
    reason: str


def weigh(history: History, report: PressureReport, now_s: float) -> tuple[History, Standing]:
    """The history with this report in it, and whether it is due (PROPOSED) now.

    Another node's clock may have made the history, or one that was set since: what it says of the
    future is as if it had just been.
    """
    history = msgspec.structs.replace(
        history,
        since_s=min(history.since_s, now_s),
        last_s=min(history.last_s, now_s),
        moved_at_s=min(history.moved_at_s, now_s),
    )
    if history.since_s and now_s - history.last_s > FORGOTTEN_S:
        history = msgspec.structs.replace(history, since_s=0.0, reports=0)
    if report.level < LOW or (report.level < HIGH and not history.since_s):
        calm = msgspec.structs.replace(history, since_s=0.0, reports=0, last_s=now_s)
        return calm, Standing.CALM
    high = report.level >= HIGH
    history = msgspec.structs.replace(
        history,
        since_s=history.since_s or now_s,
        last_s=now_s,
        reports=history.reports + (1 if high else 0),
    )
    if not high or history.reports < REPORTS_MIN or now_s - history.since_s < SUSTAINED_S:
        return history, Standing.NOTED
    if history.moved_at_s and now_s - history.moved_at_s < COOLDOWN_S:
        return history, Standing.RESTING
    return history, Standing.PROPOSED


def load_of(
    node: NodeFacts, domains: Sequence[DomainFacts], kind: PressureKind, without: str = ""
) -> float:
    """Committed load over capacity; for the network, domains: Ferry doesn't measure it."""
    here = [each for each in domains if each.node == node.name and each.name != without]
    match kind:
        case PressureKind.CPU:
            return sum(each.vcpus for each in here) / max(node.cpus, 1)
        case PressureKind.MEMORY:
            return sum(each.memory_bytes for each in here) / max(node.memory_bytes, 1)
        case PressureKind.NETWORK:
            return len(here) / max(node.link_bytes_per_s / 1e8, 1e-3)


def candidates(
    domains: Sequence[DomainFacts], node: str, kind: PressureKind, domain: str | None
) -> list[DomainFacts]:
    """Which domains to think of, the best first: most load taken away for each second of a move."""
    movable = [
        each
        for each in domains
        if each.node == node
        and not each.obstacle
        and each.policy is MaintenancePolicy.LIVE
        and domain in (None, each.name)
    ]

    def worth(each: DomainFacts) -> float:
        relief = {
            PressureKind.CPU: float(each.vcpus),
            PressureKind.MEMORY: float(each.memory_bytes),
            PressureKind.NETWORK: 1.0,
        }[kind]
        return relief / max(each.content_bytes + each.dirty_bytes_per_s, 1.0)

    return sorted(movable, key=lambda each: (-worth(each), each.name))


def choose(
    nodes: Sequence[NodeFacts],
    domains: Sequence[DomainFacts],
    source: str,
    kind: PressureKind,
    domain: str | None,
    place: Callable[[DomainFacts], tuple[str, float] | str],
) -> Proposal | str:
    """A move that would help, or why there is none.

    `place` gives a domain's (destination, seconds of the move), or why it has none.
    """
    by_name = {node.name: node for node in nodes}
    before = load_of(by_name[source], domains, kind)
    why_not = ""
    for each in candidates(domains, source, kind, domain):
        placed = place(each)
        if isinstance(placed, str):
            why_not = why_not or f"{each.name}: {placed}"
            continue
        destination, seconds = placed
        there = by_name[destination]
        moved = [*domains, msgspec.structs.replace(each, name=f"{each.name} ", node=destination)]
        after = load_of(there, moved, kind)
        if after >= before:
            why_not = why_not or (
                f"{destination} would be as loaded ({kind} {after:.2f}) as {source} is "
                f"({before:.2f})"
            )
            continue
        return Proposal(
            domain=each.name,
            source=source,
            destination=destination,
            seconds=seconds,
            reason=f"{kind} committed on {source}: {before:.2f}; on {destination} it becomes "
            f"{after:.2f}",
        )
    return why_not or f"no domain of {source} may be migrated live now"
