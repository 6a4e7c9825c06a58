"""The ownership records on top of the state store: what every lease stands on."""

from __future__ import annotations

from migrator.errors import LocalProtocolError
from migrator.model import DomainName, OwnershipRecord
from migrator.ports import OwnershipStore
from node_agent.state.port import StateStore
from node_agent.state.typed import TypedStore, Versioned

PREFIX = "ownership/"


def ownership_key(domain: str) -> str:
    """Where the record of `domain` is kept."""
    return f"{PREFIX}{domain}"


class StoreOwnership(OwnershipStore):
    """Compares by value, and writes at the revision that it compared: one read, one write.

    The read is saved where this node has seen the expected record before: a record at the revision
    that it was seen at is that record. So a handoff, in its blackout, is one write.

    A token that would shrink, or a record of another domain, is a bug: LocalProtocolError, and
    nothing is written.
    """

    def __init__(self, store: StateStore) -> None:
        self._store = TypedStore(store)
        self._seen: dict[str, Versioned[OwnershipRecord]] = {}

    async def read(self, domain: DomainName) -> OwnershipRecord | None:
        found = await self._store.get(ownership_key(domain), OwnershipRecord)
        if found is None:
            self._seen.pop(domain, None)
            return None
        self._seen[domain] = found
        return found.value

    async def compare_and_set(self, expected: OwnershipRecord | None, new: OwnershipRecord) -> bool:
        if new.token < 1 or (
            expected is not None and (new.domain != expected.domain or new.token < expected.token)
        ):
            raise LocalProtocolError(f"ownership can't pass from {expected} to {new}")
        key = ownership_key(new.domain)
        seen = self._seen.pop(new.domain, None)
        if expected is not None and seen is not None and seen.value == expected:
            written = await self._store.put_if(key, new, seen.revision)
            if written is not None:
                return True
        found = await self._store.get(key, OwnershipRecord)
        if (None if found is None else found.value) != expected:
            return False
        revision = None if found is None else found.revision
        return await self._store.put_if(key, new, revision) is not None

    async def remove(self, expected: OwnershipRecord) -> bool:
        key = ownership_key(expected.domain)
        found = await self._store.get(key, OwnershipRecord)
        if found is None or found.value != expected:
            return False
        return await self._store.delete_if(key, found.revision)
