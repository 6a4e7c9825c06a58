"""LUNs made with tgtd: a file and a target a volume, in one folder of the storage host.

    FOLDER/NAME.raw       the volume's bytes
    FOLDER/NAME.json      target, admitted initiators, newest token: written before tgtd is told,
                          so that it holds after a restart of tgtd
    FOLDER/.ferry.mark    which folder this is
    FOLDER/.ferry.owner   which cluster's pool it is
    FOLDER/.lock          one change at a time, from any agent

tgtd forgets everything when it ends. `restore` makes all of it again from the folder; run it after
each start of tgtd (`python -m storage.iscsi.restore`). `grant` makes a target that is missing, too.
A target admits nobody but who is written down.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from migrator import durable
from migrator.errors import (
    ConflictError,
    FenceError,
    NotFoundError,
    StorageError,
    TooLargeError,
    words,
)
from migrator.model import FencingToken, PoolHealth, PoolOwner, VolumeName
from migrator.own_threads import in_own_thread
from storage.iscsi.names import iqn_part
from storage.iscsi.provisioner import Lun, Provisioner
from storage.iscsi.secrets import ChapFile
from storage.iscsi.tgt_control import TgtControl
from storage.marks import folder_mark, folder_owner

CALL_TIMEOUT_S: Final = 20.0
LUN_NUMBER: Final = 1
"""tgtd keeps 0 for its controller."""
IQN_PREFIX: Final = "iqn.2026-11.io.ferry"
_NAMED_MAX: Final = 5
_T = TypeVar("_T")

_log = logging.getLogger(__name__)


class VolumeState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """NAME.json"""

    target: str
    number: int
    """tgtd's target id."""
    initiators: tuple[str, ...] = ()
    token: int = 0
    struck: tuple[str, ...] = ()
    """Whom the newest fence struck off."""


