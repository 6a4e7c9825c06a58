"""Whose a pool is: two clusters with one place would each take the other's volumes for its own.

    cluster/identity   in the store: random, made by the first agent that finds none, never changed
    .ferry.owner       beside the volumes (`storage.marks`): the identity of the cluster they are of

A volume's fence orders the nodes of one cluster; another's tokens, names and records are its own.
So whatever makes, changes, deletes or opens a volume asks first, and the first to ask of a pool
that is nobody's has it. What is open stays open: no fence, no rollback and no guest waits for this.

The identity is the store's. `cluster init --replace` and a restored snapshot leave it as it is; a
store that was begun anew is another cluster, to which an operator gives the pools (`take`).
"""

from __future__ import annotations

import secrets
import time
from typing import Final

from migrator.errors import ConflictError
from migrator.model import PoolName, PoolOwner, Value
from migrator.ports import VolumeDriver
from node_agent.state.typed import TypedStore
from node_agent.trust.records import CLUSTER, ClusterRecord

IDENTITY: Final = "cluster/identity"
_IDENTITY_BYTES: Final = 8


class ClusterIdentity(Value, frozen=True, kw_only=True):
    """`cluster/identity` in the store."""

    identity: str
    made_at_s: float


class PoolOwners:
    """See the module. `open` it first."""

    def __init__(self, store: TypedStore, node: str) -> None:
        self._store = store
        self._node = node
        self._own = PoolOwner(identity="")

    async def open(self) -> None:
        """Read the cluster's identity, or make it. StoreError."""
        entry = await self._store.get(IDENTITY, ClusterIdentity)
        if entry is None:
            fresh = ClusterIdentity(
                identity=secrets.token_hex(_IDENTITY_BYTES), made_at_s=time.time()
            )
            await self._store.put_if(IDENTITY, fresh, None)
            entry = await self._store.get(IDENTITY, ClusterIdentity)
        assert entry is not None, "nobody deletes it"
        founded = await self._store.get(CLUSTER, ClusterRecord)
        name = "" if founded is None else founded.value.name
        self._own = PoolOwner(identity=entry.value.identity, name=name, node=self._node)

    async def claim(
        self, pool: PoolName, driver: VolumeDriver, *, take_from: str | None = None, hint: str = ""
    ) -> None:
        """See to it that the pool is this cluster's.

        `take_from`: it may be that of the cluster of this identity by now. ConflictError: it is
        another one's, and nothing was done; `hint` is how to take it. StorageError: no answer.
        """
        assert self._own.identity, "it is opened first"
        found = await driver.owner(self._own, instead_of=take_from)
        self._refuse_foreign(pool, found, hint or f"`ferry pool takeover {pool}")

    async def look(self, pool: PoolName, driver: VolumeDriver) -> None:
        """As `claim`, but nothing is written down."""
        found = await driver.owner()
        self._refuse_foreign(pool, found, f"`ferry pool takeover {pool}")

    def is_foreign(self, found: PoolOwner | None) -> bool:
        """Whether that is another cluster."""
        return found is not None and found.identity != self._own.identity

    def _refuse_foreign(self, pool: PoolName, found: PoolOwner | None, hint: str) -> None:
        if found is None or not self.is_foreign(found):
            return
        raise ConflictError(
            f"pool {pool} belongs to another cluster ({found}), and this one's identity is "
            f"{self._own.identity}; nothing was done: two clusters with one place would run guests "
            "from each other's volumes. Give this cluster another place; or, if no node of that "
            f"one uses the pool any more, take it over: {hint} --from {found.identity}`"
        )
