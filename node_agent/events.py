"""The cluster's event log: who did what, and what happened to whom.

    emit() ──► bounded queue ──► one writer task ──► events/SEQ in the store ──► tail()

`emit` never waits, so that hypervisor callbacks and failing paths may use it. When the store is
away the writer keeps trying, and the oldest waiting events are dropped once the queue is full:
an event is a report, never a state that something else depends on. `emit_if` is for what the
store has a record of, too: it writes both, or neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

import msgspec

from migrator.errors import StoreError
from migrator.model import Value
from node_agent.background import Background
from node_agent.log_lines import one_line
from node_agent.resources import EVENTS
from node_agent.state.typed import TypedStore, decode

log = logging.getLogger(__name__)

KEEP_EVENTS: Final = 10_000
QUEUE_EVENTS: Final = 1_000
RETRY_S: Final = 1.0
HEARTBEAT: Final = ": heartbeat"
"""The comment of the API's stream of events that says that there are no new ones."""
AWAY: Final = ": away: "
"""Begins the comment that ends the API's stream of events where no more can be read now."""


class EventKind(enum.StrEnum):
    """What an event is about. New kinds may be added; a reader ignores those it doesn't know."""

    AGENT_STARTED = "agent-started"
    NODE_JOINED = "node-joined"
    NODE_REMOVED = "node-removed"
    NODE_SILENT = "node-silent"
    """Its heartbeat is missing; `data.node` is its name. Told once, by whoever notices first."""
    NODE_BACK = "node-back"
    """After `node-silent`; `data.silent_s` is how long it was, null where nobody saw it begin."""
    JOIN_TOKEN_MADE = "join-token-made"
    JOIN_REFUSED = "join-refused"
    PEER_REFUSED = "peer-refused"
    """Somebody at the agents' port was no member, or had no valid certificate."""
    CERTIFICATE_RENEWED = "certificate-renewed"
    CERTIFICATE_NOT_RENEWED = "certificate-not-renewed"
    """Though it is due; `data.left_s` is how long it holds yet. Once a day, and at its end."""
    CLOCK_DIFFERS = "clock-differs"
    """From the other nodes'; `data.offset_s` is by how much it is ahead."""
    CLOCK_AGREES = "clock-agrees"
    USER_CHANGED = "user-changed"
    USER_TOKEN_ENDS = "user-token-ends"
    """Soon, or it has; `data.left_s` is how long it holds yet. Each is told once."""
    DOMAIN_DEFINED = "domain-defined"
    DOMAIN_DELETED = "domain-deleted"
    DOMAIN_STARTED = "domain-started"
    DOMAIN_START_FAILED = "domain-start-failed"
    DOMAIN_STOPPED = "domain-stopped"
    DOMAIN_PAUSED = "domain-paused"
    DOMAIN_RESUMED = "domain-resumed"
    DOMAIN_RESET = "domain-reset"
    DOMAIN_EXITED = "domain-exited"
    DOMAIN_IO_ERROR = "domain-io-error"
    DOMAIN_PANICKED = "domain-panicked"
    DOMAIN_LOST = "domain-lost"
    """A record said that it runs here, but it doesn't."""
    DOMAIN_ADOPTED = "domain-adopted"
    DOMAIN_DESTROYED = "domain-destroyed"
    """A guest that this node didn't own any more was ended."""
    STORE_BEHIND = "store-behind"
    """A guest runs under a newer token than the store has: it isn't ended."""
    DOMAIN_TAKEN_OVER = "domain-taken-over"
    """Its node is silent, and shut out of its volumes."""
    POOL_ADDED = "pool-added"
    POOL_REMOVED = "pool-removed"
    POOL_TAKEN_OVER = "pool-taken-over"
    """From another cluster; `data.user` says that it isn't used there any more."""
    POOL_UNREACHABLE = "pool-unreachable"
    """The storage of a pool that guests of this node use doesn't answer it; `data.pool`."""
    POOL_REACHABLE = "pool-reachable"
    """After `pool-unreachable`; `data.out_s` is how long it was."""
    PRESSURE_MOVE = "pressure-move"
    HOOK_ADDED = "hook-added"
    HOOK_REMOVED = "hook-removed"
    HOOK_FAILED = "hook-failed"
    MIGRATION_STARTED = "migration-started"
    MIGRATION_STATE = "migration-state"
    MIGRATION_COMPLETED = "migration-completed"
    MIGRATION_CANCELLED = "migration-cancelled"
    MIGRATION_FAILED = "migration-failed"
    NODE_CORDONED = "node-cordoned"
    NODE_UNCORDONED = "node-uncordoned"
    DRAIN = "drain"
    """A step of a drain, an undrain or a balancing; `data.drain` is its id."""
    NETWORK_NOT_VERIFIED = "network-not-verified"
    """A migrated guest runs, but the network wasn't seen to follow; the message names a suspect."""
    NETWORK_VERIFIED = "network-verified"
    """After `network-not-verified`: the network leads to the guest now."""
    FRAMES_NOT_FORWARDED = "frames-not-forwarded"
    """What arrives for a guest at its old node is lost: the tunnel to its new one passes nothing,
    or only short frames; the message names a suspect."""
    CONNECTIONS_NOT_MOVED = "connections-not-moved"
    """A guest has moved, but stateful rules at its new place don't know its connections."""


