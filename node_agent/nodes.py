"""Which nodes there are, and which of them still speak.

    nodes/NODE   NodeInfo: what the node is like. 3 KB, written when it changes and once a minute
    beats/NODE   Heartbeat: 50 bytes, every second, with the checksum of the former

Each agent writes both of its own, reads everybody's heartbeats every second, and of what nodes are
like what has changed by their checksums. All of it every second were 120 MB/s for a store of 200
nodes. A node is unreachable when its heartbeat hasn't changed for five seconds *of the reader's own
monotonic clock*: the wall clocks of two hosts are never compared, except for a heartbeat seen for
the first time, whose age is taken from its own timestamp so that a fresh agent doesn't believe in
nodes that died yesterday. How far the clocks are apart is looked at all the same, to be told
(`clocks`).

Who was away itself finds every heartbeat old: right after an agent's start, and after an outage of
the store, a silence is the listener's own as likely as the node's. Such a node is unreachable all
the same, but for `NodeView.judged_in_s` nothing may come of it that can't be undone.

Unreachable means silent, never dead: it entitles nobody to take a domain over
(ARCHITECTURE: "What keeps it to one writer").
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Final

import msgspec

from migrator.errors import FerryError, NotFoundError
from migrator.model import NodeInfo, NodeName, NodeState, Value
from migrator.ports import Struct
from node_agent.background import Background
from node_agent.drain.cordons import Cordon, read_cordons
from node_agent.resources import BEATS, NODES
from node_agent.state.typed import TypedStore
from node_agent.trust.certificates import moment

log = logging.getLogger(__name__)
_encoder: Final = msgspec.msgpack.Encoder(order="deterministic")

HEARTBEAT_S: Final = 1.0
DESCRIBED_AGAIN_S: Final = 60.0
"""After that a node describes itself once more, and is read once more, though nothing has changed:
so a record that was lost is back, and round trips, which always change, are no older than two."""
UNREACHABLE_AFTER_S: Final = 5.0
SETTLE_S: Final = 2 * UNREACHABLE_AFTER_S
"""For so long a node is listened for before its silence says something of it: others find the store
again within one of their calls' time and a heartbeat more."""
GAP_S: Final = 3.0
"""Between two looks: this agent was away, or the store."""
LISTENS_ANEW: Final = "has just begun to listen"
GOING_DOWN: Final = "going down, and its guests with it"
_ONE_BY_ONE_MAX: Final = 3
"""From there on what all nodes are like is read in one go."""
OFFSETS_KEPT: Final = 5
"""A heartbeat is read a moment after it was written, and late ones later: the largest of a few
differences is the nearest to the truth."""


class Heartbeat(Value, frozen=True, kw_only=True):
    """`beats/NODE`. `at_s`: by its wall clock. `described`: the checksum of its NodeInfo."""

    node: str
    at_s: float
    described: int = 0


def checksum(info: NodeInfo) -> int:
    """Of what a node is like, without what is another each second: to whom it has measured the
    round trip counts, but not how long it took.
    """
    measured = dict.fromkeys(info.round_trips_ms, 0.0)
    lasting = msgspec.structs.replace(info, heartbeat_at_s=0.0, round_trips_ms=measured)
    return zlib.crc32(_encoder.encode(lasting))


class NodeView(Struct, frozen=True, kw_only=True):
    """A node as this agent sees it now. `heartbeat_age_s`: since its record last changed."""

    info: NodeInfo
    state: NodeState
    heartbeat_age_s: float
    revision: int = 0
    """The store's, of that heartbeat."""
    clock_offset_s: float | None = None
    """The node's wall clock less ours, to about a second; None: no heartbeat was seen coming."""
    judged_in_s: float = 0.0
    """An unreachable node's: for so long it may well be heard yet, and nothing is to be concluded.
    """
    kept_free: str = ""
    """Who cordoned or drains it, and why, or that it goes down; "": nobody, or that isn't known."""
    barred: str = ""
    """Why nothing can be connected to it anew, and so nothing can move there or from it."""

    @property
    def silence(self) -> str:
        """Of an unreachable node, in words."""
        return f"no heartbeat for {self.heartbeat_age_s:.0f} s{not_yet(self)}"


def not_yet(view: NodeView | None) -> str:
    """That a node's silence says nothing yet, to be put behind it; "": it does, or it speaks."""
    if view is None or not view.judged_in_s:
        return ""
    return f" (the agent that says so {LISTENS_ANEW}: ask again in {view.judged_in_s:.0f} s)"


