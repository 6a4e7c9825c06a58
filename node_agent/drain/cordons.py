"""Which nodes are kept free: `cordons/NODE` in the state store. A node without a record is open.

Every check of a place to go reads it anew, last of all the destination itself when a domain
arrives. What slipped in between is found when the drain looks whether its node is empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from migrator.errors import ConflictError
from migrator.model import NodeName, NodeState, Value
from node_agent.state.typed import TypedStore

CORDONS: Final = "cordons/"
PASSING: Final = frozenset({NodeState.DRAINING, NodeState.RESTORING})
"""While a drain, or an undrain, is under way."""
_TRIES: Final = 10
"""Of a change that others keep getting in before; each try means that somebody else succeeded."""


class Cordon(Value, frozen=True, kw_only=True):
    """`state` is never `unreachable`: that is no intention."""

    node: str
    state: NodeState
    drain: str | None = None
    """The drain, or the undrain, that set it; None: an operator did."""
    since_s: float
    planned_by: str = ""
    """The agent that plans its drain, which has no record until then."""
    before: Cordon | None = None
    """What it is again if that agent dies at it; None: open."""
    by: str = ""
    """Who wants that; "": isn't known."""
    reason: str = ""
    """In their words."""

    @property
    def told(self) -> str:
        """The state, who set it and why, in words."""
        return f"{self.state}{told_by(self.by, self.reason)}"

    @property
    def was(self) -> NodeState:
        """What the node was before."""
        return NodeState.READY if self.before is None else self.before.state


def told_by(by: str, reason: str) -> str:
    """ " by user ann: its disk is replaced", or what is known of that."""
    return (f" by {by}" if by else "") + (f": {reason}" if reason else "")


async def read_cordons(store: TypedStore) -> Mapping[NodeName, Cordon]:
    """Of every node that has a record. StoreError."""
    entries = await store.list_prefix(CORDONS, Cordon)
    return {NodeName(entry.value.node): entry.value for entry in entries}


class Cordons:
    """Reads and changes them. StoreError: the outcome is unknown."""

    def __init__(self, store: TypedStore) -> None:
        self._store = store

    async def read(self, node: NodeName) -> Cordon | None:
        """None: the node is open."""
        entry = await self._store.get(f"{CORDONS}{node}", Cordon)
        return None if entry is None else entry.value

    async def state(self, node: NodeName) -> NodeState:
        """READY if there is no record."""
        cordon = await self.read(node)
        return NodeState.READY if cordon is None else cordon.state

    async def change(self, new: Cordon, allowed: frozenset[NodeState]) -> Cordon | None:
        """Set it, and return what was before. ConflictError: its state is none of `allowed`."""
        key = f"{CORDONS}{new.node}"
        for _ in range(_TRIES):
            entry = await self._store.get(key, Cordon)
            state = NodeState.READY if entry is None else entry.value.state
            if state not in allowed:
                because = "" if entry is None else _because(entry.value)
                right = " or ".join(sorted(allowed))
                raise ConflictError(f"node {new.node} is {state}{because}; it must be {right}")
            revision = None if entry is None else entry.revision
            if new.planned_by and entry is not None:
                before = msgspec.structs.replace(entry.value, before=None)
                new = msgspec.structs.replace(new, before=before)
            if new.state is NodeState.READY:
                if entry is None or await self._store.delete_if(key, entry.revision):
                    return None if entry is None else entry.value
            elif await self._store.put_if(key, new, revision) is not None:
                return None if entry is None else entry.value
        raise ConflictError(f"the cordon of node {new.node} keeps changing; it was left as it is")


def _because(cordon: Cordon) -> str:
    if cordon.drain is None:
        return ""
    known = ""
    if cordon.planned_by:
        known = f", which {cordon.planned_by} plans now"
    elif cordon.state in PASSING:
        known = f"; `ferry drains cancel {cordon.drain}` stops it"
    return f" (drain {cordon.drain}{known})"
