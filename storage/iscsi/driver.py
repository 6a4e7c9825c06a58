"""LUNs as volumes: one LUN a volume, two fences, QEMU's own iSCSI client.

    open    grant (the target admits this node) ── log in, look: a stranger? fenced by a newer
            token? ── register ── keep the session for the fence
    fence   both at once:
            PREEMPT by the reservation key      a QEMU that runs elsewhere is shut out
            the target admits this node alone   and stays out, though a restarted target may
                                                have forgotten every reservation

QEMU registers its own sessions (`hypervisor/qemu/iscsi_shim.c`) by the key that `open` gives it.
The reservation's holder is the winner's mark; it needs no open session. What this node opened last
is what its hypervisor runs: a key names the node beside the token, so a fence leaves the own node
in, whatever token it was opened under.

A node that didn't win a token can't complete the winner's fence: the target doesn't admit it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

from migrator.errors import (
    ConflictError,
    FenceError,
    FerryError,
    NotFoundError,
    StorageError,
)
from migrator.model import (
    BlockSource,
    DiskFormat,
    Fencing,
    FencingToken,
    IscsiSource,
    NodeName,
    PoolHealth,
    PoolName,
    PoolOwner,
    VolumeInfo,
    VolumeName,
)
from migrator.ports import VolumeDriver
from storage import raw_only
from storage.half_made import made, to_its_end
from storage.holder_keys import HolderKey, key_of, parse_key
from storage.iscsi import portals
from storage.iscsi.copying import LunEnd, copy_to_lun
from storage.iscsi.names import iqn_part
from storage.iscsi.provisioner import Lun, Provisioner
from storage.iscsi.reservations import Reservations, Unknown, fence, look, refuse_outranked
from storage.iscsi.secrets import ChapFile
from storage.iscsi.session import IscsiSession
from storage.names import (
    check_growth,
    check_volume_name,
)

HEALTH_TIMEOUT_S: Final = 4.0
FENCE_TIMEOUT_S: Final = 10.0

_log = logging.getLogger(__name__)


class _Opened:
    """A registered session that waits for its fence, and who held the LUN when it registered."""

    def __init__(self, session: IscsiSession, key: HolderKey, held: HolderKey | None) -> None:
        self.session = session
        self.key = key
        self.held: HolderKey | Unknown | None = held
        self.persist = False


class IscsiPool(VolumeDriver):
    """One node's view of one pool. Errors: the port's; LoginError (StorageError) at a login."""

    name: ClassVar[str] = "iscsi"
    makes_at_once: ClassVar[bool] = False

    def __init__(
        self,
        pool: PoolName,
        node: NodeName,
        provisioner: Provisioner,
        *,
        initiator_prefix: str,
        chap: ChapFile | None = None,
    ) -> None:
        """`initiator_prefix`: the node's name makes the initiator name of it."""
        self._pool = pool
        self._node = node
        self._provisioner = provisioner
        self._initiator = f"{initiator_prefix}:{iqn_part(node)}"
        self._chap = chap
        self._opened: dict[VolumeName, _Opened] = {}
        self._known: dict[VolumeName, Lun] = {}
        """Where the volumes are that this node uses."""
        self._locks: dict[VolumeName, asyncio.Lock] = {}
        self._persist: dict[str, bool] = {}
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def fencing(self) -> Fencing:
        method = "persistent reservations: the LUN refuses the writes of every other session"
        if self._provisioner.fences:
            method += ", and the target admits no other node, also after its restart"
        else:
            method += (
                "; a target that forgets them in a restart (no PTPL) lets a stale node in again"
            )
        return Fencing(remote_writers=True, method=method)

    async def health(self) -> PoolHealth:
        """Also of the portals of what is used here."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                found = await self._provisioner.health()
        except TimeoutError:
            return PoolHealth(
                reachable=False, reason=f"no answer in {HEALTH_TIMEOUT_S:g} s from the provisioner"
            )
        except FerryError as error:
            return PoolHealth(reachable=False, reason=str(error))
        trouble = await portals.trouble_of({lun.portal for lun in self._known.values()})
        return found if trouble is None else PoolHealth(reachable=False, reason=trouble)

    async def mark(self) -> str | None:
        return await self._provisioner.mark()

    async def owner(
        self, claimant: PoolOwner | None = None, *, instead_of: str | None = None
    ) -> PoolOwner | None:
        return await self._provisioner.owner(claimant, instead_of)

    # --- volumes ---

    async def create(
        self,
        volume: VolumeName,
        *,
        capacity_bytes: int,
        format: DiskFormat,
        image: Path | None = None,
    ) -> VolumeInfo:
        """A new LUN, with what `image` holds. Raw only: a LUN's bytes are the disk's."""
        await raw_only.check_new(
            f"pool {self._pool}",
            volume,
            capacity_bytes=capacity_bytes,
            format=format,
            image=image,
            why_raw="a LUN's bytes are the disk's",
        )
        async with self._made(volume, capacity_bytes):
            if image is not None:
                lun = await self._provisioner.grant(volume, self._initiator)
                await copy_to_lun(f"pool {self._pool}", image, await self._end(lun))
            return await self.inspect(volume)

    async def clone(
        self, volume: VolumeName, new: VolumeName, *, linked: bool = False
    ) -> VolumeInfo:
        """A full copy, read and written by this node."""
        raw_only.check_clone(self.name, volume, new, linked=linked)
        source = await self._provisioner.inspect(volume)
        async with self._made(new, source.capacity_bytes):
            source = await self._provisioner.grant(volume, self._initiator)
            target = await self._provisioner.grant(new, self._initiator)
            await copy_to_lun(
                f"pool {self._pool}", await self._end(source), await self._end(target)
            )
            return await self.inspect(new)

    def _made(
        self, volume: VolumeName, capacity_bytes: int
    ) -> contextlib.AbstractAsyncContextManager[None]:
        """A new LUN for the body to fill; gone again if that, or the making itself, fails."""
        return made(
            self._provisioner.create(volume, capacity_bytes),
            lambda: self._provisioner.delete(volume),
            f"pool {self._pool}: LUN {volume}",
        )

    async def inspect(self, volume: VolumeName) -> VolumeInfo:
        check_volume_name(volume)
        return self._info(volume, await self._provisioner.inspect(volume))

    async def list_volumes(self) -> Sequence[VolumeInfo]:
        found = await self._provisioner.list_luns()
        return [self._info(volume, found[volume]) for volume in sorted(found)]

    async def resize(self, volume: VolumeName, capacity_bytes: int) -> VolumeInfo:
        check_volume_name(volume)
        present = await self.inspect(volume)
        check_growth(volume, present.capacity_bytes, capacity_bytes)
        await self._let_go(volume)
        if capacity_bytes > present.capacity_bytes:
            lun = await self._provisioner.resize(volume, capacity_bytes)
            return self._info(volume, lun)
        return present

    async def delete(self, volume: VolumeName) -> None:
        check_volume_name(volume)
        await self._let_go(volume)
        await self._provisioner.delete(volume)

    # --- who may write ---

    async def open(
        self, volume: VolumeName, token: FencingToken, *, read_only: bool
    ) -> BlockSource:
        """Check everything that can be wrong, before anything changes at the LUN.

        LoginError: portal, CHAP, target or LUN; ForeignReservationError: a stranger's LUN;
        FenceError: a newer token has fenced.
        """
        check_volume_name(volume)
        key = key_of(self._node, token)
        async with self._lock(volume):
            await self._refuse_old(volume, token)
            lun = self._known[volume] = await self._provisioner.grant(volume, self._initiator)
            chap_file = await self._chap_file()
            opened = self._opened.get(volume)
            if opened is None or opened.key != key or read_only:
                await self._close_session(volume)
                opened = await self._log_in(lun, key, volume, register=not read_only)
                if read_only:
                    await opened.session.close()
                else:
                    self._opened[volume] = opened
        return IscsiSource(
            portal=lun.portal,
            target=lun.target,
            lun=lun.lun,
            format=DiskFormat.RAW,
            read_only=read_only,
            initiator_name=self._initiator,
            chap_user=None if self._chap is None else self._chap.user,
            chap_secret_file=chap_file,
            reservation_key=None if read_only else key.value,
        )

    async def close(self, volume: VolumeName, token: FencingToken) -> None:
        """Forget the session that waits for a fence. What the target knows stays: see `open`."""
        async with self._lock(volume):
            opened = self._opened.get(volume)
            self._known.pop(volume, None)
            if opened is not None and opened.key.token <= token:
                await self._close_session(volume)

    async def fence(self, volume: VolumeName, token: FencingToken) -> None:
        check_volume_name(volume)
        key = key_of(self._node, token)
        async with self._lock(volume):
            try:
                async with asyncio.timeout(FENCE_TIMEOUT_S):
                    await self._fence(volume, token, key)
            except (FenceError, NotFoundError, ConflictError):
                raise
            except (StorageError, TimeoutError) as error:
                raise FenceError(
                    f"volume {volume}: fence {token} is unconfirmed: {error or 'no answer in time'}"
                ) from error

    async def _fence(self, volume: VolumeName, token: FencingToken, key: HolderKey) -> None:
        opened = self._opened.pop(volume, None)
        if opened is not None and opened.key != key:
            self._end_later(opened.session)
            opened = None
        admitting = asyncio.ensure_future(self._provisioner.fence(volume, token, self._initiator))
        try:
            if opened is not None:
                try:
                    await self._reserve(opened, volume)
                except StorageError as error:
                    if isinstance(error, FenceError):
                        raise
                    opened = None  # The session was long idle, and is gone: make another.
            if opened is None:
                await asyncio.shield(admitting)  # Until then the target may not admit this node.
                lun = await self._provisioner.inspect(volume)
                opened = await self._log_in(lun, key, volume, register=False)
                await self._reserve(opened, volume)
        except BaseException:
            await asyncio.wait({admitting}, timeout=FENCE_TIMEOUT_S)
            if admitting.done() and not admitting.cancelled():
                admitting.exception()
            raise
        await admitting

    async def _reserve(self, opened: _Opened, volume: VolumeName) -> None:
        try:
            await fence(
                Reservations(opened.session),
                opened.key,
                f"volume {volume}",
                persist=opened.persist,
                held=opened.held,
            )
        finally:
            self._end_later(opened.session)

    async def verify(self, volume: VolumeName) -> FencingToken | None:
        check_volume_name(volume)
        lun = await self._provisioner.inspect(volume)
        if self._provisioner.fences:
            return await self._provisioner.token(volume)
        async with await self._connect(lun) as session:
            held, _ = await look(Reservations(session), f"volume {volume}")
        return None if held is None else held.token

    async def reach(self, volume: VolumeName) -> None:
        """Also the portal, by a login: who makes the LUNs may answer while they don't."""
        check_volume_name(volume)
        async with await self._connect(await self._lun(volume)) as session:
            await look(Reservations(session), f"volume {volume}")

    async def shows_opened(
        self, volume: VolumeName, node: NodeName, token: FencingToken
    ) -> bool | None:
        """By its registration. StorageError: not even this node's is there (a restarted target)."""
        check_volume_name(volume)
        async with await self._connect(await self._lun(volume)) as session:
            _, keys = await look(Reservations(session), f"volume {volume}")
        wanted, own = key_of(node, token), key_of(self._node, token).node
        if wanted.value in keys:
            return True
        if not any((key := parse_key(value)) and key.node == own for value in keys):
            raise StorageError(
                f"volume {volume}: its LUN has no registration of {self._node} now, whose "
                "hypervisor must renew it: the target was restarted, or can't be reached"
            )
        return False

    async def shut_down(self) -> None:
        for volume in tuple(self._opened):
            async with self._lock(volume):
                await self._close_session(volume)
        await asyncio.gather(*self._ending, return_exceptions=True)

    async def grant(self, volume: VolumeName, initiator: str | None = None) -> Lun:
        """Have the target admit an initiator, this node's by default. Not after a newer fence."""
        return await self._provisioner.grant(volume, initiator or self._initiator)

    # --- parts ---

    def _lock(self, volume: VolumeName) -> asyncio.Lock:
        return self._locks.setdefault(volume, asyncio.Lock())

    async def _refuse_old(self, volume: VolumeName, token: FencingToken) -> None:
        newest = await self._provisioner.token(volume)
        if newest is not None and token < newest:
            raise FenceError(f"volume {volume} is fenced by token {newest}, not opened: {token}")

    async def _lun(self, volume: VolumeName) -> Lun:
        """As its hypervisor was told where it is; a site's hook may be slow to say it again."""
        if volume not in self._known:
            self._known[volume] = await self._provisioner.inspect(volume)
        return self._known[volume]

    async def _connect(self, lun: Lun) -> IscsiSession:
        credentials = None if self._chap is None else await self._chap.read()
        return await IscsiSession.connect(lun.address, self._initiator, credentials)

    async def _log_in(
        self, lun: Lun, key: HolderKey, volume: VolumeName, *, register: bool
    ) -> _Opened:
        """Log in, look who has the LUN, register. On failure nothing is left."""
        session = await self._connect(lun)
        try:
            reservations = Reservations(session)
            held, _ = await look(reservations, f"volume {volume}")
            refuse_outranked(held, key, f"volume {volume}")
            opened = _Opened(session, key, held)
            opened.persist = await self._can_persist(lun, reservations)
            if register:
                await reservations.register(key.value, persist=opened.persist)
            else:
                opened.held = Unknown.UNKNOWN
        except BaseException:
            await to_its_end(session.close())
            raise
        return opened

    async def _can_persist(self, lun: Lun, reservations: Reservations) -> bool:
        """Asked once a target and life of this driver."""
        if lun.target not in self._persist:
            self._persist[lun.target] = await reservations.survives_power_loss()
        return self._persist[lun.target]

    async def _let_go(self, volume: VolumeName) -> None:
        async with self._lock(volume):
            await self._close_session(volume)
        await asyncio.gather(*self._ending, return_exceptions=True)

    async def _close_session(self, volume: VolumeName) -> None:
        opened = self._opened.pop(volume, None)
        if opened is not None:
            await opened.session.close()

    def _end_later(self, session: IscsiSession) -> None:
        """Log out off the blackout's path."""
        task = asyncio.create_task(session.close(), name="iscsi-logout")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _chap_file(self) -> str | None:
        return None if self._chap is None else await self._chap.checked_path()

    async def _end(self, lun: Lun) -> LunEnd:
        return LunEnd(
            lun=lun,
            initiator=self._initiator,
            chap_user=None if self._chap is None else self._chap.user,
            chap_file=await self._chap_file(),
        )

    def _info(self, volume: VolumeName, lun: Lun) -> VolumeInfo:
        allocated = lun.capacity_bytes if lun.allocated_bytes is None else lun.allocated_bytes
        return VolumeInfo(
            pool=self._pool,
            name=volume,
            format=DiskFormat.RAW,
            capacity_bytes=lun.capacity_bytes,
            allocated_bytes=allocated,
        )
