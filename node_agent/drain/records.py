"""`drains/ID` in the state store: who coordinates, and what may be written by whom.

Every write is a compare-and-set on the record's revision. A coordinator that was silent for too
long finds another's name and a higher term in the record: it has lost the drain, and stops. Only
its wish to cancel is written by others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from migrator.errors import ConflictError, NotFoundError, WrongStateError
from node_agent.drain.resources import DRAINS, CancelMode, Drain
from node_agent.state.typed import TypedStore, Versioned

KEEP: Final = 100
LATER_S: Final = 0.001
_TRIES: Final = 20


class LostError(ConflictError):
    """Another agent coordinates this drain now. Nothing was written."""


class DrainRecords:
    """Reads and writes drains. StoreError: the outcome of a write is unknown."""

    def __init__(self, store: TypedStore) -> None:
        self._store = store

    async def get(self, id: str) -> Versioned[Drain]:
        """NotFoundError if there is none."""
        entry = await self._store.get(f"{DRAINS}{id}", Drain)
        if entry is None:
            raise NotFoundError(f"there is no drain {id}")
        return entry

    async def list_versioned(self) -> Sequence[Versioned[Drain]]:
        return await self._store.list_prefix(DRAINS, Drain)

    async def list_drains(self) -> Sequence[Drain]:
        """Newest first."""
        found = [entry.value for entry in await self.list_versioned()]
        return sorted(found, key=lambda drain: drain.created_at_s, reverse=True)

    async def add(self, drain: Drain) -> Versioned[Drain]:
        """A new one; the oldest that ended are dropped beyond `KEEP`.

        It is newer than all that are there, whatever this node's clock says beside theirs: an
        undrain undoes a node's newest.
        """
        key, known = f"{DRAINS}{drain.id}", await self.list_drains()
        if known and known[0].created_at_s >= drain.created_at_s:
            later_s = known[0].created_at_s + LATER_S
            drain = msgspec.structs.replace(drain, created_at_s=later_s)
        revision = await self._store.put_if(key, drain, None)
        if revision is None:
            raise ConflictError(f"drain {drain.id} is there already")
        entries = await self.list_versioned()
        ended = sorted(
            (entry for entry in entries if entry.value.ended),
            key=lambda entry: entry.value.created_at_s,
        )
        for entry in ended[: max(0, len(ended) - KEEP)]:
            await self._store.delete_if(entry.key, entry.revision)
        return Versioned(key, drain, revision)

    async def save(self, drain: Drain, revision: int) -> tuple[int, Drain]:
        """Write as its coordinator. The new revision, and the drain as it was written: with the
        wish to cancel that came meanwhile.

        LostError: another agent took it over.
        """
        for _ in range(_TRIES):
            written = await self._store.put_if(f"{DRAINS}{drain.id}", drain, revision)
            if written is not None:
                return written, drain
            entry = await self.get(drain.id)
            theirs = entry.value
            if (theirs.coordinator, theirs.term) != (drain.coordinator, drain.term):
                raise LostError(
                    f"drain {drain.id} is coordinated by {theirs.coordinator} now; nothing written"
                )
            if theirs.cancel is not drain.cancel:
                # Theirs alone is newer: the machine hears of it as an event.
                return await self._save_over(drain, entry)
            revision = entry.revision
        raise ConflictError(f"drain {drain.id} keeps changing; it was not written")

    async def _save_over(self, drain: Drain, entry: Versioned[Drain]) -> tuple[int, Drain]:
        theirs = entry.value
        wish = msgspec.structs.replace(
            drain, cancel=theirs.cancel, cancelled_by=theirs.cancelled_by
        )
        written = await self._store.put_if(f"{DRAINS}{drain.id}", wish, entry.revision)
        if written is None:
            raise ConflictError(f"drain {drain.id} keeps changing; it was not written")
        return written, wish

    async def take(
        self, entry: Versioned[Drain], node: str, unattended_s: float = 0.0
    ) -> Versioned[Drain] | None:
        """Coordinate it from now on. None: somebody else was faster, or it goes on.

        `unattended_s`: how long nobody did.
        """
        drain = entry.value
        taken = msgspec.structs.replace(
            drain,
            coordinator=node,
            term=drain.term + 1,
            unattended_s=drain.unattended_s + unattended_s,
        )
        revision = await self._store.put_if(entry.key, taken, entry.revision)
        return None if revision is None else Versioned(entry.key, taken, revision)

    async def ask_cancel(self, id: str, mode: CancelMode, by: str = "") -> Drain:
        """Leave the wish in the record, where none as strong is. WrongStateError: it has ended.

        Who asks that moves are cancelled is heard, though somebody else asks for less right after.
        """
        for _ in range(_TRIES):
            entry = await self.get(id)
            if entry.value.ended:
                raise WrongStateError(f"drain {id}", entry.value.state, "under way")
            if entry.value.cancel in (mode, CancelMode.ABORT):
                return entry.value
            asked = msgspec.structs.replace(entry.value, cancel=mode, cancelled_by=by)
            if await self._store.put_if(entry.key, asked, entry.revision) is not None:
                return asked
        raise ConflictError(f"drain {id} keeps changing; it was left as it is")

    async def mark_restored(self, id: str, by: str) -> None:
        """An undrain has begun that undoes it."""
        for _ in range(_TRIES):
            entry = await self.get(id)
            marked = msgspec.structs.replace(entry.value, restored_by=by)
            if await self._store.put_if(entry.key, marked, entry.revision) is not None:
                return
        raise ConflictError(f"drain {id} keeps changing; it was not marked as restored")
