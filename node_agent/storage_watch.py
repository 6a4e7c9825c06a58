"""Storage that went away under running guests is told: a guest whose disk waits looks well.

QEMU's NFS and iSCSI clients wait for their server for as long as it takes. The guest's vCPUs run on
meanwhile, and nothing is an error; so nobody would hear of it but the guest's users.

    every 10 s   one volume of each pool that guests here use: does it answer (VolumeDriver.reach)?
    it doesn't   again 2 s later, then an event; each domain's state says since when, and why
    it does      an event that says how long it was
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Final

from migrator.errors import FerryError, StorageError
from migrator.model import DomainSpec, NodeName, PoolName, VolumeName
from migrator.ports import HypervisorDriver, VolumeDriver
from node_agent.background import Background
from node_agent.events import EventKind, EventLog

log = logging.getLogger(__name__)

EVERY_S: Final = 10.0
AGAIN_S: Final = 2.0
"""Between looks while a pool doesn't answer."""
LOOK_S: Final = 8.0
"""For one look; a driver's own limits are below it, or near it."""
ANEW_S: Final = 3.0
"""For one that somebody waits for."""


class _Outage:
    """Of one pool."""

    def __init__(self, since_s: float) -> None:
        self.since_s = since_s
        self.reason = ""
        self.told = False


class StorageWatch:
    """See the module. `open` begins, `close` ends it."""

    def __init__(
        self,
        node: NodeName,
        *,
        hypervisor: HypervisorDriver,
        pools: Mapping[PoolName, VolumeDriver],
        events: EventLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._hypervisor = hypervisor
        self._pools = pools
        self._events = events
        self._clock = clock
        self._out: dict[PoolName, _Outage] = {}
        self._watching = Background("storage-watch")

    def open(self) -> None:
        self._watching.start(self._watch())

    async def close(self) -> None:
        await self._watching.close()

    def remark(self, spec: DomainSpec) -> str:
        """Which of its pools don't answer, since when and why; "": all do."""
        away = self._told_of(spec)
        return "; ".join(self._text(pool, out, out.reason) for pool, out in sorted(away.items()))

    async def troubles(self, spec: DomainSpec) -> list[str]:
        """Which of its pools were told as away, and still are; asked anew, for ANEW_S at most."""
        found: list[str] = []
        for pool, out in sorted(self._told_of(spec).items()):
            volumes = {VolumeName(disk.volume) for disk in spec.disks if disk.pool == pool}
            looks = (self._trouble_of(pool, volume, ANEW_S) for volume in sorted(volumes))
            reasons = [reason for reason in await asyncio.gather(*looks) if reason is not None]
            found += [self._text(pool, out, reason) for reason in reasons[:1]]
        return found

    def _told_of(self, spec: DomainSpec) -> dict[PoolName, _Outage]:
        pools = {PoolName(disk.pool) for disk in spec.disks}
        return {pool: out for pool, out in self._out.items() if out.told and pool in pools}

    def _text(self, pool: PoolName, out: _Outage, reason: str) -> str:
        for_s = self._clock() - out.since_s
        return f"pool {pool} hasn't answered for {for_s:.0f} s ({reason})"

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(AGAIN_S if self._out else EVERY_S)
            try:
                await self.look()
            except FerryError as error:
                log.warning("the pools of this node's guests can't be looked at: %s", error)

    async def look(self) -> None:
        """Once at each pool that is in use."""
        users: defaultdict[PoolName, list[str]] = defaultdict(list)
        volumes: dict[PoolName, VolumeName] = {}
        for spec in sorted(await self._hypervisor.launched_all(), key=lambda spec: spec.name):
            for disk in spec.disks:
                pool = PoolName(disk.pool)
                volumes.setdefault(pool, VolumeName(disk.volume))
                if spec.name not in users[pool]:
                    users[pool].append(spec.name)
        for pool in self._out.keys() - volumes.keys():
            del self._out[pool]  # Nobody here uses it any more.
        looks = (self._look_at(pool, volume, users[pool]) for pool, volume in volumes.items())
        await asyncio.gather(*looks)

    async def _look_at(self, pool: PoolName, volume: VolumeName, users: list[str]) -> None:
        began_s = self._clock()
        reason = await self._trouble_of(pool, volume, LOOK_S)
        out = self._out.get(pool)
        if reason is None:
            if out is not None:
                del self._out[pool]
                self._tell_back(pool, out)
        elif out is None:
            self._out[pool] = _Outage(began_s)
            self._out[pool].reason = reason
        else:
            out.reason = reason
            if not out.told:
                out.told = True
                self._events.emit(
                    EventKind.POOL_UNREACHABLE,
                    f"pool {pool} doesn't answer on {self._node}, and disks on it wait, of "
                    f"{', '.join(users)}: {reason}",
                    pool=pool,
                )

    def _tell_back(self, pool: PoolName, out: _Outage) -> None:
        if out.told:
            for_s = self._clock() - out.since_s
            text = f"pool {pool} answers on {self._node} again, after {for_s:.0f} s"
            self._events.emit(EventKind.POOL_REACHABLE, text, pool=pool, out_s=for_s)

    async def _trouble_of(self, pool: PoolName, volume: VolumeName, most_s: float) -> str | None:
        """Why it doesn't answer. A volume that isn't there any more is an answer."""
        driver = self._pools.get(pool)
        if driver is None:
            return None
        try:
            async with asyncio.timeout(most_s):
                await driver.reach(volume)
        except TimeoutError:
            return f"no answer in {most_s:g} s"
        except StorageError as error:
            return str(error)
        except FerryError:
            return None
        return None
