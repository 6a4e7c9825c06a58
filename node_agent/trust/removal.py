"""Takes a node out of the cluster: its certificates are refused by everybody from then on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import msgspec

from migrator.errors import ConflictError, NotFoundError, RefusedError
from migrator.model import NodeInfo, NodeName, NodeState, OwnershipState
from node_agent.domain_records import DomainRecords
from node_agent.migrations.service import MigrationService
from node_agent.nodes import Heartbeat, NodeRegistry, NodeView, not_yet
from node_agent.resources import BEATS, NODES
from node_agent.state.typed import TypedStore
from node_agent.trust.records import MEMBERS, MemberRecord

ATTEMPTS: Final = 5


class NodeRemoval:
    """See the module. Errors: NotFoundError, RefusedError (every reason), StoreError."""

    def __init__(
        self,
        node: NodeName,
        store: TypedStore,
        *,
        nodes: NodeRegistry,
        records: DomainRecords,
        migrations: MigrationService,
        secured: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._node = node
        self._store = store
        self._nodes = nodes
        self._records = records
        self._migrations = migrations
        self._secured = secured
        self._clock = clock

    async def remove(self, node: NodeName, *, force: bool) -> list[str]:
        """Remove it. `force`: though domains are recorded there, if it is unreachable.

        Returns the domains that are recorded there still: they stay its own until a takeover.
        """
        view = (await self._nodes.read()).get(node)
        member = await self._store.get(f"{MEMBERS}{node}", MemberRecord)
        if view is None and (member is None or not member.value.active):
            raise NotFoundError(f"there is no node {node}")
        domains = [
            str(name)
            for name, owned in (await self._records.list_ownership()).items()
            if owned.owner == node and owned.state is OwnershipState.RUNNING
        ]
        reasons = await self._reasons(node, view, member.value if member else None, domains, force)
        if reasons:
            raise RefusedError(f"node {node} can't be removed: {reasons[0]}", reasons)
        if member is not None:
            await self._revoke(node)
        for key, kind in ((f"{NODES}{node}", NodeInfo), (f"{BEATS}{node}", Heartbeat)):
            entry = await self._store.get(key, kind)
            if entry is not None:
                await self._store.delete_if(entry.key, entry.revision)
        return sorted(domains)

    async def _reasons(
        self,
        node: NodeName,
        view: NodeView | None,
        member: MemberRecord | None,
        domains: list[str],
        force: bool,
    ) -> list[str]:
        reasons: list[str] = []
        if said := not_yet(view):
            reasons.append(f"whether it is silent isn't known yet{said}")
        silent = view is None or view.state is NodeState.UNREACHABLE
        if node == self._node:
            reasons.append("it is the node that was asked; ask another one")
        if domains and not (force and silent):
            names = ", ".join(sorted(domains))
            how = "drain it first" if not silent else "if it is dead, use --force"
            reasons.append(f"domains run there ({names}): {how}")
        under_way = [
            each.id
            for each in await self._migrations.list_outlines()
            if not each.ended and node in (each.source, each.destination)
        ]
        if under_way and not (force and silent):
            how = "if it is dead, use --force"
            if not silent:
                how = f"wait for their end, or `ferry migration cancel {under_way[0]}`"
            named = ", ".join(under_way)
            reasons.append(f"migrations from or to it are under way ({named}): {how}")
        if not self._secured and not silent:
            reasons.append(
                "its agent runs, and without TLS it would be back with its next heartbeat: stop it"
            )
        if member is not None and member.authority and not await self._other_authority(node):
            reasons.append(
                "no other node holds the authority's key, so none could join and no certificate "
                "be renewed: give it to another node first (docs/cluster.md)"
            )
        return reasons

    async def _other_authority(self, node: NodeName) -> bool:
        entries = await self._store.list_prefix(MEMBERS, MemberRecord)
        return any(
            entry.value.authority and entry.value.active and entry.value.name != node
            for entry in entries
        )

    async def _revoke(self, node: NodeName) -> None:
        for _ in range(ATTEMPTS):
            entry = await self._store.get(f"{MEMBERS}{node}", MemberRecord)
            if entry is None or not entry.value.active:
                return
            record = msgspec.structs.replace(
                entry.value,
                removed_at_s=self._clock(),
                certificates=(),
                revoked=(*entry.value.revoked, *entry.value.certificates),
            )
            if await self._store.put_if(entry.key, record, entry.revision) is not None:
                return
        raise ConflictError(f"the record of member {node} keeps changing; nothing was removed")
