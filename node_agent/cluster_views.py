"""What the API shows of domains and nodes, put together from records and answers. Pure."""

from __future__ import annotations

from collections.abc import Mapping

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


def node_view(
    view: NodeView,
    records: Mapping[DomainName, DomainRecord],
    owned: Mapping[DomainName, OwnershipRecord],
    round_trip_ms: float | None,
    trouble: str = "",
) -> Node:
    """The node resource, with the domains that run on it."""
    info = view.info
    running = sorted(
        name
        for name, record in owned.items()
        if record.owner == info.name and record.state is OwnershipState.RUNNING and name in records
    )
    return Node(
        name=info.name,
        state=view.state,
        heartbeat_age_s=view.heartbeat_age_s,
        api_address=info.api_address,
        peer_address=info.peer_address,
        migration_address=info.migration_address,
        cpus=info.cpus,
        memory_bytes=info.memory_bytes,
        memory_committed_bytes=sum(records[name].spec.memory_bytes for name in running),
        domains=tuple(running),
        capabilities=info.capabilities,
        agent_version=info.agent_version,
        round_trip_ms=round_trip_ms,
        round_trips_ms=info.round_trips_ms,
        trouble=trouble,
        clock_offset_s=view.clock_offset_s,
        certificate_until_s=info.certificate_until_s,
        kept_free=view.kept_free,
    )
