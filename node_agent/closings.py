"""Volumes are closed when the last domain here lets go of them, and again if that didn't work.

    a domain lets go of a volume
        another domain here has it, too ──► noted: closed when that one lets go, or ends
        its storage is away             ──► noted: tried again every 10 s until it answers
        else                            ──► closed, with all that is noted of it

Drivers know a volume's openings by node and token, not by domain: closing it for one domain under
token 7 would end what another one reads by token 5. And an opening that nobody closes keeps the
volume from being deleted or resized, long after the last domain has left this node.

    STATE/closings.json   what is noted, for the next agent

Under a token that is noted the volume may have been opened anew by then. So nothing is closed while
a domain here has it, or is about to.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from migrator.errors import ConflictError, FerryError, StorageError, StoreError
from migrator.model import DiskSpec, DomainSpec, FencingToken, PoolName, VolumeName
from migrator.ports import HypervisorDriver, Struct, VolumeDriver
from migrator.unknown_fields import decode
from node_agent.background import Background
from node_agent.pools import PoolSet
from node_agent.state_file import StateFile

log = logging.getLogger(__name__)

AGAIN_S: Final = 10.0
"""Between tries to close what is noted."""

Volume = tuple[PoolName, VolumeName]


class Left(Struct, frozen=True, kw_only=True):
    """One that is still to be closed, under this token and older ones."""

    pool: str
    volume: str
    token: int


_decoder: Final = msgspec.json.Decoder(tuple[Left, ...])


class Closings:
    """See the module. `open` reads what the last agent has noted, `close` ends the tries."""

    def __init__(
        self,
        pools: Mapping[PoolName, VolumeDriver],
        launched: Callable[[], Awaitable[Sequence[DomainSpec]]],
        *,
        file: StateFile | None = None,
        look: Callable[[PoolName], Awaitable[None]] | None = None,
    ) -> None:
        """`launched`: the domains that have a process here. `file`: None: only this agent knows.

        `look`: ConflictError where a pool is another cluster's by now: it is left alone.
        """
        self._pools = pools
        self._launched = launched
        self._file = file
        self._look = look
        self._left: dict[Volume, int] = {}
        self._building: dict[str, DomainSpec] = {}
        self._turns: defaultdict[Volume, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._noted = asyncio.Event()
        self._trying = Background("closings")

    async def open(self) -> None:
        """When the hypervisor has adopted what runs. Never fails."""
        try:
            content = None if self._file is None else await self._file.read()
            found = () if content is None else decode(content, _decoder)
        except (StoreError, msgspec.DecodeError) as error:
            log.error("which volumes are still to be closed is not known: %s", error)
            found = ()
        self._left |= {(PoolName(e.pool), VolumeName(e.volume)): e.token for e in found}
        if self._left:
            self._noted.set()
        self._trying.start(self._try())

    async def close(self) -> None:
        await self._trying.close()

    @property
    def left(self) -> Sequence[Left]:
        """What is noted."""
        return [
            Left(pool=pool, volume=volume, token=token)
            for (pool, volume), token in sorted(self._left.items())
        ]

    # --- launches ----------------------------------------------------------------------------

    def begin(self, spec: DomainSpec) -> None:
        """Its volumes are about to be opened; until `end`, or while it has a process, they stay."""
        self._building[spec.name] = spec

    def end(self, spec: DomainSpec) -> None:
        """It has a process by now, or never will. Idempotent."""
        self._building.pop(spec.name, None)

    def turn(self, pool: str, volume: str) -> asyncio.Lock:
        """Held while it is opened: no close that was decided before is carried out after."""
        return self._turns[PoolName(pool), VolumeName(volume)]

    # --- closing -----------------------------------------------------------------------------

    async def let_go(self, domain: str, pool: PoolName, volume: VolumeName, token: int) -> None:
        """Close it under this token and older ones, for a domain whose process is gone. Never
        fails: what can't be done now is noted.
        """
        key = (pool, volume)
        newest = max(token, self._left.get(key, 0))
        try:
            if await self._close_unused(key, newest, without=domain):
                await self._strike({key: newest})
                return
            log.info("volume %s/%s stays open: another domain here has it", pool, volume)
        except FerryError as error:
            log.warning("domain %s: closing %s/%s: %s", domain, pool, volume, error)
        if self._left.get(key) != newest:
            self._left[key] = newest
            self._noted.set()
            await self._save()

    async def retry(self) -> None:
        """Once, each that is noted; no more of a pool that doesn't answer."""
        by_pool: defaultdict[PoolName, list[Volume]] = defaultdict(list)
        for key in sorted(self._left):
            by_pool[key[0]].append(key)
        closed = await asyncio.gather(*(self._retry_pool(*each) for each in by_pool.items()))
        await self._strike({key: token for each in closed for key, token in each.items()})

    async def _retry_pool(self, pool: PoolName, keys: Sequence[Volume]) -> Mapping[Volume, int]:
        """Those that are closed now, under which tokens."""
        if pool not in self._pools:
            return {}  # It may be configured again.
        closed: dict[Volume, int] = {}
        try:
            if self._look is not None:
                await self._look(pool)
            for key in keys:
                token = self._left.get(key)  # Meanwhile a domain may have closed it.
                if token is not None and await self._close_unused(key, token):
                    log.info("volume %s/%s is closed now", *key)
                    closed[key] = token
        except ConflictError as error:
            log.error("what is open of pool %s stays so: %s", pool, error)
            return {key: self._left[key] for key in keys if key in self._left}
        except FerryError as error:
            log.debug("pool %s: its volumes can't be closed yet: %s", pool, error)
        return closed

    async def _close_unused(self, key: Volume, token: int, *, without: str = "") -> bool:
        """False: another domain here has it."""
        pool, volume = key
        driver = self._pools.get(pool)
        if driver is None:
            raise StorageError(f"this node has no pool {pool}")
        async with self._turns[key]:
            specs = [*await self._launched(), *self._building.values()]
            users = {spec.name for spec in specs for disk in spec.disks if _of(disk) == key}
            if users - {without}:
                return False
            await driver.close(volume, FencingToken(token))
        return True

    async def _strike(self, closed: Mapping[Volume, int]) -> None:
        """What was noted since, under a newer token, stays."""
        before = len(self._left)
        for key, token in closed.items():
            if self._left.get(key, 0) <= token:
                self._left.pop(key, None)
        if len(self._left) < before:
            await self._save()

    async def _save(self) -> None:
        if self._file is None:
            return
        try:
            await self._file.write(msgspec.json.format(msgspec.json.encode(self.left), indent=2))
        except StoreError as error:
            log.error("which volumes are still to be closed was not noted: %s", error)

    async def _try(self) -> None:
        while True:
            await self._noted.wait()
            await asyncio.sleep(AGAIN_S)
            await self.retry()
            if not self._left:
                self._noted.clear()


def of_node(state: Path, pools: PoolSet, hypervisor: HypervisorDriver) -> Closings:
    """A node's, which notes them in its state directory."""
    file = StateFile(state / "closings.json")
    return Closings(pools, hypervisor.launched_all, file=file, look=pools.look_again)


def _of(disk: DiskSpec) -> Volume:
    return PoolName(disk.pool), VolumeName(disk.volume)
