"""Taking over a domain whose node is silent: by an operator, and only behind a confirmed fence.

    owner silent? ─► every volume can shut its node out? ─► record (token+1, this node)
        ─► fence, then verify, each volume ─► start from disk

A silent node may run its guest on. So the storage has to shut it out, and say so, before a vCPU
runs here; where no volume driver can, the takeover is refused.

There an operator's word may stand in the fence's place: the node, named, is powered off. Nobody can
check that, so everything that speaks against it is a reason to refuse: the name is another node's,
the node's heartbeat isn't older than its timeout, it answers when it is called, or the storage
could shut it out after all. The word is written into the domain's history, with the name of who
gave it, before anything else is done.

After this agent's start, and after an outage of the store, nodes look silent that aren't. So until
it has listened for some seconds (`NodeView.judged_in_s`), no takeover begins.

A node may be given a domain, too, that it runs already, which a restored store doesn't know
(`older_store`): nothing is started then, the record is made to say what is.

What the silent node's guest had in memory and not on disk is lost. It computes on until it writes,
or until its agent finds that the record has moved on (`DomainOwnership.end_stale`); none of its
writes arrives.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from migrator.errors import ConflictError, FenceError, FerryError, RefusedError
from migrator.model import (
    DomainName,
    DomainSpec,
    FencingToken,
    NodeName,
    NodeState,
    OwnershipRecord,
    OwnershipState,
    PoolName,
    VolumeName,
)
from migrator.ports import OwnershipStore, VolumeDriver
from node_agent.domain_records import DomainRecords
from node_agent.domains import DomainService
from node_agent.events import EventKind, EventLog
from node_agent.nodes import NodeView, not_yet
from node_agent.older_store import RAN
from node_agent.start_needs import boot_troubles

REACH_S: Final = 3.0
"""How long a node that is said to be off is called for."""


class DomainTakeover:
    """See the module. `nodes` reads every node's heartbeat."""

    def __init__(
        self,
        node: NodeName,
        *,
        domains: DomainService,
        pools: Mapping[PoolName, VolumeDriver],
        ownership: OwnershipStore,
        records: DomainRecords,
        nodes: Callable[[], Awaitable[Mapping[NodeName, NodeView]]],
        reach: Callable[[NodeName], Awaitable[None]],
        events: EventLog,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`reach` calls a node's agent: FerryError if it doesn't answer."""
        self.node = node
        self._domains = domains
        self._pools = pools
        self._ownership = ownership
        self._records = records
        self._nodes = nodes
        self._reach = reach
        self._events = events
        self._clock = clock

    async def take_over(
        self, domain: DomainName, powered_off: NodeName | None = None, *, user: str = ""
    ) -> OwnershipRecord:
        """Start the domain here, from disk, with its silent owner shut out. Or keep its guest that
        runs here already, under a newer token than the record's.

        `powered_off`: the node that `user` vouches for to be off, where the storage can't shut it
        out. It must be the owner.

        RefusedError with every reason: nothing was changed. ConflictError: its owner was faster.
        FenceError: a volume doesn't confirm its fence; the domain is stopped, and this node's.
        """
        async with self._domains.locks.hold(domain, "takeover"):
            spec = (await self._records.get(domain)).spec
            owned = await self._ownership.read(domain)
            token = await self._domains.ownership.older.newer_guest(domain, owned)
            if token is not None:
                return await self._keep(spec, owned, token, user)
            reasons = await self._reasons(spec, owned, powered_off)
            if reasons or owned is None:
                raise RefusedError(f"domain {domain} was not taken over: {reasons[0]}", reasons)
            text = f"takeover by {self.node} from {owned.owner}, which is silent"
            if powered_off is not None:
                text += (
                    f"; no fence: {user or 'somebody'} vouched that {powered_off} is powered off"
                )
            await self._records.note(domain, text, user=user, at_s=self._clock())
            vouched = () if powered_off is None else (powered_off,)
            record = await self._domains.ownership.take_over(domain, spec, owned, vouched)
            await self._domains.launch(record, spec, self._confirm)
        self._events.emit(
            EventKind.DOMAIN_TAKEN_OVER,
            f"domain {domain}: {text}; it was started on {self.node} from disk",
            domain=domain,
            token=record.token,
            vouched_for=powered_off,
            user=user,
        )
        return record

    async def _keep(
        self, spec: DomainSpec, owned: OwnershipRecord | None, token: FencingToken, user: str
    ) -> OwnershipRecord:
        """The guest that runs here under `token` is the domain: the record is made to say so."""
        domain, here = DomainName(spec.name), self.node
        record, reasons = await self._domains.ownership.older.record_of_guest(spec, owned, token)
        if reasons:
            raise RefusedError(f"domain {domain} was not given to {here}: {reasons[0]}", reasons)
        if not await self._ownership.compare_and_set(owned, record):
            raise ConflictError(f"domain {domain}: its record has just changed; it was left so")
        had = "no record of it" if owned is None else f"token {owned.token}, of {owned.owner}"
        text = (
            f"it runs on {here} under token {record.token}, which the store, with {had}, knows now"
        )
        await self._records.note(domain, text, user=user, at_s=self._clock())
        self._events.emit(
            EventKind.DOMAIN_ADOPTED,
            f"domain {domain}: {text}",
            domain=domain,
            token=record.token,
            user=user,
        )
        return record

    async def _reasons(
        self, spec: DomainSpec, owned: OwnershipRecord | None, powered_off: NodeName | None
    ) -> Sequence[str]:
        if owned is None or owned.state is not OwnershipState.RUNNING:
            return ["it doesn't run: start it"]
        if owned.owner == self.node:
            state = (await self._domains.status(DomainName(spec.name))).state
            if state in RAN:
                return [f"it is {self.node}'s own, and {state} there, as the store knows"]
            return [f"it is {self.node}'s own: stop and start it"]
        reasons: list[str] = []
        view = (await self._nodes()).get(NodeName(owned.owner))
        if view is not None and view.state is not NodeState.UNREACHABLE:
            reasons.append(
                f"its node {owned.owner} is {view.state}: stop or migrate it (its last heartbeat "
                f"is {view.heartbeat_age_s:.0f} s old)"
            )
        elif said := not_yet(view):
            reasons.append(f"whether its node {owned.owner} is silent isn't known yet{said}")
        lacking = await boot_troubles(spec)
        reasons += (f"{self.node} can't boot it: {why}" for why in lacking.values())
        full = await self._domains.room.troubles(spec)
        reasons += (f"{self.node} can't take it: {field}: {why}" for field, why in full.items())
        unfenced = self._unfenced(spec, owned.owner)
        if powered_off is None:
            if unfenced and not reasons:
                unfenced[0] += (
                    f" (once you have seen that {owned.owner} is powered off, `--powered-off "
                    f"{owned.owner}` gives your word in the place of a fence)"
                )
            return reasons + unfenced
        if powered_off != owned.owner:
            reasons.append(f"its node is {owned.owner}, not {powered_off}")
        if not unfenced:
            reasons.append(
                f"its storage can shut {owned.owner} out, and does: nobody's word is needed "
                "(leave --powered-off away)"
            )
        if not reasons and await self._answers(NodeName(owned.owner)):
            reasons.append(f"{owned.owner} is not powered off: its agent answers")
        return reasons

    async def _answers(self, node: NodeName) -> bool:
        try:
            async with asyncio.timeout(REACH_S):
                await self._reach(node)
        except (FerryError, TimeoutError):
            return False
        return True

    def _unfenced(self, spec: DomainSpec, owner: str) -> list[str]:
        """Why the storage can't shut the owner out."""
        reasons: list[str] = []
        writable = [disk for disk in spec.disks if not disk.read_only]
        if not writable:
            reasons.append(f"it has no volume to shut {owner} out of, where it may still run")
        for disk in writable:
            pool = self._pools.get(PoolName(disk.pool))
            if pool is None:
                reasons.append(f"{self.node} has no pool {disk.pool}")
            elif not pool.fences_remote_writers:
                reasons.append(
                    f"pool {disk.pool} ({pool.name}) can't shut {owner} out of volume "
                    f"{disk.volume}, which may still write"
                )
        return reasons

    async def _confirm(self, spec: DomainSpec, token: FencingToken) -> None:
        """FenceError unless every writable volume says that the token is its newest."""
        for disk in spec.disks:
            if disk.read_only:
                continue
            pool = self._pools[PoolName(disk.pool)]
            try:
                newest = await pool.verify(VolumeName(disk.volume))
            except FerryError as error:
                raise FenceError(
                    f"volume {disk.pool}/{disk.volume} doesn't confirm its fence: {error}"
                ) from error
            if newest != token:
                raise FenceError(
                    f"volume {disk.pool}/{disk.volume} says that token {newest} fenced it last, "
                    f"not {token}; the domain was not started"
                )