class TgtFolder:
    """The folder and its tgtd. Synchronous: for a thread."""

    def __init__(
        self,
        folder: Path,
        control: TgtControl,
        *,
        portal: str,
        pool: str,
        chap: ChapFile | None = None,
    ) -> None:
        """`chap`: what every target asks for at login."""
        self.folder = folder
        self._control = control
        self._portal = portal
        self._pool = pool
        self._chap = chap

    # --- volumes ---

    def create(self, volume: VolumeName, capacity_bytes: int) -> Lun:
        with self._locked():
            if self._state_path(volume).exists() or self._image(volume).exists():
                raise ConflictError(f"there is a volume {volume} already")
            state = VolumeState(
                target=f"{IQN_PREFIX}:{iqn_part(self._pool)}:{iqn_part(volume)}",
                number=self._free_number(),
            )
            if state.target in self._control.targets():
                raise ConflictError(f"tgtd has a target {state.target} already; nothing was made")
            try:
                # First: what an agent that is killed here leaves can be deleted by its name.
                self._write(volume, state)
                with self._image(volume).open("xb") as file:
                    file.truncate(capacity_bytes)
                self._ensure(volume, state)
            except BaseException:
                with contextlib.suppress(StorageError, ConflictError):
                    self._control.delete_target(state.number, f"volume {volume}")
                self._state_path(volume).unlink(missing_ok=True)
                self._image(volume).unlink(missing_ok=True)
                raise
            return self._lun(volume, state)

    def inspect(self, volume: VolumeName) -> Lun:
        return self._lun(volume, self._read(volume))

    def list_luns(self) -> dict[VolumeName, Lun]:
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            volume = VolumeName(path.name.removesuffix(".json"))
            try:
                found[volume] = self.inspect(volume)
            except NotFoundError:  # Deleted meanwhile.
                continue
            except StorageError as error:
                _log.warning("pool %s: %s; it is left out", self._pool, error)
        return found

    def resize(self, volume: VolumeName, capacity_bytes: int) -> Lun:
        """tgtd learns a size only with a new target: nobody may be logged in."""
        with self._locked():
            state = self._read(volume)
            self._control.delete_target(state.number, f"volume {volume}")
            try:
                os.truncate(self._image(volume), capacity_bytes)
            finally:
                self._ensure(volume, state)
            return self._lun(volume, state)

    def delete(self, volume: VolumeName) -> None:
        with self._locked():
            state = self._read(volume)
            self._control.delete_target(state.number, f"volume {volume}")
            self._image(volume).unlink(missing_ok=True)
            self._state_path(volume).unlink()

    # --- whom the target admits ---

    def grant(self, volume: VolumeName, initiator: str) -> Lun:
        with self._locked():
            state = self._read(volume)
            if initiator not in state.initiators:
                state = msgspec.structs.replace(state, initiators=(*state.initiators, initiator))
                self._write(volume, state)
            self._ensure(volume, state)
            return self._lun(volume, state)

    def fence(self, volume: VolumeName, token: FencingToken, initiator: str) -> None:
        with self._locked():
            before = self._read(volume)
            if token < before.token:
                raise FenceError(
                    f"volume {volume} is fenced by token {before.token}; {token} is too old"
                )
            state = before
            if token == before.token and initiator not in before.initiators:
                raise FenceError(
                    f"volume {volume}: token {token} was won by another node, which alone can"
                    " fence with it"
                )
            if token > before.token:
                others = tuple(each for each in before.initiators if each != initiator)
                state = msgspec.structs.replace(
                    before, token=token, initiators=(initiator,), struck=others
                )
                self._write(volume, state)
            for other in state.struck:
                if other not in state.initiators:  # It may have been granted anew since.
                    self._control.strike(state.number, other)
            if initiator in state.initiators and initiator not in before.initiators:
                self._ensure(volume, state)

    def token(self, volume: VolumeName) -> FencingToken | None:
        token = self._read(volume).token
        return FencingToken(token) if token else None

    def health(self) -> PoolHealth:
        """StorageError: tgtd, or the folder."""
        with self._locked():
            lost = self._lost()
        if lost:
            named = ", ".join(lost[:_NAMED_MAX]) + (", ..." if len(lost) > _NAMED_MAX else "")
            return PoolHealth(
                reachable=False,
                reason=f"tgtd has no target of {named}: it forgets them all when it ends; "
                "`python -m storage.iscsi.restore` makes them again (docs/storage-iscsi.md)",
            )
        found = os.statvfs(self.folder)
        return PoolHealth(
            reachable=True,
            capacity_bytes=found.f_blocks * found.f_frsize,
            free_bytes=found.f_bavail * found.f_frsize,
        )

    def _lost(self) -> list[VolumeName]:
        """Whose target isn't there. StorageError: tgtd."""
        there = self._control.targets()
        found = []
        for path in sorted(self.folder.glob("*.json")):
            volume = VolumeName(path.name.removesuffix(".json"))
            with contextlib.suppress(NotFoundError, StorageError):
                if self._read(volume).target not in there:
                    found.append(volume)
        return found

    def mark(self) -> str | None:
        return folder_mark(self.folder, f"pool {self._pool}")

    def owner(self, claimant: PoolOwner | None, instead_of: str | None) -> PoolOwner | None:
        """As the port's."""
        return folder_owner(self.folder, f"pool {self._pool}", claimant, instead_of)

    # --- tgtd ---

    def restore(self) -> int:
        """Make every target that is missing. How many volumes there are.

        StorageError: one couldn't be made; the others were.
        """
        volumes, failed = list(self.list_luns()), None
        for volume in volumes:
            try:
                with self._locked(), contextlib.suppress(NotFoundError):
                    self._ensure(volume, self._read(volume))
            except StorageError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return len(volumes)

    def _ensure(self, volume: VolumeName, state: VolumeState) -> None:
        """Make the target, unless it is there: its disk first, then the secret, then who may in."""
        if self._control.targets().get(state.target) != state.number:
            self._control.create_target(state.number, state.target)
        self._control.create_unit(state.number, LUN_NUMBER, self._image(volume))
        if self._chap is not None:
            self._require_chap(state.number, self._chap)
        for initiator in state.initiators:
            self._control.admit(state.number, initiator)

    def _require_chap(self, number: int, chap: ChapFile) -> None:
        try:
            self._control.require_account(number, chap.user)
        except NotFoundError:
            self._control.create_account(chap.user, chap.read_now().secret)
            self._control.require_account(number, chap.user)

    def _free_number(self) -> int:
        taken = set(self._control.targets().values())
        for path in self.folder.glob("*.json"):
            with contextlib.suppress(NotFoundError):
                taken.add(self._read(VolumeName(path.name.removesuffix(".json"))).number)
        return max(taken, default=0) + 1

    # --- the folder ---

    def _image(self, volume: VolumeName) -> Path:
        return self.folder / f"{volume}.raw"

    def _state_path(self, volume: VolumeName) -> Path:
        return self.folder / f"{volume}.json"

    def _lun(self, volume: VolumeName, state: VolumeState) -> Lun:
        try:
            found = self._image(volume).stat()
        except FileNotFoundError as error:
            raise StorageError(f"volume {volume}: {self._image(volume)} is missing") from error
        return Lun(
            portal=self._portal,
            target=state.target,
            lun=LUN_NUMBER,
            capacity_bytes=found.st_size,
            allocated_bytes=found.st_blocks * 512,
        )

    def _read(self, volume: VolumeName) -> VolumeState:
        try:
            return msgspec.json.decode(self._state_path(volume).read_bytes(), type=VolumeState)
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no volume {volume}") from error
        except msgspec.DecodeError as error:
            raise StorageError(f"{self._state_path(volume)} is damaged: {error}") from error

    def _write(self, volume: VolumeName, state: VolumeState) -> None:
        """Also in a full folder: a guest may wait for the fence that is written down."""
        durable.replace_even_if_full(self._state_path(volume), msgspec.json.encode(state))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Every holder finishes within its calls' own bounds."""
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


