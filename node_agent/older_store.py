"""A store that knows less than the nodes and the volumes: it was restored from an older copy.

    record: token 5      a guest that runs here: token 6    it is left, and told of
    record: token 5      volumes: fenced under 6            somebody has won 6 since: who runs it?
                                     │
              every node is asked ───┼─► one has it: nothing is started
                                     └─► one is silent, or has one that its disk's error stopped:
                                         neither, unless the storage shuts it out

Where the older record is this node's all the same, of before the guest's last start here, the token
is put right by the sweep.

Tokens only grow, and a volume is fenced under no token that wasn't recorded first. So what is newer
than the record tells of the store. A start by such a record would be the second one of a guest: it
would shut the first out of its volumes, or, where the storage shuts nobody out, write beside it.
Where there is no record at all the domain may just have been defined anew with the volumes of a
deleted one. Then nobody waits for nodes that are silent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Final

import msgspec

from migrator.errors import ConflictError, FerryError
from migrator.model import (
    DomainName,
    DomainSpec,
    DomainState,
    DomainStatus,
    FencingToken,
    NodeName,
    NodeState,
    OwnershipRecord,
    OwnershipState,
)
from migrator.ports import HypervisorDriver, OwnershipStore, Struct
from node_agent.domain_launch import LaunchBuilder
from node_agent.events import EventKind, EventLog
from node_agent.nodes import NodeView

RAN: Final = (DomainState.RUNNING, DomainState.PAUSED, DomainState.IO_ERROR)
FENCE_LOOK_S: Final = 1.0
_MAY_RUN: Final = (*RAN, DomainState.UNKNOWN)
Statuses = Sequence[DomainStatus]


class Others(Struct, frozen=True, kw_only=True):
    """Who else has a guest of a domain, and who can't be asked."""

    having: tuple[NodeName, ...] = ()
    failed: tuple[NodeName, ...] = ()
    """Those of `having` whose guest stands, by its disk's error: it may be shut out already."""
    silent: tuple[NodeName, ...] = ()


class OtherNodes:
    """Asks them. `nodes` reads every node's heartbeat, `ask` a node for its guests."""

    def __init__(
        self,
        node: NodeName,
        nodes: Callable[[], Awaitable[Mapping[NodeName, NodeView]]],
        ask: Callable[[NodeName], Awaitable[Statuses]],
    ) -> None:
        self._node = node
        self._nodes = nodes
        self._ask = ask

    async def look_for(self, domain: DomainName) -> Others:
        """StoreError: who they are isn't known."""
        views = await self._nodes()
        others = sorted(set(views) - {self._node})
        silent = {each for each in others if views[each].state is NodeState.UNREACHABLE}
        asked = [each for each in others if each not in silent]
        answers = await asyncio.gather(*(self._has(each, domain) for each in asked))
        found = dict(zip(asked, answers, strict=True))
        silent |= {node for node, state in found.items() if state is None}
        return Others(
            having=tuple(node for node, state in found.items() if state in _MAY_RUN),
            failed=tuple(n for n, state in found.items() if state is DomainState.IO_ERROR),
            silent=tuple(sorted(silent)),
        )

    async def _has(self, node: NodeName, domain: DomainName) -> DomainState | None:
        """None: it doesn't say."""
        try:
            statuses = await self._ask(node)
        except FerryError:
            return None
        here = (each.state for each in statuses if each.name == domain)
        return next(here, DomainState.STOPPED)


