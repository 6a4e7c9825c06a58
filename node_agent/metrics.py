"""`GET /metrics` for Prometheus: what this agent sees, made at each scrape. Pure.

Each agent tells of itself and of its migrations (those whose source it is), so that the sum over
all agents is the cluster's. Node states are as this agent sees them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from migrator.model import MigrationState, NodeState
from migrator.ports import Struct
from node_agent.migrations.outline import MigrationOutline
from node_agent.resources import Health, Node

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
BLACKOUT_BUCKETS_S: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
TOTAL_BUCKETS_S: Final = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)


class Seen(Struct, frozen=True, kw_only=True):
    """What one agent knows at the moment of a scrape."""

    health: Health
    nodes: Sequence[Node]
    migrations: Sequence[MigrationOutline]
    """Of this node: those that the store had when the agent began, and all since."""
    certificate_not_after_s: float | None
    """None without TLS."""
    authority_not_after_s: float | None = None


def render(seen: Seen) -> bytes:
    """The metrics in Prometheus' text format (`CONTENT_TYPE`)."""
    registry = CollectorRegistry()
    registry.register(_Once(seen))
    return generate_latest(registry)


class _Once(Collector):
    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def collect(self) -> Iterator[Metric]:
        yield from _of_the_agent(self._seen)
        yield from _of_nodes(self._seen)
        yield from _of_migrations(self._seen.migrations)


def _of_the_agent(seen: Seen) -> Iterator[Metric]:
    version = GaugeMetricFamily(
        "ferry_agent_info", "Always 1; which agent this is.", labels=("node", "version")
    )
    version.add_metric((seen.health.node, seen.health.agent_version), 1)
    yield version
    yield GaugeMetricFamily(
        "ferry_event_loop_blocked_seconds_max",
        "The longest that the agent served nobody, since its start.",
        value=seen.health.loop_blocked_ms_max / 1e3,
    )
    if seen.certificate_not_after_s is not None:
        yield GaugeMetricFamily(
            "ferry_certificate_expires_timestamp_seconds",
            "Until when the node's certificate holds.",
            value=seen.certificate_not_after_s,
        )
    if seen.authority_not_after_s is not None:
        yield GaugeMetricFamily(
            "ferry_authority_expires_timestamp_seconds",
            "Until when the cluster's authority holds, and with it every certificate.",
            value=seen.authority_not_after_s,
        )


def _of_nodes(seen: Seen) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "ferry_node_state", "1 for the state that the node is in.", labels=("node", "state")
    )
    trips = GaugeMetricFamily(
        "ferry_round_trip_seconds", "The last round trip to the node.", labels=("node",)
    )
    clocks = GaugeMetricFamily(
        "ferry_clock_offset_seconds",
        "The node's wall clock less this one's, to about a second.",
        labels=("node",),
    )
    for node in seen.nodes:
        for state in NodeState:
            states.add_metric((node.name, state.value), float(node.state is state))
        if node.round_trip_ms is not None and node.name != seen.health.node:
            trips.add_metric((node.name,), node.round_trip_ms / 1e3)
        if node.clock_offset_s is not None and node.name != seen.health.node:
            clocks.add_metric((node.name,), node.clock_offset_s)
    yield states
    yield trips
    yield clocks
    for node in seen.nodes:
        if node.name == seen.health.node:
            yield GaugeMetricFamily(
                "ferry_domains", "Domains that run on this node.", value=len(node.domains)
            )
            yield GaugeMetricFamily(
                "ferry_memory_committed_bytes",
                "Memory of the domains that run on this node.",
                value=node.memory_committed_bytes,
            )
            yield GaugeMetricFamily(
                "ferry_memory_bytes",
                "Memory that this node offers to domains.",
                value=node.memory_bytes,
            )


def _of_migrations(own: Sequence[MigrationOutline]) -> Iterator[Metric]:
    counts = Counter(each.state for each in own)
    states = GaugeMetricFamily(
        "ferry_migrations", "Migrations from this node, by state.", labels=("state",)
    )
    for state in MigrationState:
        states.add_metric((state.value,), counts[state])
    yield states
    completed = [each for each in own if each.state is MigrationState.COMPLETED]
    yield _histogram(
        "ferry_migration_blackout_seconds",
        "How long no vCPU ran anywhere, of completed migrations from this node.",
        BLACKOUT_BUCKETS_S,
        (each.blackout_ms / 1e3 for each in completed if each.blackout_ms is not None),
    )
    yield _histogram(
        "ferry_migration_total_seconds",
        "How long completed migrations from this node took.",
        TOTAL_BUCKETS_S,
        (each.total_s for each in completed if each.total_s is not None),
    )


def _histogram(
    name: str, about: str, bounds: Sequence[float], values: Iterable[float]
) -> HistogramMetricFamily:
    counts, total = [0] * (len(bounds) + 1), 0.0
    for value in values:
        counts[bisect_left(bounds, value)] += 1
        total += value
    buckets: list[tuple[str, float]] = []
    below = 0
    for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=True):
        below += count
        buckets.append((bound, below))
    return HistogramMetricFamily(name, about, buckets=buckets, sum_value=total)
