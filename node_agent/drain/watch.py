"""Each agent's watch over the cluster's drains.

It follows `drains/`. A drain whose record hasn't changed for `SILENT_S` of this agent's own
monotonic clock has lost its coordinator: it is taken over, by one compare-and-set. Likewise are set
right: cordons whose drain has ended or never began, and nodes that a reboot brought back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from migrator.errors import ConflictError, FerryError
from migrator.model import NodeName, NodeState
from migrator.ports import Struct
from node_agent.background import Background
from node_agent.clocks import own_offset_s
from node_agent.drain.cordons import Cordon, read_cordons
from node_agent.drain.records import DrainRecords
from node_agent.drain.resources import DRAINS, Drain, DrainState, Operation, UndrainRequest
from node_agent.events import EventKind
from node_agent.nodes import NodeView
from node_agent.state.typed import TypedStore, Versioned

if TYPE_CHECKING:
    from node_agent.drain.service import DrainService

log = logging.getLogger(__name__)

SILENT_S: Final = 5.0
LOOK_S: Final = 1.0
ORPHAN_S: Final = 120.0
"""A cordon that doesn't say who plans its drain is set right after so long: a plan takes its time.
"""
_SETTLED: Final = {
    DrainState.DONE: NodeState.DRAINED,
    DrainState.PARTIAL: NodeState.CORDONED,
    DrainState.CANCELLED: NodeState.READY,
}


class _Known(Struct, frozen=True, kw_only=True):
    drain: Drain
    key: str
    revision: int
    changed_at: float
    """This agent's monotonic clock."""
    beat_at: float
    """The same, of when its coordinator wrote last: others may write its cancel, too."""
    beat_age_s: float
    """How old that was then, by two wall clocks: this agent may have begun to follow it later."""


