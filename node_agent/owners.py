"""What the owners of domains say of them now: each is asked once, all at the same time.

An owner that is silent, or gives no answer, is named with the reason: what its domains do isn't
known then, and nobody else's answer waits for it longer than a call takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from migrator.errors import FerryError
from migrator.model import (
    DomainName,
    DomainStatus,
    NodeName,
    NodeState,
    OwnershipRecord,
    OwnershipState,
)
from node_agent.cluster_calls import guests_of
from node_agent.cluster_views import Snapshot
from node_agent.nodes import NodeRegistry, not_yet
from node_agent.peers.hub import PeerHub


async def ask_owners(
    hub: PeerHub, nodes: NodeRegistry, owned: Iterable[OwnershipRecord]
) -> Snapshot:
    """Of the domains with these records, as far as they run. StoreError."""
    owners = {
        DomainName(record.domain): NodeName(record.owner)
        for record in owned
        if record.state is OwnershipState.RUNNING
    }
    views = await nodes.read() if owners else {}
    silent = {
        name: f"node {name} has been silent for {views[name].heartbeat_age_s:.0f} s"
        f"{not_yet(views[name])}"
        for name in owners.values()
        if name in views and views[name].state is NodeState.UNREACHABLE
    }
    asked = sorted(set(owners.values()) - silent.keys())
    answers = await asyncio.gather(*(_ask(hub, node) for node in asked))
    statuses: dict[DomainName, DomainStatus] = {}
    for node, answer in zip(asked, answers, strict=True):
        if isinstance(answer, FerryError):
            silent[node] = f"node {node} doesn't answer: {answer}"
            continue
        for status in answer:
            name = DomainName(status.name)
            if owners.get(name) == node:
                statuses[name] = status
    return Snapshot(statuses=statuses, silent=silent)


async def _ask(hub: PeerHub, node: NodeName) -> Sequence[DomainStatus] | FerryError:
    try:
        return await guests_of(hub, node)
    except FerryError as error:
        return error
