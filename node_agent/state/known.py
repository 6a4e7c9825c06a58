"""All values below a prefix, read often: of what is known already only what was written since.

    read ──► written after revision 1204?  2 entries, 3,000 in all ──► what was known, and these
         └─► another number than that makes: some were deleted ────┐
         └─► nothing known, known for long, or an older store  ────┴─► all of them

What is read is what `TypedStore.list_prefix` would have read at the same moment: the store answers
with its revision and the number of entries, and a copy that has every entry written since, and as
many entries as there are, has the store's. One thing escapes that: a store that was restored, has
grown beyond its old revision since, and has the leader's term that it had. What is known is read
anew after `ANEW_S` therefore.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from migrator.errors import StoreError
from node_agent.state.port import Written
from node_agent.state.typed import TypedStore, Versioned

T = TypeVar("T")
ANEW_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class _Copy(Generic[T]):
    values: Mapping[str, T]
    """By key."""
    revision: int
    era: int
    whole_at_s: float
    """When all of it was read."""


class KnownPrefix(Generic[T]):
    """See the module. On one event loop; `read` may be called by several tasks at once."""

    def __init__(self, store: TypedStore, prefix: str, kind: type[T]) -> None:
        self._store = store
        self._prefix = prefix
        self._kind = kind
        self._copy: _Copy[T] | None = None

    async def read(self) -> Mapping[str, T]:
        """By key, as of one revision. StoreError: nothing is known any more."""
        try:
            copy = await self._read(self._copy)
        except StoreError:
            self._copy = None  # Whoever is away may come back as another one.
            raise
        self._copy = copy  # Older than another task's, maybe: it is true of its revision.
        return copy.values

    async def _read(self, known: _Copy[T] | None) -> _Copy[T]:
        now_s = asyncio.get_running_loop().time()
        if known is not None and now_s - known.whole_at_s < ANEW_S:
            found, written = await self._list(known.revision)
            if written.era == known.era and written.revision >= known.revision:
                values = known.values
                if found:
                    values = dict(sorted({**values, **_by_key(found)}.items()))
                if len(values) == written.count:
                    return _Copy(values, written.revision, written.era, known.whole_at_s)
        found, written = await self._list(0)
        return _Copy(_by_key(found), written.revision, written.era, now_s)

    async def _list(self, since_revision: int) -> tuple[Sequence[Versioned[T]], Written]:
        return await self._store.list_written(self._prefix, self._kind, since_revision)


def _by_key(found: Iterable[Versioned[T]]) -> dict[str, T]:
    return {each.key: each.value for each in found}
