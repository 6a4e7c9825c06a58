"""What users do with pools and volumes. What is in use is refused, and by whom it is used is said.

Every agent has the same pools (`pools`), so the agent that is asked does the work itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from pathlib import Path
from typing import Final

import msgspec

from migrator.errors import (
    ConflictError,
    FerryError,
    InvalidRequest,
    NotFoundError,
    RefusedError,
    TooLargeError,
)
from migrator.model import (
    DomainName,
    NodeName,
    OwnershipState,
    PoolHealth,
    PoolName,
    PoolOwner,
    VolumeInfo,
    VolumeName,
)
from migrator.ports import VolumeDriver
from node_agent.domain_records import DomainRecords
from node_agent.events import EventKind, EventLog
from node_agent.pools import PoolEntry, PoolSet
from node_agent.resources import (
    DomainRecord,
    Pool,
    VolumeClone,
    VolumeCreate,
    VolumeResize,
)
from node_agent.volume_works import VolumeWorks, Work
from storage.settings import PoolSettings, same_place

SECTOR_BYTES: Final = 512
HEALTH_S: Final = 10.0
"""Beyond what any driver allows itself."""
SAID_AT_MOST: Final = 5
_SILENT: Final = f"no answer in {HEALTH_S:.0f} s"


class VolumeService:
    """Errors: NotFoundError (pool or volume), ConflictError (in use, or the pool is another
    cluster's), StorageError.
    """

    def __init__(
        self,
        pools: PoolSet,
        records: DomainRecords,
        events: EventLog,
        works: VolumeWorks,
        members: Callable[[], Awaitable[Collection[NodeName]]],
    ) -> None:
        """`members`: all nodes of the cluster, silent ones too; never one too few."""
        self._members = members
        self._pools = pools
        self._works = works
        self._records = records
        self._events = events

    # --- pools -------------------------------------------------------------------------------

    async def list_pools(self) -> Sequence[Pool]:
        """By name, each tried now."""
        entries = [self._pools.entry(name) for name in self._pools]
        return await asyncio.gather(*(self._resource(entry) for entry in entries))

    async def get_pool(self, pool: PoolName) -> Pool:
        """One, tried now."""
        return await self._resource(self._pools.entry(pool))

    async def add_pool(self, settings: PoolSettings, *, take_from: str | None = None) -> Pool:
        """ConflictError: the name is taken, another pool has the place, or another cluster, unless
        its identity is `take_from`; RefusedError: it doesn't work. Nothing was changed.
        """
        before: PoolOwner | None = None
        async with self._pools.trial(settings) as driver:
            health = await _health(driver)
            if health.reachable:
                await self._refuse_second_name(settings, driver)
                if settings.name not in self._pools:  # Else it is refused, and stays as it is.
                    before = await self._pools.claim_new(settings, driver, take_from)
        if not health.reachable:
            raise RefusedError(
                f"pool {settings.name} was not added: this node can't use it: {health.reason}",
                [health.reason or "it can't be reached"],
            )
        entry = await self._pools.add(settings)
        text = f"pool {settings.name} was added ({entry.driver.name})"
        if self._pools.is_foreign(before):
            text += f"; it was another cluster's: {before}"
        self._events.emit(EventKind.POOL_ADDED, text)
        return await self._resource(entry)

    async def take_pool_over(self, pool: PoolName, identity: str, user: str = "") -> Pool:
        """Make it this cluster's, which was that of the cluster with that identity. Idempotent:
        of one that is this cluster's already it says so (`already_own`), whatever the identity.

        That it isn't used there any more is the word of `user`. ConflictError: it is yet another's.
        """
        before = await self._pools.take(pool, identity)
        taken = self._pools.is_foreign(before)
        if taken:
            self._events.emit(
                EventKind.POOL_TAKEN_OVER,
                f"pool {pool} was taken over by {user or 'somebody'}; it was another cluster's: "
                f"{before}",
                pool=pool,
                user=user,
            )
        return msgspec.structs.replace(await self.get_pool(pool), already_own=not taken)

    async def _resource(self, entry: PoolEntry) -> Pool:
        health, refused = await _health(entry.driver), ""
        if health.reachable:
            try:
                async with asyncio.timeout(HEALTH_S):
                    await self._pools.look(PoolName(entry.settings.name), entry.driver)
            except ConflictError as error:
                refused = str(error)
            except (FerryError, TimeoutError) as error:
                health = PoolHealth(reachable=False, reason=str(error) or _SILENT)
        first = self._pools.first_name(PoolName(entry.settings.name))
        return Pool(
            name=entry.settings.name,
            driver=entry.driver.name,
            origin=entry.origin,
            settings=entry.settings,
            fencing=entry.driver.fencing,
            health=health,
            room=health.room,
            refused=refused,
            same_as="" if first == entry.settings.name else first,
        )

    async def _refuse_second_name(self, settings: PoolSettings, driver: VolumeDriver) -> None:
        """By two names one volume could be given to two domains, and nobody would see it."""
        mark = await driver.mark()
        for name in self._pools:
            present = self._pools.entry(name)
            same = same_place(settings, present.settings)
            if not same and mark is not None:
                with contextlib.suppress(FerryError):  # A pool that doesn't work now can't say.
                    same = await present.driver.mark() == mark
            if same and name != settings.name:  # Its own name is told as taken.
                raise ConflictError(
                    f"pool {settings.name} was not added: it would be the place of pool {name} "
                    "under a second name, and its volumes could be used twice"
                )

    async def remove_pool(self, pool: PoolName) -> None:
        """The volumes stay on the storage. ConflictError says which domains have disks on it."""
        self._pools.entry(pool)
        await self._refuse_used_pool(pool)
        removed = await self._pools.remove(pool)
        try:  # A domain may have been defined between the look and the removal.
            await self._refuse_used_pool(pool)
        except FerryError:
            await self._pools.put_back(removed)
            raise
        self._events.emit(EventKind.POOL_REMOVED, f"pool {pool} was removed; its volumes stay")

    # --- volumes -----------------------------------------------------------------------------

    async def list_volumes(self, pool: PoolName) -> Sequence[VolumeInfo]:
        """Every volume of one pool."""
        return await self._driver(pool).list_volumes()

    async def get_volume(self, pool: PoolName, volume: VolumeName) -> VolumeInfo:
        """One."""
        return await self._driver(pool).inspect(volume)

    async def create(self, pool: PoolName, request: VolumeCreate) -> VolumeInfo:
        """ConflictError if it exists. On failure nothing is left."""
        driver = self._driver(pool)
        image = None if request.image is None else Path(request.image)
        if image is not None and not image.is_absolute():
            right = "an absolute path on the node"
            raise InvalidRequest(f"image must be {right}", {"image": right})
        await self._pools.claim(pool)
        volume, capacity_bytes = VolumeName(request.name), request.capacity_bytes
        async with self._sized(pool, volume, capacity_bytes), self._making(pool, volume):
            return await driver.create(
                volume, capacity_bytes=capacity_bytes, format=request.format, image=image
            )

    @contextlib.asynccontextmanager
    async def _making(self, pool: PoolName, new: VolumeName) -> AsyncIterator[None]:
        """ConflictError: it is there, or being made. What is there is never noted as half made."""
        with contextlib.suppress(NotFoundError):
            await self._driver(pool).inspect(new)
            await self._works.refuse(pool, new)
            raise ConflictError(f"pool {pool} has a volume {new} already")
        async with self._works.noted(pool, new, Work.MAKING):
            yield

    @contextlib.asynccontextmanager
    async def _sized(
        self, pool: PoolName, volume: VolumeName, capacity_bytes: int, present_bytes: int = 0
    ) -> AsyncIterator[None]:
        """InvalidRequest, with what is free there: the storage takes no volume of that size."""
        try:
            yield
        except TooLargeError as error:
            free = (await _health(self._driver(pool))).free_bytes
            most = None if free is None else present_bytes + free
            raise _too_large(pool, volume, capacity_bytes, most) from error

    async def resize(self, pool: PoolName, volume: VolumeName, request: VolumeResize) -> VolumeInfo:
        """Grow. ConflictError while a domain that has it runs; InvalidRequest if it'd shrink."""
        driver = self._driver(pool)
        await self._refuse_running(pool, volume, "resized")
        await self._pools.claim(pool)
        present = await driver.inspect(volume)  # What isn't there is noted by nobody.
        async with self._works.noted(pool, volume, Work.RESIZING):
            await self._refuse_running(pool, volume, "resized")  # Or its start sees the note.
            await driver.evict(volume, await self._members())
            async with self._sized(pool, volume, request.capacity_bytes, present.capacity_bytes):
                return await driver.resize(volume, request.capacity_bytes)

    async def clone(self, pool: PoolName, volume: VolumeName, request: VolumeClone) -> VolumeInfo:
        """ConflictError while a domain that writes to it runs, or if one was started before the
        copy was whole: then it is deleted. Linked: if any may write to it.
        """
        driver, new = self._driver(pool), VolumeName(request.name)
        await self._pools.claim(pool)
        await self._works.refuse(pool, volume)
        if request.linked:
            users = await self._users(pool, volume, writers_only=True)
            self._refuse(pool, volume, "the base of a linked clone", users)
            async with self._making(pool, new):
                return await driver.clone(volume, new, linked=True)
        async with self._making(pool, new):
            return await self._clone(pool, volume, new)

    async def _clone(self, pool: PoolName, volume: VolumeName, new: VolumeName) -> VolumeInfo:
        driver = self._driver(pool)
        before = await self._writers(pool, volume)
        await self._refuse_running(pool, volume, "cloned", writers_only=True)
        made = await driver.clone(volume, new)
        try:
            after = await self._writers(pool, volume)
            started = [name for name, token in after.items() if token > before.get(name, 0)]
            self._refuse(pool, volume, "cloned: the domain was started meanwhile", started)
        except BaseException:
            await asyncio.shield(driver.delete(new))
            raise
        return made

    async def delete(self, pool: PoolName, volume: VolumeName) -> None:
        """ConflictError while it is a disk of a defined domain; nothing was deleted."""
        driver = self._driver(pool)
        self._refuse(pool, volume, "deleted", await self._users(pool, volume))
        await self._pools.claim(pool)
        await driver.evict(volume, await self._members())
        await driver.delete(volume)
        await self._works.forget(pool, volume)

    # --- who uses what -----------------------------------------------------------------------

    def _driver(self, pool: PoolName) -> VolumeDriver:
        return self._pools.entry(pool).driver

    async def _users(
        self, pool: PoolName, volume: VolumeName, *, writers_only: bool = False
    ) -> list[DomainName]:
        records = await self._records.list_records()
        return [
            name
            for name, only_reads in self._having(records, pool, volume)
            if not (only_reads and writers_only)
        ]

    async def _writers(self, pool: PoolName, volume: VolumeName) -> Mapping[DomainName, int]:
        """The domains that write to it when they run, with their tokens: each start takes a newer
        one. Without those that were never started.
        """
        owned = await self._records.list_ownership()
        users = await self._users(pool, volume, writers_only=True)
        return {name: owned[name].token for name in users if name in owned}

    async def _refuse_running(
        self, pool: PoolName, volume: VolumeName, what: str, *, writers_only: bool = False
    ) -> None:
        owned = await self._records.list_ownership()
        running = []
        for name in await self._users(pool, volume, writers_only=writers_only):
            record = owned.get(name)
            if record is not None and record.state is OwnershipState.RUNNING:
                running.append(f"{name}, which runs on {record.owner}")
        self._refuse(pool, volume, what, running)

    def _having(
        self, records: Mapping[DomainName, DomainRecord], pool: PoolName, volume: VolumeName
    ) -> Iterator[tuple[DomainName, bool]]:
        """The domains that have the volume, by whichever name of its pool, and whether they only
        read it.
        """
        first = self._pools.first_name(pool)
        for name, record in sorted(records.items()):
            for disk in record.spec.disks:
                if disk.volume == volume and self._pools.first_name(PoolName(disk.pool)) == first:
                    yield name, disk.read_only

    @staticmethod
    def _refuse(pool: PoolName, volume: VolumeName, what: str, users: Sequence[str]) -> None:
        if users:
            raise ConflictError(
                f"volume {pool}/{volume} is a disk of domain {_listed(users)}; it was not {what}"
            )

    async def _refuse_used_pool(self, pool: PoolName) -> None:
        records = await self._records.list_records()
        users = sorted(
            name
            for name, record in records.items()
            if any(disk.pool == pool for disk in record.spec.disks)
        )
        if users:
            raise ConflictError(
                f"pool {pool} has disks of domain {_listed(users)}; it was not removed"
            )


def _listed(users: Sequence[str]) -> str:
    more = len(users) - SAID_AT_MOST
    said = ", ".join(users[:SAID_AT_MOST])
    return f"{said} and {more} more" if more > 0 else said


def _too_large(
    pool: PoolName, volume: VolumeName, capacity_bytes: int, most_bytes: int | None
) -> InvalidRequest:
    """`most_bytes`: what there would be room for, were it filled; None: that isn't known."""
    right = "less"
    if most_bytes is not None and most_bytes < capacity_bytes:
        most_bytes -= most_bytes % SECTOR_BYTES
        right = f"at most {most_bytes} ({most_bytes / 2**30:.1f} GiB), for which there is room"
    return InvalidRequest(
        f"volume {pool}/{volume}: capacity_bytes, its size, is {capacity_bytes}, which is more "
        f"than a volume there can have; it must be {right}",
        {"capacity_bytes": right},
    )


async def _health(driver: VolumeDriver) -> PoolHealth:
    try:
        async with asyncio.timeout(HEALTH_S):
            return await driver.health()
    except TimeoutError:
        return PoolHealth(reachable=False, reason=_SILENT)