class TgtProvisioner(Provisioner):
    """`TgtFolder` off the event loop."""

    def __init__(self, folder: TgtFolder) -> None:
        self._tgt = folder

    @property
    def fences(self) -> bool:
        return True

    async def create(self, volume: VolumeName, capacity_bytes: int) -> Lun:
        return await self._call(lambda: self._tgt.create(volume, capacity_bytes))

    async def inspect(self, volume: VolumeName) -> Lun:
        return await self._call(lambda: self._tgt.inspect(volume))

    async def list_luns(self) -> Mapping[VolumeName, Lun]:
        return await self._call(self._tgt.list_luns)

    async def resize(self, volume: VolumeName, capacity_bytes: int) -> Lun:
        return await self._call(lambda: self._tgt.resize(volume, capacity_bytes))

    async def delete(self, volume: VolumeName) -> None:
        await self._call(lambda: self._tgt.delete(volume))

    async def grant(self, volume: VolumeName, initiator: str) -> Lun:
        return await self._call(lambda: self._tgt.grant(volume, initiator))

    async def fence(self, volume: VolumeName, token: FencingToken, initiator: str) -> None:
        await self._call(lambda: self._tgt.fence(volume, token, initiator))

    async def token(self, volume: VolumeName) -> FencingToken | None:
        return await self._call(lambda: self._tgt.token(volume))

    async def health(self) -> PoolHealth:
        return await self._call(self._tgt.health)

    async def mark(self) -> str | None:
        return await self._call(self._tgt.mark)

    async def owner(self, claimant: PoolOwner | None, instead_of: str | None) -> PoolOwner | None:
        return await self._call(lambda: self._tgt.owner(claimant, instead_of))

    async def _call(self, work: Callable[[], _T]) -> _T:
        """To its end: a change of tgtd's is never left half-way by a cancellation."""
        try:
            task = in_own_thread(f"tgtd, {self._tgt.folder}", work)
            task.add_done_callback(_forget)
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await asyncio.shield(task)
        except TimeoutError as error:
            raise StorageError(f"tgtd: no answer in {CALL_TIMEOUT_S:g} s") from error
        except OSError as error:
            kind = TooLargeError if error.errno == errno.EFBIG else StorageError
            raise kind(f"the folder of tgtd's volumes: {words(error)}") from error


def _forget(task: asyncio.Future[_T]) -> None:
    if not task.cancelled():
        task.exception()
