"""Tells the cluster's event log that a node fell silent, or is back: each change once.

    heartbeats, as read each second ──► SilenceWatch.saw() ──► silences/NODE, by compare-and-set,
                                                               with node-silent or node-back

Every agent looks, and the first to notice tells: it needn't be any certain one, which might be the
silent one, or see less than others. Nobody decides anything by it (`nodes` says who is silent).

- Who has been away itself sees everybody's heartbeat as old. So an agent tells nothing before it
  has looked each second for `settle_s`: not after its start, nor after an outage of the store.
- A change is of one heartbeat, whose revision the record has: what a slow agent still finds of an
  older one isn't told again.
- A node is back when it has been heard for as long as it may be silent, so that one which comes and
  goes is told of at most once in ten seconds.
- For how long it was silent is said by who saw it fall silent, as its own steady clock measured it:
  a wall clock may have been set meanwhile, the returning node's most of all. Else nothing is said.
- The record and the event are one write: neither is without the other, whoever dies.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from migrator.errors import FerryError
from migrator.model import NodeName, NodeState, Value
from node_agent.background import Background
from node_agent.events import EventKind, EventLog
from node_agent.nodes import GAP_S, SETTLE_S, UNREACHABLE_AFTER_S, NodeView
from node_agent.state.typed import TypedStore

log = logging.getLogger(__name__)

SILENCES: Final = "silences/"


class Silence(Value, frozen=True, kw_only=True):
    """`silences/NODE`: what was last told of it. A node without a record has always been heard."""

    node: str
    silent: bool
    revision: int
    """Of the node's heartbeat that this is about."""
    heartbeat_at_s: float
    """When that was made, by the node's own clock."""
    silent_s: float
    """So far, or of a node that is back in all; 0: who told it hadn't seen it fall silent."""
    told_by: str
    told_at_s: float


class SilenceWatch:
    """See the module. `open` starts the one task behind it; `saw` hears every look."""

    def __init__(
        self,
        node: NodeName,
        store: TypedStore,
        events: EventLog,
        *,
        settle_s: float = SETTLE_S,
        back_after_s: float = UNREACHABLE_AFTER_S,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._store = store
        self._events = events
        self._settle_s = settle_s
        self._back_after_s = back_after_s
        self._clock = clock
        self._monotonic = monotonic
        self._looked_at: float | None = None
        self._looking_since = 0.0
        self._heard: dict[NodeName, float] = {}
        """Who speaks: since when, by our monotonic clock."""
        self._last_heard: dict[NodeName, float] = {}
        """Who fell silent before our eyes: when its last heartbeat came, by the same clock."""
        self._views: Mapping[NodeName, NodeView] = {}
        self._told: dict[NodeName, bool] | None = None
        """Whether a node's silence is what was told last, as far as known; None: not read yet."""
        self._wakeup = asyncio.Event()
        self._task = Background("silences")

    def open(self) -> None:
        self._task.start(self._run())

    async def close(self) -> None:
        await self._task.close()

    def saw(self, views: Mapping[NodeName, NodeView]) -> None:
        """The heartbeats as they were just read. Never waits."""
        now = self._monotonic()
        if self._looked_at is None or now - self._looked_at > GAP_S:
            self._looking_since = now
            self._heard.clear()
            self._last_heard.clear()
        self._looked_at = now
        for name in (self._heard.keys() | self._last_heard.keys()) - views.keys():
            self._heard.pop(name, None)
            self._last_heard.pop(name, None)
        for name, view in views.items():
            if view.state is NodeState.UNREACHABLE:
                self._heard.pop(name, None)
                if view.clock_offset_s is not None:  # Else its age is what its own clock says.
                    self._last_heard.setdefault(name, now - view.heartbeat_age_s)
            else:
                self._heard.setdefault(name, now)
        self._views = views
        if now - self._looking_since >= self._settle_s:
            self._wakeup.set()

    async def _run(self) -> None:
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            try:
                await self._look()
            except FerryError as error:
                log.warning("who is silent can't be told now: %s", error)
            except Exception:
                log.exception("telling who is silent failed")

    async def _look(self) -> None:
        views, now = self._views, self._looked_at or 0.0
        told = self._told if self._told is not None else await self._read()
        for name, view in views.items():
            silence_told, heard = told.get(name, False), self._heard.get(name)
            if view.state is NodeState.UNREACHABLE:
                if not silence_told:
                    told[name] = await self._tell(name, view, None)
            elif silence_told and heard is not None:
                spoke_for_s = now - view.heartbeat_age_s - heard
                if spoke_for_s >= self._back_after_s:
                    told[name] = await self._tell(name, view, heard)
            elif not silence_told:
                self._last_heard.pop(name, None)
        for name in told.keys() - views.keys():  # Removed from the cluster.
            entry = await self._store.get(f"{SILENCES}{name}", Silence)
            if entry is not None:
                await self._store.delete_if(entry.key, entry.revision)
            del told[name]

    async def _read(self) -> dict[NodeName, bool]:
        """What was told, by whomever."""
        entries = await self._store.list_prefix(SILENCES, Silence)
        self._told = {NodeName(each.value.node): each.value.silent for each in entries}
        return self._told

    async def _tell(self, name: NodeName, view: NodeView, heard: float | None) -> bool:
        """A node fell silent (`heard` is None), or is back, if nobody has told that yet.

        Whether its silence is what was told last.
        """
        key, silent = f"{SILENCES}{name}", heard is None
        entry = await self._store.get(key, Silence)
        last = None if entry is None else entry.value
        was_silent = last is not None and last.silent
        behind = last is not None and (view.revision, silent) < (last.revision, last.silent)
        if was_silent == silent or behind:
            return was_silent
        silent_s: float | None = None
        if (since := self._last_heard.get(name)) is not None:
            until = (self._looked_at or since) if heard is None else heard
            silent_s = round(until - since, 1)
        change = Silence(
            node=name,
            silent=silent,
            revision=view.revision,
            heartbeat_at_s=view.info.heartbeat_at_s,
            silent_s=silent_s or 0.0,
            told_by=self._node,
            told_at_s=self._clock(),
        )
        kind, text = _sentence(change, silent_s)
        try:
            written = await self._events.emit_if(
                kind,
                text,
                key=key,
                replacing=change,
                expected_revision=None if entry is None else entry.revision,
                node=name,
                silent_s=silent_s,
            )
        except FerryError:
            self._told = None  # It may be told: that is to be read.
            raise
        return silent if written else was_silent  # Another agent may have been faster.


def _sentence(change: Silence, silent_s: float | None) -> tuple[EventKind, str]:
    if change.silent:
        known = "" if silent_s is None else f" for {silent_s:.0f} s"
        text = f"is silent: no heartbeat{known}; whether its guests run isn't known"
        return EventKind.NODE_SILENT, f"node {change.node} {text}"
    known = "" if silent_s is None else f" after {silent_s:.0f} s of silence"
    return EventKind.NODE_BACK, f"node {change.node} is back{known}"