class OlderStore:
    """See the module. `others` None: nobody else is asked, and nothing is refused for them."""

    def __init__(
        self,
        node: NodeName,
        *,
        hypervisor: HypervisorDriver,
        launches: LaunchBuilder,
        ownership: OwnershipStore,
        events: EventLog,
        others: OtherNodes | None,
    ) -> None:
        self._node = node
        self._hypervisor = hypervisor
        self._launches = launches
        self._ownership = ownership
        self._events = events
        self._others = others
        self._told: set[tuple[DomainName, int, int]] = set()

    async def newer_guest(
        self, domain: DomainName, owned: OwnershipRecord | None
    ) -> FencingToken | None:
        """The token of a guest that runs here, or did, under a newer one than the record's."""
        token = await self._hypervisor.launched_token(domain)
        if token is None or (owned is not None and token <= owned.token):
            return None
        return token if (await self._hypervisor.inspect(domain)).state in RAN else None

    async def refuse_end(self, domain: DomainName, owned: OwnershipRecord) -> None:
        """ConflictError: the guest here ran under a newer token than the record's, so it isn't the
        guest that is stale, but the store. Tokens only grow, and none runs before it is recorded.
        """
        here = self._node
        token, knows = await self.newer_guest(domain, owned), f"runs on {here}"
        then = f"`ferry domain takeover {domain} --to {here}` makes the store know it"
        if token is None:
            token = await self._newer_fence(domain, owned)
            knows = f"runs on {here}, its volumes were fenced"
            then = "Power it off from within, and start it"
        if token is None:
            return
        text = (
            f"domain {domain} {knows} under token {token}, and the store knows it under "
            f"{owned.token}, of {owned.owner}: the store was restored from an older copy, or is "
            f"another cluster's; the guest is left as it is. {then}"
        )
        self._tell(domain, owned.token, token, text)
        raise ConflictError(text)

    async def _newer_fence(self, domain: DomainName, owned: OwnershipRecord) -> FencingToken | None:
        """What the volumes of a guest that runs here know, if that is newer than the record: it may
        have been won back, in a handoff in the midst of which the snapshot was taken.

        Where the storage gives no answer soon: None. A copy that is stale has to end.
        """
        spec = await self._hypervisor.launched(domain)
        if spec is None or (await self._hypervisor.inspect(domain)).state not in RAN:
            return None
        try:
            async with asyncio.timeout(FENCE_LOOK_S):
                fence = await self._launches.newest_fence(spec)
        except (FerryError, TimeoutError):
            return None
        return fence if fence > owned.token else None

    async def tell_unknown(self, domain: DomainName) -> None:
        """The store has no record of the guest here. It is left as it is."""
        here, token = self._node, await self._hypervisor.launched_token(domain)
        text = (
            f"guest {domain} runs on {here}, and the store has no record of it: the store was "
            f"restored from an older copy, or begun anew; it is left as it is. Where the domain "
            f"isn't defined any more, define it; `ferry domain takeover {domain} --to {here}` then "
            "makes the store know it"
        )
        self._tell(domain, 0, token or 0, text)

    async def refuse_move(self, domain: DomainName, owned: OwnershipRecord) -> None:
        """ConflictError: the guest here runs under a newer token than its record, which is ours.

        The destination would win a token that its volumes know already, for ours: no fence.
        """
        token = await self.newer_guest(domain, owned)
        if token is not None:
            raise ConflictError(
                f"domain {domain} runs on {self._node} under token {token}, and the store has "
                f"{owned.token}: it was restored from an older copy; {self._node} puts that right "
                "within seconds"
            )

    async def catch_up(self, domain: DomainName) -> None:
        """Under the domain's lock: put that right. It stays ours, and its token only grows."""
        owned = await self._ownership.read(domain)
        token = await self.newer_guest(domain, owned)
        if owned is None or token is None:
            return
        if owned.owner != self._node or owned.state is not OwnershipState.RUNNING:
            return
        caught_up = msgspec.structs.replace(owned, token=token)
        if await self._ownership.compare_and_set(owned, caught_up):
            text = (
                f"domain {domain} runs on {self._node} under token {token}; the store, which was "
                f"restored from an older copy, had {owned.token}, and knows it now"
            )
            self._tell(domain, owned.token, token, text)

    async def refuse_start(
        self,
        spec: DomainSpec,
        owned: OwnershipRecord | None,
        fence: FencingToken,
        vouched: Collection[NodeName] = (),
    ) -> None:
        """ConflictError: another node has it, or may have: the volumes were fenced under a newer
        token than the record's. `vouched`: nodes that are known to be off.
        """
        known = 0 if owned is None else owned.token
        if fence <= known or self._others is None:
            return
        domain = DomainName(spec.name)
        found, shuts_out = (
            await self._others.look_for(domain),
            self._launches.shuts_others_out(spec),
        )
        having = [each for each in found.having if not shuts_out or each not in found.failed]
        silent = [each for each in found.silent if each not in vouched]
        has = "no record of it" if owned is None else f"token {known}, of {owned.owner}"
        why = f"its volumes were fenced under token {fence}, and the store has {has}"
        if having:
            text = (
                f"domain {domain} was not started on {self._node}: {' and '.join(having)} "
                f"has it, which the store doesn't know ({why}: the store was restored from an "
                "older copy). `ferry domain takeover "
                f"{domain} --to {having[0]}` makes the store know it; or power it off there"
            )
        elif silent and owned is not None and not shuts_out:
            text = (
                f"domain {domain} was not started on {self._node}: {why}: the store was restored "
                f"from an older copy, and {' and '.join(silent)} may run it, which can't be asked, "
                "nor shut out of its volumes; a node that is gone is to be removed (`ferry node "
                "rm --force`)"
            )
        else:
            return
        self._tell(domain, known, fence, text)
        raise ConflictError(text)

    async def record_of_guest(
        self, spec: DomainSpec, owned: OwnershipRecord | None, token: FencingToken
    ) -> tuple[OwnershipRecord, Sequence[str]]:
        """What says that the guest that runs here under `token` is the domain; and why it can't.

        Its volumes have to know the same token for their newest: else another copy has run after
        it, for all that they say, and what this one remembers of its disks is over. ConflictError:
        they are another cluster's.
        """
        await self._launches.claim(spec)
        domain, reasons = DomainName(spec.name), []
        fence = await self._launches.newest_fence(spec)
        if fence != token and any(not disk.read_only for disk in spec.disks):
            reasons.append(
                f"the guest here was launched under token {token}, and its volumes were fenced "
                f"under {fence} last: they are others by now, or another copy of it may have run "
                "since; power it off from within, and start it"
            )
        found = Others() if self._others is None else await self._others.look_for(domain)
        owner = "" if owned is None else owned.owner
        for each in found.having:
            how = (
                f"`ferry domain stop {domain}` ends that one"
                if each == owner
                else "end one of them"
            )
            reasons.append(f"{each} has a guest of it, too: {how}")
        reasons += [
            f"{each} can't be asked whether it has a guest of it, too; a node that is gone is to "
            "be removed (`ferry node rm --force`)"
            for each in found.silent
        ]
        state = OwnershipState.RUNNING
        record = OwnershipRecord(domain=domain, token=token, owner=self._node, state=state)
        return record, reasons

    def _tell(self, domain: DomainName, known: int, token: int, text: str) -> None:
        """Once for each of what is known on both sides."""
        if (domain, known, token) not in self._told:
            self._told.add((domain, known, token))
            self._events.emit(EventKind.STORE_BEHIND, text, domain=domain, token=token)
