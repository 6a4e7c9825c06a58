"""What the API shows of domains and nodes, put together from records and answers. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from migrator.model import (
    DomainName,
    DomainState,
    DomainStatus,
    NodeName,
    OwnershipRecord,
    OwnershipState,
)
from migrator.ports import Struct
from node_agent.nodes import NodeView
from node_agent.resources import Domain, DomainRecord, Node


class Snapshot(Struct, frozen=True, kw_only=True):
    """What the owners answered about the domains that run."""

    statuses: Mapping[DomainName, DomainStatus]
    silent: Mapping[NodeName, str]
    """Owners that didn't answer, and why."""


def domain_view(
    record: DomainRecord,
    owned: OwnershipRecord | None,
    snapshot: Snapshot,
    migration: str | None,
) -> Domain:
    """The domain resource, from what is recorded and what its owner answered."""
    spec = record.spec
    status = snapshot.statuses.get(DomainName(spec.name))
    if owned is None or owned.state is OwnershipState.STOPPED:
        status = DomainStatus(name=spec.name, state=DomainState.STOPPED)
    elif status is None:
        reason = snapshot.silent.get(NodeName(owned.owner))
        reason = reason or f"node {owned.owner} has no process of it now"
        status = DomainStatus(name=spec.name, state=DomainState.UNKNOWN, reason=reason)
    return Domain(
        name=spec.name,
        spec=spec,
        state=status.state,
        node=owned.owner if owned else None,
        token=owned.token if owned else 0,
        pid=status.pid,
        reason=status.reason,
        memory_in_use_bytes=status.memory_in_use_bytes,
        addresses=status.addresses,
        migration=migration,
        defined_at_s=record.defined_at_s,
        history=record.history,
    )


def running_by_node(
    records: Mapping[DomainName, DomainRecord], owned: Mapping[DomainName, OwnershipRecord]
) -> Mapping[NodeName, Mapping[DomainName, DomainRecord]]:
    """Of all that are defined and run, by the node that owns them."""
    found: defaultdict[NodeName, dict[DomainName, DomainRecord]] = defaultdict(dict)
    for name, record in owned.items():
        if record.state is OwnershipState.RUNNING and name in records:
            found[NodeName(record.owner)][name] = records[name]
    return found


def node_views(
    views: Mapping[NodeName, NodeView],
    running: Mapping[NodeName, Mapping[DomainName, DomainRecord]],
    round_trip_ms: Callable[[NodeName], float | None],
    troubles: Mapping[NodeName, str],
) -> Sequence[Node]:
    """Every node's, by name."""
    return [
        node_view(view, running.get(name, {}), round_trip_ms(name), troubles.get(name, ""))
        for name, view in sorted(views.items())
    ]


def node_view(
    view: NodeView,
    running: Mapping[DomainName, DomainRecord],
    round_trip_ms: float | None,
    trouble: str = "",
) -> Node:
    """The node resource, with the domains that run on it."""
    info = view.info
    return Node(
        name=info.name,
        state=view.state,
        heartbeat_age_s=view.heartbeat_age_s,
        judged_in_s=view.judged_in_s,
        api_address=info.api_address,
        peer_address=info.peer_address,
        migration_address=info.migration_address,
        cpus=info.cpus,
        memory_bytes=info.memory_bytes,
        memory_committed_bytes=sum(record.spec.memory_bytes for record in running.values()),
        domains=tuple(sorted(running)),
        capabilities=info.capabilities,
        agent_version=info.agent_version,
        round_trip_ms=round_trip_ms,
        round_trips_ms=info.round_trips_ms,
        trouble=trouble,
        clock_offset_s=view.clock_offset_s,
        certificate_until_s=info.certificate_until_s,
        kept_free=view.kept_free,
    )
