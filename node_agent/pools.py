"""The pools of this node: those of its configuration, and those that the cluster keeps.

    agent.toml ─────► configured, for the agent's life ─┐
                                                        ├─► {name: driver}
    pools/NAME ─────► followed: there within 100 ms ────┘

A pool of the configuration hides one of the same name in the store, on this node.

Two pools of one place: `pool add` refuses the second name; in a configuration it can be written all
the same. `first_name` gives both the same one, so that their volumes are known to be the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Final

from migrator.errors import ConflictError, FerryError, NotFoundError
from migrator.model import PoolName, PoolOwner
from migrator.ports import Struct, VolumeDriver
from node_agent.background import Background
from node_agent.pool_owners import PoolOwners
from node_agent.resources import POOLS, PoolOrigin, PoolRecord
from node_agent.state.typed import TypedStore, decode
from storage.settings import PoolSettings, same_place

log = logging.getLogger(__name__)

SHUT_DOWN_S: Final = 5.0


class PoolEntry(Struct, frozen=True, kw_only=True):
    """One pool of this node."""

    settings: PoolSettings
    origin: PoolOrigin
    driver: VolumeDriver


class PoolSet(Mapping[PoolName, VolumeDriver]):
    """See the module. A mapping whose content changes; `open` and `close` it."""

    def __init__(
        self,
        configured: Sequence[PoolSettings],
        make: Callable[[PoolSettings], VolumeDriver],
        store: TypedStore,
        node: str = "",
    ) -> None:
        """`node`: who says so where it writes down whose a pool is."""
        self._make = make
        self._store = store
        self._owners = PoolOwners(store, node)
        self._entries = {
            PoolName(settings.name): PoolEntry(
                settings=settings, origin=PoolOrigin.CONFIGURATION, driver=make(settings)
            )
            for settings in configured
        }
        self._following = Background("pools")
        self._ending: set[asyncio.Task[None]] = set()
        self._marks: dict[PoolName, str] = {}
        """What the places of pools that were used by this agent said of themselves."""
        self._told: set[tuple[PoolName, PoolName]] = set()
        for each in self._entries:
            self._tell_twins(each)

    def __getitem__(self, name: PoolName) -> VolumeDriver:
        return self._entries[name].driver

    def __iter__(self) -> Iterator[PoolName]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, name: PoolName) -> PoolEntry:
        """NotFoundError names the pools that there are."""
        found = self._entries.get(name)
        if found is None:
            known = ", ".join(self) or "none"
            raise NotFoundError(f"there is no pool {name}; known: {known}")
        return found

    async def open(self) -> None:
        """Take what the store has, and follow it. StoreError: nothing was begun.

        A pool that this agent can make nothing of, a newer one's perhaps, is logged and left out.
        """
        await self._owners.open()
        for entry in await self._store.store.list_prefix(POOLS):
            name = PoolName(entry.key.removeprefix(POOLS))
            try:
                self._take(name, decode(entry.key, entry.value, PoolRecord))
            except FerryError as error:
                log.error("pool %s can't be used here: %s", name, error)
        self._following.start(self._follow())

    async def close(self) -> None:
        """Let go of every driver. Idempotent."""
        await self._following.close()
        for name in tuple(self._entries):
            self._drop(name)
        await asyncio.gather(*self._ending, return_exceptions=True)

    async def add(self, settings: PoolSettings) -> PoolEntry:
        """Write the pool down for the cluster. ConflictError: the name is taken."""
        name = PoolName(settings.name)
        if name in self._entries:
            raise ConflictError(f"there is a pool {name} already")
        record = PoolRecord(settings=settings, added_at_s=time.time())
        revision = await self._store.put_if(f"{POOLS}{name}", record, None)
        if revision is None:
            raise ConflictError(f"there is a pool {name} already")
        return self._take(name, record)

    def trial(self, settings: PoolSettings) -> contextlib.AbstractAsyncContextManager[VolumeDriver]:
        """A driver of a pool that isn't there yet, to try it."""
        return _trial(self._make(settings))

    async def claim(self, name: PoolName) -> None:
        """Before a volume of it is made, changed, deleted or opened: it must be this cluster's.

        ConflictError: it is another's. StorageError: it doesn't say. NotFoundError.
        """
        driver = self.entry(name).driver
        await self._owners.claim(name, driver)
        if name not in self._marks:
            with contextlib.suppress(FerryError):  # One that doesn't work now can't say.
                self._marks[name] = await driver.mark() or ""
                self._tell_twins(name)

    def first_name(self, name: PoolName) -> PoolName:
        """The first, by the alphabet, of the names that lead to its place here; or its own.

        By their settings; and by the storage's own mark, where it was used by both names.
        """
        entry = self._entries.get(name)
        if entry is None:
            return name
        mark = self._marks.get(name) or None
        same = [
            other
            for other, each in self._entries.items()
            if same_place(each.settings, entry.settings)
            or (mark is not None and self._marks.get(other) == mark)
        ]
        return min([name, *same])

    def _tell_twins(self, name: PoolName) -> None:
        first = self.first_name(name)
        if first != name and (first, name) not in self._told:
            self._told.add((first, name))
            log.error(
                "pool %s is the place of pool %s under a second name: remove one of them, once no "
                "domain has a disk on it",
                name,
                first,
            )

    async def claim_new(
        self, settings: PoolSettings, driver: VolumeDriver, take_from: str | None
    ) -> PoolOwner | None:
        """As `claim`, for a pool that isn't there yet; see `PoolOwners.claim`. Whose it was."""
        again = f"`ferry pool add {settings.name} ..."
        before = await driver.owner()
        await self._owners.claim(PoolName(settings.name), driver, take_from=take_from, hint=again)
        return before

    async def look(self, name: PoolName, driver: VolumeDriver) -> None:
        """As `claim`, but leaves a pool that is nobody's as it is."""
        await self._owners.look(name, driver)

    async def look_again(self, name: PoolName) -> None:
        """As `look`, at one that is there."""
        await self._owners.look(name, self.entry(name).driver)

    def is_foreign(self, owner: PoolOwner | None) -> bool:
        """Whether that is another cluster."""
        return self._owners.is_foreign(owner)

    async def take(self, name: PoolName, identity: str) -> PoolOwner:
        """Take it from the cluster of that identity; whose it was, which may be this one's.

        ConflictError: it is yet another's, or nobody's. StorageError: it is as it was.
        """
        driver = self.entry(name).driver
        before = await driver.owner()
        if before is None:
            raise ConflictError(f"pool {name} says of no cluster that it is its; nothing was done")
        await self._owners.claim(name, driver, take_from=identity)
        return before

    async def remove(self, name: PoolName) -> PoolRecord:
        """Remove it from the cluster; its volumes stay. Returns what was removed.

        ConflictError: it is a pool of the configuration, or was changed meanwhile.
        """
        if self.entry(name).origin is PoolOrigin.CONFIGURATION:
            raise ConflictError(
                f"pool {name} is in this node's configuration file; remove it there, on every node"
            )
        found = await self._store.get(f"{POOLS}{name}", PoolRecord)
        if found is None:
            raise NotFoundError(f"there is no pool {name}")
        if not await self._store.delete_if(found.key, found.revision):
            raise ConflictError(f"pool {name} was just changed; it was not removed")
        self._drop(name)
        return found.value

    async def put_back(self, record: PoolRecord) -> None:
        """Undo `remove`."""
        await self._store.put_if(f"{POOLS}{record.settings.name}", record, None)
        self._take(PoolName(record.settings.name), record)

    async def _follow(self) -> None:
        async for change in self._store.follow(POOLS, PoolRecord):
            name = PoolName(change.key.removeprefix(POOLS))
            try:
                if change.value is None:
                    self._drop_stored(name)
                else:
                    self._take(name, change.value)
            except FerryError as error:
                log.error("pool %s can't be used here: %s", name, error)

    def _take(self, name: PoolName, record: PoolRecord) -> PoolEntry:
        present = self._entries.get(name)
        if present is not None:
            if present.origin is PoolOrigin.CONFIGURATION or present.settings == record.settings:
                return present
            self._drop(name)
        driver = self._make(record.settings)
        entry = PoolEntry(settings=record.settings, origin=PoolOrigin.CLUSTER, driver=driver)
        self._entries[name] = entry
        self._tell_twins(name)
        return entry

    def _drop_stored(self, name: PoolName) -> None:
        present = self._entries.get(name)
        if present is not None and present.origin is PoolOrigin.CLUSTER:
            self._drop(name)

    def _drop(self, name: PoolName) -> None:
        entry = self._entries.pop(name, None)
        self._marks.pop(name, None)
        if entry is not None:
            task = asyncio.create_task(_shut_down(name, entry.driver), name=f"end-pool-{name}")
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)


@contextlib.asynccontextmanager
async def _trial(driver: VolumeDriver) -> AsyncIterator[VolumeDriver]:
    try:
        yield driver
    finally:
        await _shut_down(PoolName("trial"), driver)


async def _shut_down(name: PoolName, driver: VolumeDriver) -> None:
    try:
        async with asyncio.timeout(SHUT_DOWN_S):
            await driver.shut_down()
    except (FerryError, TimeoutError) as error:
        log.warning("pool %s: its driver didn't end: %s", name, error)
