"""A state store in memory with faults on request, for the simulation and the contract tests.

data = SimulatedData()              the cluster's state
n1 = SimulatedStore(data)           one node's access to it, with its own faults
n1.faults.unavailable = True        n1 is cut off; its watches fail, n2's go on
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from migrator.errors import StoreError
from node_agent.state.port import Change, Entry, StateStore, Swap, Written
from node_agent.state.watches import KEPT_CHANGES, StoreClosed, Watch, check_key, sequence_key

T = TypeVar("T")


@dataclass(slots=True)
class StoreFaults:
    """What goes wrong on one node's way to the store. May be changed at any time."""

    unavailable: bool = False
    """Every call raises StoreError and does nothing; watches fail at the next change."""
    lose_replies: bool = False
    """Writes are carried out, and then raise StoreError."""
    delay: Callable[[str], Awaitable[None]] | None = None
    """Awaited before each call, with the call's name ("put_if")."""


@dataclass(slots=True)
class SimulatedData:
    """The state that several `SimulatedStore`s share. All on one event loop."""

    entries: dict[str, Entry] = field(default_factory=dict)
    log: list[Change] = field(default_factory=list)
    revision: int = 0
    sequences: dict[str, int] = field(default_factory=dict)
    stores: list[SimulatedStore] = field(default_factory=list)

    def write(self, key: str, value: bytes | None) -> int:
        """Write or delete, tell every open store's watches, return the new revision."""
        self.revision += 1
        if value is None:
            del self.entries[key]
        else:
            self.entries[key] = Entry(key=key, value=value, revision=self.revision)
        change = Change(key=key, value=value, revision=self.revision)
        self.log.append(change)
        del self.log[:-KEPT_CHANGES]
        for store in self.stores:
            store.publish(change)
        return self.revision

    def append(self, prefix: str, value: bytes, keep: int) -> int:
        """Write under the next number below `prefix`, and return it."""
        number = self.sequences.get(prefix, 0) + 1
        key = sequence_key(prefix, number)
        self.sequences[prefix] = number
        self.write(key, value)
        oldest = sequence_key(prefix, max(0, number - max(keep, 1) + 1))
        for old in sorted(key for key in self.entries if prefix <= key < oldest):
            self.write(old, None)
        return number

    def revision_of(self, key: str) -> int | None:
        entry = self.entries.get(key)
        return None if entry is None else entry.revision


class SimulatedStore(StateStore):
    """One node's access to `data`. Deterministic: no thread, no clock."""

    name: ClassVar[str] = "simulated"

    def __init__(self, data: SimulatedData | None = None) -> None:
        self.data = data or SimulatedData()
        self.faults = StoreFaults()
        self._watches: list[Watch] = []
        self._open = False

    async def open(self) -> None:
        if self._open:
            raise StoreError("the simulated store is open already")
        await self._reach("open")
        self._open = True
        self.data.stores.append(self)

    async def close(self) -> None:
        if self._open:
            self._open = False
            self.data.stores.remove(self)
            for watch in self._watches:
                watch.end()
            self._watches = []

    async def get(self, key: str) -> Entry | None:
        await self._reach_open("get")
        return self.data.entries.get(key)

    async def list_prefix(self, prefix: str) -> Sequence[Entry]:
        await self._reach_open("list_prefix")
        entries = self.data.entries
        return [entries[key] for key in sorted(entries) if key.startswith(prefix)]

    async def list_written(self, prefix: str, since_revision: int) -> Written:
        entries = await self.list_prefix(prefix)
        return Written(
            entries=[entry for entry in entries if entry.revision > since_revision],
            count=len(entries),
            revision=self.data.revision,
        )

    async def put_if(self, key: str, value: bytes, expected_revision: int | None) -> int | None:
        check_key(key)
        await self._reach_open("put_if")
        if self.data.revision_of(key) != expected_revision:
            return None
        return self._answer(self.data.write(key, value))

    async def put(self, key: str, value: bytes) -> int:
        check_key(key)
        await self._reach_open("put")
        return self._answer(self.data.write(key, value))

    async def append(self, prefix: str, value: bytes, *, keep: int) -> int:
        await self._reach_open("append")
        return self._answer(self.data.append(prefix, value, keep))

    async def append_if(self, prefix: str, value: bytes, *, keep: int, swap: Swap) -> bool:
        check_key(swap.key)
        sequence_key(prefix, 0)
        await self._reach_open("append_if")
        if self.data.revision_of(swap.key) != swap.expected_revision:
            return False
        self.data.write(swap.key, swap.value)
        self.data.append(prefix, value, keep)
        return self._answer(True)

    async def delete_if(self, key: str, expected_revision: int) -> bool:
        await self._reach_open("delete_if")
        if self.data.revision_of(key) != expected_revision:
            return False
        self.data.write(key, None)
        return self._answer(True)

    def watch(self, prefix: str, since_revision: int | None = None) -> AsyncIterator[Change]:
        """As SqliteStore.watch."""
        if not self._open:
            raise StoreClosed("the simulated store is not open")
        watch = Watch(prefix)
        data = self.data
        known_after = data.log[0].revision - 1 if data.log else data.revision
        if self.faults.unavailable:
            watch.fail(StoreError("the simulated store is unavailable"))
        elif since_revision is not None and not known_after <= since_revision <= data.revision:
            watch.fail(StoreError(f"changes after {since_revision} are not known: list again"))
        else:
            if since_revision is not None:
                watch.offer(change for change in data.log if change.revision > since_revision)
            self._watches.append(watch)
        return watch

    def publish(self, change: Change) -> None:
        """Give a change to this node's watches; fail them if the node is cut off."""
        for watch in self._watches:
            if self.faults.unavailable:
                watch.fail(StoreError("the simulated store is unavailable"))
            else:
                watch.offer((change,))
        self._watches = [watch for watch in self._watches if not watch.over]

    async def _reach_open(self, call: str) -> None:
        if not self._open:
            raise StoreClosed("the simulated store is not open")
        await self._reach(call)

    async def _reach(self, call: str) -> None:
        if self.faults.delay is not None:
            await self.faults.delay(call)
        else:
            await asyncio.sleep(0)
        if self.faults.unavailable:
            raise StoreError("the simulated store is unavailable; nothing was written")

    def _answer(self, result: T) -> T:
        if self.faults.lose_replies:
            raise StoreError("the simulated store's answer was lost; the outcome is unknown")
        return result
