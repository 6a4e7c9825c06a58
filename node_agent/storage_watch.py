"""Storage that went away under running guests is told: a guest whose disk waits looks well.

QEMU's NFS and iSCSI clients wait for their server for as long as it takes. The guest's vCPUs run on
meanwhile, and nothing is an error; so nobody would hear of it but the guest's users.

    every 10 s   the volumes that guests here use: does each answer (VolumeDriver.reach)?
    it doesn't   again 2 s later, then an event; each domain's state says since when, and why
    it does      an event that says how long it was

What none of a pool's volumes answers to is told of the pool. Some of them may: an export, or a LUN,
can be down by itself. Of many volumes so many are looked at each time (`AT_ONCE`), in turns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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


AT_ONCE: Final = 16
"""Volumes of one pool in one look; half of them, at most, those that didn't answer before."""

Place = tuple[PoolName, VolumeName | None]
"""A volume, or a pool."""
_Users = dict[VolumeName, list[str]]
"""A pool's volumes, and the domains here that have each."""


class _Outage:
    """Of one place."""

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
        self._out: dict[Place, _Outage] = {}
        self._turns: dict[PoolName, int] = {}
        """Where in the list of its volumes the next look at a pool begins."""
        self._watching = Background("storage-watch")

    def open(self) -> None:
        self._watching.start(self._watch())

    async def close(self) -> None:
        await self._watching.close()

    def remark(self, spec: DomainSpec) -> str:
        """Which of its pools and volumes don't answer, since when and why; "": all do."""
        away = self._told_of(spec)
        return "; ".join(self._text(place, out, out.reason) for place, out in away.items())

    async def troubles(self, spec: DomainSpec) -> list[str]:
        """What of its storage was told as away, and still is; asked anew, for ANEW_S at most."""
        found: list[str] = []
        for (pool, volume), out in self._told_of(spec).items():
            volumes = {VolumeName(disk.volume) for disk in spec.disks if disk.pool == pool}
            asked = sorted(volumes) if volume is None else [volume]
            looks = (self._trouble_of(pool, each, ANEW_S) for each in asked)
            reasons = [reason for reason in await asyncio.gather(*looks) if reason is not None]
            found += [self._text((pool, volume), out, reason) for reason in reasons[:1]]
        return found

    def _told_of(self, spec: DomainSpec) -> dict[Place, _Outage]:
        """Of a pool that is away nothing more is said of its volumes."""
        found: dict[Place, _Outage] = {}
        for disk in sorted(spec.disks, key=lambda disk: (disk.pool, disk.volume)):
            pool = PoolName(disk.pool)
            for place in ((pool, None), (pool, VolumeName(disk.volume))):
                out = self._out.get(place)
                if out is not None and out.told:
                    found[place] = out
                    break
        return found

    def _text(self, place: Place, out: _Outage, reason: str) -> str:
        for_s = self._clock() - out.since_s
        return f"{_name(place)} hasn't answered for {for_s:.0f} s ({reason})"

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(AGAIN_S if self._out else EVERY_S)
            try:
                await self.look()
            except FerryError as error:
                log.warning("the pools of this node's guests can't be looked at: %s", error)

    async def look(self) -> None:
        """Once at each pool that is in use."""
        users: defaultdict[PoolName, _Users] = defaultdict(dict)
        for spec in sorted(await self._hypervisor.launched_all(), key=lambda spec: spec.name):
            for disk in spec.disks:
                volumes = users[PoolName(disk.pool)]
                volumes.setdefault(VolumeName(disk.volume), []).append(spec.name)
        for pool, volume in tuple(self._out):
            if pool not in users or (volume is not None and volume not in users[pool]):
                del self._out[pool, volume]  # Nobody here uses it any more.
        await asyncio.gather(*(self._look_at(pool, each) for pool, each in users.items()))

    async def _look_at(self, pool: PoolName, users: _Users) -> None:
        began_s = self._clock()
        volumes = self._next(pool, sorted(users))
        looks = (self._trouble_of(pool, volume, LOOK_S) for volume in volumes)
        reasons = dict(zip(volumes, await asyncio.gather(*looks), strict=True))
        failed = [reason for reason in reasons.values() if reason is not None]
        if len(failed) == len(reasons):  # What is known of single ones stays, until one answers.
            everybody = sorted({name for names in users.values() for name in names})
            self._note((pool, None), failed[0], began_s, everybody)
            return
        self._note((pool, None), None, began_s, [])
        for volume, reason in reasons.items():
            self._note((pool, volume), reason, began_s, users[volume])

    def _next(self, pool: PoolName, volumes: Sequence[VolumeName]) -> Sequence[VolumeName]:
        """Those to look at now."""
        away = [volume for volume in volumes if (pool, volume) in self._out][: AT_ONCE // 2]
        rest = [volume for volume in volumes if volume not in away]
        begin = self._turns.get(pool, 0) % len(rest) if rest else 0
        taken = (rest[begin:] + rest[:begin])[: AT_ONCE - len(away)]
        self._turns[pool] = begin + len(taken)
        return [*away, *taken]

    def _note(self, place: Place, reason: str | None, began_s: float, users: Sequence[str]) -> None:
        """`reason`: why it doesn't answer; None: it does."""
        out = self._out.get(place)
        if reason is None:
            if out is not None:
                del self._out[place]
                self._tell_back(place, out)
        elif out is None:
            self._out[place] = _Outage(began_s)
            self._out[place].reason = reason
        else:
            out.reason = reason
            if not out.told:
                out.told = True
                waits = "disks on it wait" if place[1] is None else "the disk waits"
                self._events.emit(
                    EventKind.POOL_UNREACHABLE,
                    f"{_name(place)} doesn't answer on {self._node}, and {waits}, of "
                    f"{', '.join(users)}: {reason}",
                    pool=place[0],
                )

    def _tell_back(self, place: Place, out: _Outage) -> None:
        if out.told:
            for_s = self._clock() - out.since_s
            text = f"{_name(place)} answers on {self._node} again, after {for_s:.0f} s"
            self._events.emit(EventKind.POOL_REACHABLE, text, pool=place[0], out_s=for_s)

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


def _name(place: Place) -> str:
    pool, volume = place
    return f"pool {pool}" if volume is None else f"volume {pool}/{volume}"