class ClusterEvent(Value, frozen=True, kw_only=True):
    """One entry of the log. `seq` is its number in the store and the id of its SSE message."""

    seq: int = 0
    at_s: float
    kind: str
    node: str
    message: str
    domain: str | None = None
    migration: str | None = None
    data: dict[str, str | int | float | bool | None] = msgspec.field(default_factory=dict)


class EventList(Value, frozen=True, kw_only=True):
    events: tuple[ClusterEvent, ...]


class EventLog:
    """This node's end of the log. `open` starts the writer, `close` writes out and ends it."""

    def __init__(
        self, store: TypedStore, node: str, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._node = node
        self._clock = clock
        self._waiting: deque[ClusterEvent] = deque(maxlen=QUEUE_EVENTS)
        self._wakeup = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._writer = Background("event-writer")

    async def open(self) -> None:
        self._writer.start(self._write_all())

    async def close(self, timeout_s: float = 2.0) -> None:
        """Write what waits, for at most `timeout_s`, and end the writer."""
        if not self._writer.running:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        await self._writer.close()

    def emit(
        self,
        kind: EventKind,
        message: str,
        *,
        domain: str | None = None,
        migration: str | None = None,
        **data: str | int | float | bool | None,
    ) -> None:
        """Report. Never waits and never fails; see the module for what may be lost."""
        message = one_line(message)
        event = ClusterEvent(
            at_s=self._clock(),
            kind=kind.value,
            node=self._node,
            message=message,
            domain=domain,
            migration=migration,
            data=data,
        )
        log.info("%s: %s", kind.value, message)
        self._waiting.append(event)
        self._idle.clear()
        self._wakeup.set()

    async def emit_if(
        self,
        kind: EventKind,
        message: str,
        *,
        key: str,
        replacing: object,
        expected_revision: int | None,
        **data: str | int | float | bool | None,
    ) -> bool:
        """Report what the store's `key` says, in the one write that makes it say so.

        Whether it was written: not where the key's revision is another than `expected_revision`.
        StoreError: both are written, or neither. Unlike `emit` it waits, and tries once.
        """
        event = ClusterEvent(
            at_s=self._clock(), kind=kind.value, node=self._node, message=message, data=data
        )
        written = await self._store.append_if(
            EVENTS,
            event,
            keep=KEEP_EVENTS,
            key=key,
            replacing=replacing,
            expected_revision=expected_revision,
        )
        if written:
            log.info("%s: %s", kind.value, message)
        return written

    async def read(self, *, after_seq: int = 0, limit: int = 1000) -> Sequence[ClusterEvent]:
        """The newest `limit` events after `after_seq`, oldest first."""
        entries = await self._store.store.list_prefix(EVENTS)
        events = [_decode(entry.key, entry.value) for entry in entries]
        return [event for event in events if event.seq > after_seq][-limit:]

    async def tail(
        self, after_seq: int | None = None, begun: asyncio.Event | None = None
    ) -> AsyncIterator[ClusterEvent]:
        """Events after `after_seq` (None: from now on), in order, as they are written.

        Sets `begun` once the store has answered.

        Ends when the store is closed; StoreError when it can't be read. An `after_seq` from the
        future counts as None.
        """
        changes = self._store.store.watch(
            EVENTS
        )  # Begins now: nothing falls between it and the listing.
        entries = await self._store.store.list_prefix(EVENTS)
        if begun is not None:
            begun.set()
        last = _seq(entries[-1].key) if entries else 0
        if after_seq is not None and after_seq < last:
            for entry in entries:
                if _seq(entry.key) > after_seq:
                    yield _decode(entry.key, entry.value)
        async for change in changes:
            if change.value is not None and _seq(change.key) > last:
                last = _seq(change.key)
                yield _decode(change.key, change.value)

    async def _write_all(self) -> None:
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            while self._waiting:
                event = self._waiting[0]
                try:
                    await self._store.append(EVENTS, event, keep=KEEP_EVENTS)
                except StoreError as error:
                    log.warning("the store doesn't take events now: %s", error)
                    await asyncio.sleep(RETRY_S)
                    continue
                if self._waiting and self._waiting[0] is event:
                    self._waiting.popleft()
            self._idle.set()


def _seq(key: str) -> int:
    return int(key.removeprefix(EVENTS))


def _decode(key: str, value: bytes) -> ClusterEvent:
    return msgspec.structs.replace(decode(key, value, ClusterEvent), seq=_seq(key))