class DrainWatch:
    """See the module."""

    def __init__(
        self,
        service: DrainService,
        store: TypedStore,
        records: DrainRecords,
        silent_s: float,
        look_s: float,
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._service = service
        self._store = store
        self._records = records
        self._clock = clock
        self._monotonic = monotonic
        self._silent_s = silent_s
        self._look_s = look_s
        self._known: dict[str, _Known] = {}
        self._orphans: dict[str, float] = {}
        self._following = Background("drains-follow")
        self._watching = Background("drains-watch")

    def open(self) -> None:
        self._following.start(self._follow())
        self._watching.start(self._watch())

    def drains(self) -> Sequence[Drain]:
        """As they were last heard of."""
        return [known.drain for known in self._known.values()]

    async def close(self) -> None:
        await self._watching.close()
        await self._following.close()

    async def _follow(self) -> None:
        async for change in self._store.follow(DRAINS, Drain):
            name = change.key.removeprefix(DRAINS)
            if change.value is None:
                self._known.pop(name, None)
                continue
            self._known[name] = self._heard(Versioned(change.key, change.value, change.revision))

    def _heard(self, entry: Versioned[Drain]) -> _Known:
        """A record as it was just read."""
        drain, now = entry.value, self._monotonic()
        beat_at, age_s = now, 0.0
        before = self._known.get(drain.id)
        if before is None:
            age_s = self._clock() - drain.written_at_s if drain.written_at_s else 0.0
        elif (before.drain.term, before.drain.beat) == (drain.term, drain.beat):
            beat_at, age_s = before.beat_at, before.beat_age_s
        return _Known(
            drain=drain,
            key=entry.key,
            revision=entry.revision,
            changed_at=now,
            beat_at=beat_at,
            beat_age_s=age_s,
        )

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._look_s)
            try:
                await self._take_over_silent()
                await self._set_right()
            except FerryError as error:
                log.warning("drains can't be looked after now: %s", error)
            except Exception:
                log.exception("looking after drains failed")

    async def _take_over_silent(self) -> None:
        own_name = self._service.node
        for name, known in list(self._known.items()):
            drain = known.drain
            if drain.ended or self._service.coordinates(name):
                continue
            own = drain.coordinator == own_name  # An earlier agent of this node.
            silent_s = self._monotonic() - known.changed_at
            if silent_s <= (self._look_s if own else self._silent_s):
                continue
            if not own and self._service.world.judges_in_s:  # It couldn't be heard, perhaps.
                continue
            entry = Versioned(known.key, drain, known.revision)
            unattended_s = await self._unattended_s(known)
            taken = await self._records.take(entry, own_name, unattended_s)
            if taken is not None:
                why = "was restarted" if own else f"has been silent for {silent_s:.0f} s"
                text = f"drain {name}: {drain.coordinator} {why}; {own_name} goes on"
                self._service.events.emit(EventKind.DRAIN, text, drain=name)
                self._service.begin(taken)

    async def _unattended_s(self, known: _Known) -> float:
        """For how long its coordinator has written nothing.

        By this agent's monotonic clock since it follows the record. What was before is the
        difference of two wall clocks, less what they are known to be apart.
        """
        since_s = self._monotonic() - known.beat_at
        coordinator, ahead_s = NodeName(known.drain.coordinator), 0.0
        if known.beat_age_s and coordinator != self._service.node:
            views = await self._service.world.views()
            ahead_s = _ahead_s(coordinator, self._service.node, views)
        return since_s + max(known.beat_age_s + ahead_s, 0.0)

    async def _set_right(self) -> None:
        for node, cordon in (await read_cordons(self._store)).items():
            if cordon.drain is None:
                continue
            known = self._known.get(cordon.drain)
            passing = cordon.state in (NodeState.DRAINING, NodeState.RESTORING)
            if known is None:
                if passing:
                    await self._let_go(node, cordon)
                continue
            self._orphans.pop(cordon.drain, None)
            drain = known.drain
            if passing and drain.ended:
                back = drain.operation is not Operation.DRAIN
                state = NodeState.READY if back else _SETTLED[drain.state]
                await self._service.cordons.settle(drain, state)
            elif cordon.state is NodeState.DRAINED and drain.reboot_hint:
                await self._restore_rebooted(node, drain)

    async def _let_go(self, node: NodeName, cordon: Cordon) -> None:
        """Its drain has no record: it is still being planned, or who planned it has died."""
        by, only = cordon.planned_by, frozenset({cordon.state})
        name = cordon.drain or ""
        since = self._orphans.setdefault(name, self._monotonic())
        orphan_s = self._monotonic() - since
        if not by:  # Of an agent that doesn't say so.
            if orphan_s > ORPHAN_S:
                drained = cordon.state is NodeState.DRAINING
                state = NodeState.CORDONED if drained else NodeState.READY
                await self._service.cordons.change(node, state, only)
            return
        if by == self._service.node:
            dead = not self._service.plans(name)
        else:
            view = (await self._service.world.views()).get(by)
            dead = view is None or view.state is NodeState.UNREACHABLE
            dead = dead and not self._service.world.judges_in_s
        if not dead:
            self._orphans.pop(name, None)
        elif orphan_s > self._silent_s:
            await self._service.cordons.put_back(node, cordon.before)
            text = f"node {node} is {cordon.was} again: {by} died while it planned drain {name}"
            self._service.events.emit(EventKind.DRAIN, text, drain=name)

    async def _restore_rebooted(self, node: NodeName, drain: Drain) -> None:
        """The node was drained for a reboot: has it come back from it?"""
        views = await self._service.world.views()
        view = views.get(node)
        if view is None or view.state is NodeState.UNREACHABLE or drain.restored_by is not None:
            return
        if any(each.judged_in_s for each in views.values()):
            return  # After a power cut they come back one by one, and it is undone once.
        if drain.boot_id and view.info.boot_id and view.info.boot_id != drain.boot_id:
            with contextlib.suppress(ConflictError):  # Another agent was faster.
                await self._service.undrain(node, UndrainRequest())
                text = f"node {node} was rebooted; its domains come back"
                self._service.events.emit(EventKind.DRAIN, text, drain=drain.id)


def _ahead_s(of: NodeName, node: NodeName, views: Mapping[str, NodeView]) -> float:
    """How far that node's clock is ahead of ours, as heartbeats tell. One that isn't heard has the
    clock of most nodes, which ours may be apart from."""
    view = views.get(of)
    if view is not None and view.clock_offset_s is not None:
        return view.clock_offset_s
    own_s = own_offset_s(node, {NodeName(name): each for name, each in views.items()})
    return -(own_s or 0.0)
