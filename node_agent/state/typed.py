"""Typed values in the state store: msgspec structs, as msgpack.

A value that doesn't decode raises StoreError naming its key: somebody else wrote it. Nothing is
guessed and nothing overwritten. Fields that a newer Ferry has added are ignored; and whoever reads
a value, changes it and writes it at the revision that it was read at writes them back as they were.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import msgspec

from migrator.errors import StoreError
from migrator.unknown_fields import LeftOut, decode_keeping, merged
from node_agent.state.port import Change, Entry, StateStore, Swap, Written
from node_agent.state.watches import StoreClosed

T = TypeVar("T")
_LEFT_OUT_MAX: Final = 10_000
"""Values with unknown fields that are remembered: more than a cluster has that are read to be
changed."""
_AT_A_TIME: Final = 64
"""Values that are decoded in one go: of the largest kinds a few milliseconds."""
_RESYNC_FIRST_S: Final = 0.05
_RESYNC_LONGEST_S: Final = 1.0
_log = logging.getLogger(__name__)
_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


@dataclass(frozen=True, slots=True)
class Versioned(Generic[T]):
    """A value as it was at `revision`, to be given back to `put_if` or `delete_if`."""

    key: str
    value: T
    revision: int


@dataclass(frozen=True, slots=True)
class TypedChange(Generic[T]):
    """`value` is None where the key was deleted."""

    key: str
    value: T | None
    revision: int


class TypedStore:
    """Typed access to a `StateStore`, which its owner opens and closes. Errors: StoreError."""

    def __init__(self, store: StateStore) -> None:
        self.store = store
        self._left_out: dict[str, tuple[int, LeftOut]] = {}
        """Of values with unknown fields, as last read: their revision, and those fields."""

    async def get(self, key: str, kind: type[T]) -> Versioned[T] | None:
        """The value of `key`; None if there is none."""
        entry = await self.store.get(key)
        if entry is None:
            return None
        return self._versioned(entry, kind)

    async def list_prefix(self, prefix: str, kind: type[T]) -> Sequence[Versioned[T]]:
        """All below `prefix`, by key, as of one revision."""
        return await self._all_versioned(await self.store.list_prefix(prefix), kind)

    async def _all_versioned(
        self, entries: Sequence[Entry], kind: type[T]
    ) -> Sequence[Versioned[T]]:
        found: list[Versioned[T]] = []
        for entry in entries:
            if len(found) % _AT_A_TIME == _AT_A_TIME - 1:
                await asyncio.sleep(0)  # Others have their turn: a thousand large ones take long.
            found.append(self._versioned(entry, kind))
        return found

    async def list_written(
        self, prefix: str, kind: type[T], since_revision: int
    ) -> tuple[Sequence[Versioned[T]], Written]:
        """Those below `prefix` that were written after that revision; see `StateStore`."""
        written = await self.store.list_written(prefix, since_revision)
        return await self._all_versioned(written.entries, kind), written

    async def list_parts(self, prefix: str, kind: type[T]) -> Sequence[Versioned[T]]:
        """As `list_prefix`, of a `kind` that has only some of the values' fields, and lets the
        others be: quick, and not to be written back.
        """
        entries = await self.store.list_prefix(prefix)
        return [Versioned(e.key, _decode(e.key, e.value, kind)[0], e.revision) for e in entries]

    async def put_if(self, key: str, value: object, expected_revision: int | None) -> int | None:
        """The new revision, durable; None if the key's revision is another (None: not there)."""
        data = self._encoded(key, value, expected_revision)
        read_at, left_out = self._left_out.get(key, (None, None))
        written = await self.store.put_if(key, data, expected_revision)
        if left_out is not None and written is not None:
            self._remember(key, written, left_out if read_at == expected_revision else None)
        return written

    async def put(self, key: str, value: object) -> int:
        """Write without a compare, for keys with one writer. The new revision."""
        return await self.store.put(key, _encoder.encode(value))

    async def append(self, prefix: str, value: object, *, keep: int) -> int:
        """Write under the next sequence number below `prefix` ("events/") and return it."""
        return await self.store.append(prefix, _encoder.encode(value), keep=keep)

    async def append_if(
        self,
        prefix: str,
        value: object,
        *,
        keep: int,
        key: str,
        replacing: object,
        expected_revision: int | None,
    ) -> bool:
        """`append` of `value`, and `put_if` of `replacing` at `key`: one write.

        Whether it was done: not where the key's revision is another.
        """
        swap = Swap(
            key=key,
            value=self._encoded(key, replacing, expected_revision),
            expected_revision=expected_revision,
        )
        self._left_out.pop(key, None)  # At which revision it is from now on isn't known.
        return await self.store.append_if(prefix, _encoder.encode(value), keep=keep, swap=swap)

    async def delete_if(self, key: str, expected_revision: int) -> bool:
        """Whether it was deleted: only at that revision."""
        return await self.store.delete_if(key, expected_revision)

    def _encoded(self, key: str, value: object, expected_revision: int | None) -> bytes:
        """With what was left out of the value that it is to replace."""
        data = _encoder.encode(value)
        read_at, left_out = self._left_out.get(key, (None, None))
        if left_out is not None and read_at == expected_revision:
            data = _encoder.encode(merged(msgspec.msgpack.decode(data), left_out))
        return data

    def _versioned(self, entry: Entry, kind: type[T]) -> Versioned[T]:
        value, left_out = _decode(entry.key, entry.value, kind)
        if self._left_out.get(entry.key, (0, None))[0] <= entry.revision:
            self._remember(entry.key, entry.revision, left_out)
        return Versioned(entry.key, value, entry.revision)

    def _remember(self, key: str, revision: int, left_out: LeftOut | None) -> None:
        self._left_out.pop(key, None)
        if left_out is None:
            return
        while len(self._left_out) >= _LEFT_OUT_MAX:
            del self._left_out[next(iter(self._left_out))]
        self._left_out[key] = (revision, left_out)

    def watch(
        self, prefix: str, kind: type[T], since_revision: int | None = None
    ) -> AsyncIterator[TypedChange[T]]:
        """Changes after `since_revision` (None: from this call on). StoreError: list again."""
        return self._typed(self.store.watch(prefix, since_revision), kind)

    async def follow(self, prefix: str, kind: type[T]) -> AsyncIterator[TypedChange[T]]:
        """First what is there, then every change, until the store is closed. Never raises.

        Where a watch fails (too slow, store unavailable) it lists again and gives what differs,
        deletions too; so a consumer that keeps a copy has the store's state in the end, though
        not every value in between. A value that doesn't decode is logged and skipped.
        """
        known: dict[str, int] = {}
        pause_s = _RESYNC_FIRST_S
        while True:
            try:
                changes = self.store.watch(prefix)
                entries = await self.store.list_prefix(prefix)
                for key in known.keys() - {entry.key for entry in entries}:
                    yield TypedChange(key, None, known.pop(key))
                for entry in entries:
                    change = Change(key=entry.key, value=entry.value, revision=entry.revision)
                    if known.get(entry.key) != entry.revision:
                        for typed in self._decoded_or_logged(change, known, kind):
                            yield typed
                pause_s = _RESYNC_FIRST_S
                async for change in changes:
                    if change.revision > known.get(change.key, 0):
                        for typed in self._decoded_or_logged(change, known, kind):
                            yield typed
                return
            except StoreClosed:
                return
            except StoreError as error:
                _log.warning("following %s: %s; listing again in %g s", prefix, error, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RESYNC_LONGEST_S)

    def _decoded_or_logged(
        self, change: Change, known: dict[str, int], kind: type[T]
    ) -> Sequence[TypedChange[T]]:
        """The typed change, if the follower should see it; `known` is brought up to it."""
        if change.value is None:
            seen = known.pop(change.key, None)
            return [] if seen is None else [TypedChange(change.key, None, change.revision)]
        known[change.key] = change.revision
        try:
            return [self._change(change, kind)]
        except StoreError as error:
            _log.error("%s", error)
            return []

    async def _typed(
        self, changes: AsyncIterator[Change], kind: type[T]
    ) -> AsyncIterator[TypedChange[T]]:
        async for change in changes:
            yield self._change(change, kind)

    def _change(self, change: Change, kind: type[T]) -> TypedChange[T]:
        value, left_out = None, None
        if change.value is not None:
            value, left_out = _decode(change.key, change.value, kind)
        if left_out is not None or change.key in self._left_out:
            self._remember(change.key, change.revision, left_out)
        return TypedChange(change.key, value, change.revision)


def decode(key: str, data: bytes, kind: type[T]) -> T:
    """The value of `key`. StoreError naming the key, and the field, if it isn't a `kind`."""
    return _decode(key, data, kind)[0]


def _decode(key: str, data: bytes, kind: type[T]) -> tuple[T, LeftOut | None]:
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        value: tuple[T, LeftOut | None] = decode_keeping(data, decoder)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StoreError(
            f"the state store's {key} is not a {kind.__name__}: {error}; it was left as it is"
        ) from error
    return value
