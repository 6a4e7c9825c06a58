"""Whether a guest's storage answers at both ends, and is one, while the guest can still stay.

    source ── storage? ──► destination: does what its hypervisor needs of each volume answer there?
    source: does it here? and does the storage know here what the destination has opened there?

It is asked with the leave to pause the guest. A guest whose storage is away can't be paused: its
hypervisor waits for the disks first, with the guest standing still. One that was handed to a node
that can't reach the storage can't be fenced there, and stands still until that node can. And where
one pool's name leads the two nodes to different storage, the guest would go on with other disks.

What doesn't answer now may soon (a server that fails over takes its time), and a LUN forgets who is
registered when its target is restarted: so it is asked again for a while, and the guest runs on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Final

from migrator.errors import FerryError, PeerError, RefusedError, RemoteProtocolError
from migrator.model import DiskSpec, DomainSpec, FencingToken, NodeName, PoolName, VolumeName
from migrator.ports import Struct, VolumeDriver
from node_agent.peers.hub import PeerHub

log = logging.getLogger(__name__)

REACH: Final = "migration.storage"
LOOK_S: Final = 5.0
"""For one volume; a driver's own limits for a few round trips are below it, or near it."""
CALL_S: Final = 15.0
"""LOOK_S, and what a driver takes to let go of a server that hangs."""
AGAIN_S: Final = 0.5
WAIT_S: Final = 20.0
"""That the guest runs on at the source and the storage is asked again. Then nothing is moved."""


class ReachQuestion(Struct, frozen=True, kw_only=True):
    spec: DomainSpec


class ReachAnswer(Struct, frozen=True, kw_only=True):
    """Why volumes of it can't be used there now."""

    reasons: tuple[str, ...]


class StorageCheck:
    """Asks as a source, and answers as a destination. `register` before the hub starts."""

    def __init__(
        self, node: NodeName, hub: PeerHub, pools: Mapping[PoolName, VolumeDriver]
    ) -> None:
        self._node = node
        self._hub = hub
        self._pools = pools

    def register(self) -> None:
        """Serve other nodes' questions."""
        self._hub.handle(REACH, ReachQuestion, self._on_question)

    async def wait(self, spec: DomainSpec, destination: NodeName, token: FencingToken) -> None:
        """Until nothing speaks against pausing the guest. RefusedError: after WAIT_S it still does.

        `token`: under which the destination has opened the volumes.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + WAIT_S
        told: Sequence[str] = ()
        while reasons := await self._reasons(spec, destination, token):
            if loop.time() >= deadline_s:
                raise RefusedError(f"{'; '.join(reasons)} (asked for {WAIT_S:g} s)", reasons)
            if reasons != told:
                told = reasons
                log.warning("domain %s isn't paused yet: %s", spec.name, "; ".join(reasons))
            await asyncio.sleep(AGAIN_S)

    async def _reasons(
        self, spec: DomainSpec, destination: NodeName, token: FencingToken
    ) -> list[str]:
        looks = asyncio.gather(*(self._look(disk, destination, token) for disk in spec.disks))
        there, here = await asyncio.gather(self._there(spec, destination), looks)
        return [*there, *(f"node {self._node}: {each}" for each in here if each)]

    async def _there(self, spec: DomainSpec, destination: NodeName) -> list[str]:
        if not spec.disks:
            return []
        try:
            answer = await self._hub.call(
                destination, REACH, ReachQuestion(spec=spec), ReachAnswer, timeout_s=CALL_S
            )
        except RemoteProtocolError:
            return []  # An older release, which doesn't know the question.
        except PeerError as error:
            return [f"node {destination} can't be asked whether its storage answers: {error}"]
        return [f"node {destination}: {reason}" for reason in answer.reasons]

    async def _on_question(self, _: NodeName, question: ReachQuestion) -> ReachAnswer:
        looks = (self._look(disk) for disk in question.spec.disks)
        found = await asyncio.gather(*looks)
        return ReachAnswer(reasons=tuple(each for each in found if each))

    async def _look(
        self, disk: DiskSpec, opener: NodeName | None = None, token: FencingToken | None = None
    ) -> str:
        """Why the volume can't be used here now, or isn't what `opener` has opened."""
        pool, volume = self._pools.get(PoolName(disk.pool)), VolumeName(disk.volume)
        if pool is None:
            return f"it has no pool {disk.pool}"
        try:
            async with asyncio.timeout(LOOK_S):
                await pool.reach(volume)
                shows = None
                if opener is not None and token is not None and not disk.read_only:
                    shows = await pool.shows_opened(volume, opener, token)
        except TimeoutError:
            return f"the storage of volume {disk.pool}/{volume} gives no answer within {LOOK_S:g} s"
        except FerryError as error:
            return f"the storage of volume {disk.pool}/{volume} can't be used now: {error}"
        if shows is not False:
            return ""
        return (
            f"volume {disk.pool}/{volume} isn't the one that {opener} has opened: pool {disk.pool} "
            f"leads the two nodes to different storage; compare `ferry pool show {disk.pool}` on "
            "both, and what its names and paths lead to there"
        )
