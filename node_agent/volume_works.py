"""What is being done to volumes, for all agents to see: nobody starts a domain on a half made one.

    resize   note it ──► does a domain that has it run? ──► resize ──► strike it
    start    win the record, RUNNING ──► is one of its volumes noted? ──► open, fence, run

Each writes down its own before it looks at the other's, so at least one of two at the same time
sees the other, also where the storage has no locks that other hosts would see (a share).

A create or clone is noted under the new volume's name. Where what is being made shows before it is
whole (`VolumeDriver.makes_at_once`), an agent that dies in the middle leaves a volume that looks
like any other. The note stays, then, and says so; deleting the volume strikes it, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

import msgspec

from migrator.errors import ConflictError, FerryError, NotFoundError, StoreError
from migrator.model import DomainSpec, NodeInfo, NodeName, PoolName, Value, VolumeName
from migrator.ports import VolumeDriver
from node_agent.background import Background, uninterrupted
from node_agent.resources import NODES
from node_agent.state.typed import TypedStore, Versioned

log = logging.getLogger(__name__)

PREFIX: Final = "volume-works/"
TOOL_ENDS_S: Final = 75.0
"""A resize's program may outlive its agent: by as long as that would have let it run."""
AGAIN_S: Final = 5.0


class Work(enum.StrEnum):
    """What is done."""

    MAKING = "made"
    RESIZING = "resized"


class VolumeWork(Value, frozen=True, kw_only=True):
    """`volume-works/POOL/VOLUME` in the store."""

    pool: str
    volume: str
    work: Work
    node: str
    agent: str
    """Which life of the node's agent."""
    since_s: float
    cut_short: bool = False
    """That one ended in the middle of it."""


class VolumeWorks:
    """See the module. `open` deals with what the node's last agent left; `close` ends that."""

    def __init__(
        self,
        store: TypedStore,
        node: NodeName,
        pools: Mapping[PoolName, VolumeDriver],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._node = node
        self._pools = pools
        self._clock = clock
        self._agent = secrets.token_hex(8)
        self._now: set[str] = set()
        """The keys of this agent's own works that go on."""
        self._tidying = Background("volume-works")

    def open(self) -> None:
        self._tidying.start(self._tidy_up())

    async def close(self) -> None:
        await self._tidying.close()

    @contextlib.asynccontextmanager
    async def noted(self, pool: PoolName, volume: VolumeName, work: Work) -> AsyncIterator[None]:
        """While the body does it. ConflictError: another agent is at it, or it is half made."""
        key = _key(pool, volume)
        note = VolumeWork(
            pool=pool,
            volume=volume,
            work=work,
            node=self._node,
            agent=self._agent,
            since_s=self._clock(),
        )
        self._now.add(key)
        try:
            revision = await self._store.put_if(key, note, None)
            if revision is None:
                await self.refuse(pool, volume)
                raise ConflictError(f"volume {pool}/{volume} was just {work} by another agent")
            try:
                yield
            finally:
                await uninterrupted(self._strike(key, revision))
        finally:
            self._now.discard(key)

    async def refuse(self, pool: PoolName, volume: VolumeName) -> None:
        """ConflictError: something is being done to it, or it is half made."""
        found = await self._store.get(_key(pool, volume), VolumeWork)
        if found is not None and not await self._is_void(found):
            raise ConflictError(_words(found.value))

    async def refuse_start(self, spec: DomainSpec) -> None:
        """Once its record is won. ConflictError."""
        notes = await self._store.list_prefix(PREFIX, VolumeWork)
        disks = {(disk.pool, disk.volume) for disk in spec.disks}
        for found in notes:
            note = found.value
            if (note.pool, note.volume) in disks and not await self._is_void(found):
                raise ConflictError(f"domain {spec.name} can't be started: {_words(note)}")

    async def forget(self, pool: PoolName, volume: VolumeName) -> None:
        """It was deleted. StoreError."""
        found = await self._store.get(_key(pool, volume), VolumeWork)
        if found is not None:
            await self._store.delete_if(found.key, found.revision)

    async def _is_void(self, found: Versioned[VolumeWork]) -> bool:
        """A resize of a node that was removed: nobody else would strike it."""
        note = found.value
        if note.work is not Work.RESIZING:
            return False
        if await self._store.get(f"{NODES}{note.node}", NodeInfo) is not None:
            return False
        await self._store.delete_if(found.key, found.revision)
        return True

    async def _strike(self, key: str, revision: int) -> None:
        with contextlib.suppress(StoreError):  # `_tidy_up` comes again.
            await self._store.delete_if(key, revision)

    # --- what was cut short --------------------------------------------------------------------

    async def _tidy_up(self) -> None:
        begun_s = asyncio.get_running_loop().time()
        while True:
            try:
                await self.tidy_up(asyncio.get_running_loop().time() - begun_s)
            except FerryError as error:
                log.warning("what the last agent did to volumes can't be looked at: %s", error)
            await asyncio.sleep(AGAIN_S)

    async def tidy_up(self, up_for_s: float) -> None:
        """Once: strike what this node's agents have left, or note that it was cut short."""
        for found in await self._store.list_prefix(PREFIX, VolumeWork):
            note = found.value
            ours = note.node == self._node and found.key not in self._now
            if not ours or note.cut_short:
                continue
            if note.work is Work.RESIZING:
                over = note.agent == self._agent or up_for_s >= TOOL_ENDS_S
            else:
                over = note.agent == self._agent or await self._is_whole_or_gone(note)
            if over:
                await self._store.delete_if(found.key, found.revision)
            elif note.work is Work.MAKING:
                left = msgspec.structs.replace(note, cut_short=True)
                await self._store.put_if(found.key, left, found.revision)
                log.error("%s", _words(left))

    async def _is_whole_or_gone(self, note: VolumeWork) -> bool:
        driver = self._pools.get(PoolName(note.pool))
        if driver is None or driver.makes_at_once:
            return driver is not None
        try:
            await driver.inspect(VolumeName(note.volume))
        except NotFoundError:
            return True
        return False


def _key(pool: str, volume: str) -> str:
    return f"{PREFIX}{pool}/{volume}"


def _words(note: VolumeWork) -> str:
    name = f"volume {note.pool}/{note.volume}"
    if note.cut_short:
        return (
            f"{name} may be half made: the agent of {note.node} ended while it was {note.work}; "
            f"delete it (`ferry volume rm {note.volume} --pool {note.pool}`) and make it anew"
        )
    remedy = (
        f"it counts as over {TOOL_ENDS_S:.0f} s after its agent is back: a program may outlive it"
    )
    if note.work is Work.MAKING:
        remedy = f"delete the volume (`ferry volume rm {note.volume} --pool {note.pool}`)"
    return f"{name} is being {note.work} by node {note.node}; if that agent died, {remedy}"