class _Seen(Struct, frozen=True, kw_only=True):
    revision: int
    at_monotonic_s: float
    offsets_s: tuple[float, ...] = ()
    """Of the latest heartbeats: the node's wall clock in them, less ours when they were read."""


def _over(since_s: float | None, now_s: float) -> bool:
    return since_s is None or now_s - since_s >= DESCRIBED_AGAIN_S


def _kept(info: NodeInfo, cordon: Cordon | None) -> tuple[NodeState, str]:
    """What a node that speaks may be used for, and why no more. A cordon says more than an end:
    who drained it before, and that it stays so in its next boot.
    """
    if cordon is not None and not (info.going_down and cordon.state.admits):
        return cordon.state, cordon.told
    return (NodeState.GOING_DOWN, GOING_DOWN) if info.going_down else (NodeState.READY, "")


def _barred(info: NodeInfo, now_s: float) -> str:
    """By the clock that would judge its certificate in a handshake. Pure."""
    until_s = info.certificate_until_s
    if until_s is None or now_s < until_s:
        return ""
    return f"its certificate has ended, on {moment(until_s)} (`ferry doctor` there says what helps)"


class NodeRegistry:
    """Writes this node's heartbeat and reads everybody's. `open` starts the one task behind it.

    `describe` gives the NodeInfo of this moment; its `heartbeat_at_s` is filled in here.
    """

    def __init__(
        self,
        store: TypedStore,
        describe: Callable[[], Awaitable[NodeInfo]],
        *,
        interval_s: float = HEARTBEAT_S,
        unreachable_after_s: float = UNREACHABLE_AFTER_S,
        settle_s: float = SETTLE_S,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._describe = describe
        self._interval_s = interval_s
        self._unreachable_after_s = unreachable_after_s
        self._settle_s = settle_s
        self._clock = clock
        self._monotonic = monotonic
        self._seen: dict[str, _Seen] = {}
        self._read_at: float | None = None
        """By our monotonic clock, as since when it has been read without a gap."""
        self._listens_since = 0.0
        self._told = 0
        """The checksum that this node was last described with, and when that was."""
        self._told_at_s: float | None = None
        self._known: dict[str, tuple[int, NodeInfo]] = {}
        """What each node is like, and the checksum that its heartbeat had when that was read."""
        self._listed_at_s: float | None = None
        self._task = Background("node-heartbeat")
        self.silent_s: float | None = None
        """Between this node's last heartbeat before `open` and that; None: it had none."""
        self.trouble = ""
        """Why this node's last heartbeat wasn't written; "": it was."""
        self.on_read: Sequence[Callable[[Mapping[NodeName, NodeView]], None]] = ()
        """Hear every node with each heartbeat."""
        self.counts: Callable[[str], bool] = lambda name: True
        """Whether a node of this name belongs here: a removed one's last heartbeat may come late.
        """
        self.goes_down: Callable[[], bool] = lambda: False
        """Whether this node's host shuts down."""

    async def open(self) -> None:
        """Write the first heartbeat and go on in the background. StoreError: nothing runs."""
        last_s = await self.last_beat_at_s()
        self.silent_s = None if last_s is None else max(0.0, self._clock() - last_s)
        await self.beat()
        await self._look()
        self._task.start(self._run())

    async def close(self) -> None:
        """End the heartbeat. The others see this node unreachable five seconds later."""
        await self._task.close()

    async def beat(self) -> None:
        """Write one heartbeat, and before it what this node is like, where that is due."""
        info = await self._describe()
        info = msgspec.structs.replace(info, going_down=self.goes_down())
        described, now = checksum(info), self._monotonic()
        if described != self._told or _over(self._told_at_s, now):
            info = msgspec.structs.replace(info, heartbeat_at_s=self._clock())
            await self._store.put(f"{NODES}{info.name}", info)
            self._told, self._told_at_s = described, now
        beat = Heartbeat(node=info.name, at_s=self._clock(), described=described)
        await self._store.put(f"{BEATS}{info.name}", beat)

    async def last_beat_at_s(self) -> float | None:
        """This node's newest heartbeat, by its own clock; None: there is none. StoreError."""
        name = (await self._describe()).name
        last = await self._store.get(f"{BEATS}{name}", Heartbeat)
        return None if last is None else last.value.at_s

    async def read(self) -> Mapping[NodeName, NodeView]:
        """Every node ever seen, by name."""
        views: dict[NodeName, NodeView] = {}
        begun = self._monotonic()
        cordons = await read_cordons(self._store)
        now = self._monotonic()
        beats = await self._store.list_prefix(BEATS, Heartbeat)
        judged_in_s = self._judged_in_s(begun)
        beats = [entry for entry in beats if self.counts(entry.value.node)]
        infos = await self._described([entry.value for entry in beats])
        for entry in beats:
            beat = entry.value
            if (info := infos.get(beat.node)) is None:  # It is being removed.
                continue
            info = msgspec.structs.replace(info, heartbeat_at_s=beat.at_s)
            seen = self._seen.get(info.name)
            if seen is None:
                age_s = max(0.0, self._clock() - beat.at_s)
                seen = _Seen(revision=entry.revision, at_monotonic_s=now - age_s)
            elif seen.revision != entry.revision:
                offset_s = beat.at_s - self._clock()
                latest = (*seen.offsets_s, offset_s)[-OFFSETS_KEPT:]
                seen = _Seen(revision=entry.revision, at_monotonic_s=now, offsets_s=latest)
            self._seen[info.name] = seen
            age_s = now - seen.at_monotonic_s
            silent = age_s > self._unreachable_after_s
            cordon = cordons.get(NodeName(info.name))
            state, kept_free = _kept(info, cordon)
            views[NodeName(info.name)] = NodeView(
                info=info,
                state=NodeState.UNREACHABLE if silent else state,
                heartbeat_age_s=round(age_s, 3),
                judged_in_s=judged_in_s if silent else 0.0,
                revision=entry.revision,
                clock_offset_s=max(seen.offsets_s, default=None),
                kept_free=kept_free,
                barred=_barred(info, self._clock()),
            )
        return views

    def _judged_in_s(self, begun: float) -> float:
        """For how long it has to listen yet. Of a look that began then, and was answered.

        A store that takes its time is not away: it is the time between two looks that counts.
        """
        now = self._monotonic()
        if self._read_at is None or begun - self._read_at > GAP_S:
            self._listens_since = begun
        self._read_at = now
        return max(0.0, self._listens_since + self._settle_s - now)

    @property
    def judges_in_s(self) -> float:
        """For how long nothing that didn't happen meanwhile may be held against anybody."""
        now = self._monotonic()
        if self._read_at is None or now - self._read_at > GAP_S:
            return self._settle_s
        return max(0.0, self._listens_since + self._settle_s - now)

    async def names(self) -> Collection[NodeName]:
        """All that have ever spoken here and were not removed, silent or not. StoreError."""
        # Not by heartbeats: a removed node's last one may come late.
        return [NodeName(e.value.name) for e in await self._store.list_prefix(NODES, NodeInfo)]

    async def get(self, node: NodeName) -> NodeView:
        """NotFoundError if no node of this name was ever seen."""
        views = await self.read()
        if node not in views:
            known = ", ".join(sorted(views)) or "none"
            raise NotFoundError(f"there is no node {node}; known: {known}")
        return views[node]

    async def _described(self, beats: Sequence[Heartbeat]) -> Mapping[str, NodeInfo]:
        """What those are like who speak: read where it has changed, all of it once a minute."""
        changed = [
            each
            for each in beats
            if (known := self._known.get(each.node)) is None or known[0] != each.described
        ]
        now = self._monotonic()
        if len(changed) > _ONE_BY_ONE_MAX or _over(self._listed_at_s, now):
            listed = {e.value.name: e.value for e in await self._store.list_prefix(NODES, NodeInfo)}
            self._known = {
                each.node: (each.described, listed[each.node])
                for each in beats
                if each.node in listed
            }
            self._listed_at_s = now
        else:
            for each in changed:
                self._known.pop(each.node, None)
                entry = await self._store.get(f"{NODES}{each.node}", NodeInfo)
                if entry is not None:
                    self._known[each.node] = (each.described, entry.value)
        return {name: info for name, (_, info) in self._known.items()}

    async def _look(self) -> None:
        views = await self.read()
        for hear in self.on_read:
            hear(views)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.beat()
                self.trouble = ""
                await self._look()
            except FerryError as error:
                self.trouble = str(error)
                log.warning("heartbeat failed, trying again in %g s: %s", self._interval_s, error)
            except Exception:
                log.exception("heartbeat failed, trying again in %g s", self._interval_s)
