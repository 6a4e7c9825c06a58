"""The cluster's state store, as a port: a small versioned key-value store.

Keys are slash-separated paths; values are msgpack bytes of a typed struct (`TypedStore` in this
folder does the coding). Every write takes a compare on the key's revision, so that nobody
overwrites what they haven't seen. The revision is one counter for the whole store and only grows.

    nodes/NAME        NodeInfo, refreshed by the node's heartbeat
    domains/NAME      DomainRecord: the definition
    ownership/NAME    OwnershipRecord: who may run it (compare-and-set is what leases stand on)
    migrations/ID     Migration
    drains/ID         Drain; changed by compare-and-set (`node_agent.drain.records`)
    cordons/NODE      Cordon: nothing comes to a node that is kept free
    silences/NODE     Silence: what the event log was last told of its heartbeat (compare-and-set)
    pressure/TARGET   History: what was reported of it; `pressure-turn`: who moves because of that
    pools/NAME        PoolRecord: a pool that every agent has, beside those of its configuration
    cluster/identity  ClusterIdentity: what names the cluster to others, in its pools
    events/SEQ        ClusterEvent, SEQ zero-padded to 16 digits; the oldest are dropped
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Sequence
from typing import ClassVar

from migrator.ports import Struct


class Entry(Struct, frozen=True, kw_only=True):
    key: str
    value: bytes
    revision: int
    """The store's revision at which this key was last written."""


class Change(Struct, frozen=True, kw_only=True):
    key: str
    value: bytes | None
    """None: the key was deleted."""
    revision: int


class Written(Struct, frozen=True, kw_only=True):
    """What was written below a prefix after a revision, all as of one revision of the store."""

    entries: Sequence[Entry]
    """Those that are still there, by key."""
    count: int
    """How many entries there are below the prefix in all: so who keeps a copy knows of deletions.
    """
    revision: int
    """The store's, of this answer."""
    era: int = 0
    """Another one: the store may have been restored. Then nothing that is known holds any more."""


class Swap(Struct, frozen=True, kw_only=True):
    """A `put_if` that is done together with another write, or not at all."""

    key: str
    value: bytes
    expected_revision: int | None


class StateStore(abc.ABC):
    """Errors: StoreError when the store can't be used; then the outcome of a write is unknown."""

    name: ClassVar[str]

    @abc.abstractmethod
    async def open(self) -> None: ...

    @abc.abstractmethod
    async def close(self) -> None: ...

    @abc.abstractmethod
    async def get(self, key: str) -> Entry | None: ...

    @abc.abstractmethod
    async def list_prefix(self, prefix: str) -> Sequence[Entry]:
        """All entries whose key begins with `prefix`, by key, as of one revision."""

    @abc.abstractmethod
    async def list_written(self, prefix: str, since_revision: int) -> Written:
        """The entries whose key begins with `prefix` that were written after `since_revision`."""

    @abc.abstractmethod
    async def put_if(self, key: str, value: bytes, expected_revision: int | None) -> int | None:
        """Write if the key's revision is `expected_revision` (None: the key doesn't exist).

        The new revision when written, durable when this returns; None when the compare failed.
        """

    @abc.abstractmethod
    async def put(self, key: str, value: bytes) -> int:
        """Write without a compare: only for keys with one writer (heartbeats, own progress)."""

    @abc.abstractmethod
    async def append(self, prefix: str, value: bytes, *, keep: int) -> int:
        """Write under the next 16-digit sequence number below `prefix`; keep the newest `keep`.

        Returns the sequence number.
        """

    @abc.abstractmethod
    async def append_if(self, prefix: str, value: bytes, *, keep: int, swap: Swap) -> bool:
        """`append`, and `swap`, as one write: both are done, or neither.

        False when the swap's compare failed: somebody else has written its key.
        """

    @abc.abstractmethod
    async def delete_if(self, key: str, expected_revision: int) -> bool: ...

    @abc.abstractmethod
    def watch(self, prefix: str, since_revision: int | None = None) -> AsyncIterator[Change]:
        """Changes below `prefix` after `since_revision` (None: from now on), in order.

        Also those made by other processes, within 100 ms. Ends when the store is closed.
        """
