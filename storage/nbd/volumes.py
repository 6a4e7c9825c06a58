"""A provisioner's volumes: files of a folder, and beside each what is exported of it to whom.

    NAME.raw            a volume
    .NAME.json          its `VolumeState`; written and synced before an export begins or ends
    .NAME.RANDOM.draft  being filled
    .NAME.NODE.TOKEN.pid, .RANDOM.pid
    .ferry.mark         which folder this is
    .ferry.owner        which cluster's pool it is

Synchronous, for a thread; OSError goes up.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from pathlib import Path
from typing import Final

import msgspec

from migrator import durable
from migrator.errors import ConflictError, InvalidRequest, NotFoundError, StorageError
from migrator.model import DiskFormat, PoolHealth, PoolOwner, VolumeInfo, VolumeName
from storage.copying import copy_file
from storage.marks import folder_mark, folder_owner
from storage.names import check_capacity, check_growth, check_volume_name

ABANDONED_AFTER_S: Final = 86_400.0
"""A draft that nobody has written to for a day is of an agent that died."""
_SUFFIX: Final = ".raw"
_DRAFT: Final = ".draft"
_PID: Final = ".pid"


class ExportState(msgspec.Struct, frozen=True, kw_only=True):
    """One export. Not `live`: fenced, and to stay ended until a newer fence says otherwise."""

    node: str
    token: int
    port: int
    read_only: bool = False
    live: bool = True


class VolumeState(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a volume beside its bytes."""

    fence: int = 0
    """The newest token that fenced it."""
    winner: tuple[str, int] | None = None
    """Node and token of the export that the newest fence left."""
    exports: tuple[ExportState, ...] = ()


class VolumeFolder:
    """See the module."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def disk(self, volume: str) -> Path:
        return self.path / f"{volume}{_SUFFIX}"

    def pid_file(self, what: str) -> Path:
        return self.path / f".{what}{_PID}"

    def names(self) -> list[str]:
        return sorted(
            entry.name.removesuffix(_SUFFIX)
            for entry in self.path.iterdir()
            if entry.name.endswith(_SUFFIX) and not entry.name.startswith(".")
        )

    def describe(self, volume: str) -> VolumeInfo:
        """NotFoundError."""
        check_volume_name(VolumeName(volume))
        try:
            status = self.disk(volume).stat()
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no volume {volume}") from error
        return VolumeInfo(
            pool="",
            name=volume,
            format=DiskFormat.RAW,
            capacity_bytes=status.st_size,
            allocated_bytes=status.st_blocks * 512,
        )

    def describe_all(self) -> list[VolumeInfo]:
        found = []
        for name in self.names():
            with contextlib.suppress(NotFoundError, InvalidRequest):
                found.append(self.describe(name))
        return found

    def health(self) -> PoolHealth:
        room = os.statvfs(self.path)
        return PoolHealth(
            reachable=True,
            capacity_bytes=room.f_blocks * room.f_frsize,
            free_bytes=room.f_bavail * room.f_frsize,
        )

    def mark(self) -> str | None:
        return folder_mark(self.path, "the storage")

    def owner(self, claimant: PoolOwner | None, instead_of: str | None) -> PoolOwner | None:
        """As the port's."""
        return folder_owner(self.path, "the storage", claimant, instead_of)

    # --- making ------------------------------------------------------------------------------

    def make_draft(self, volume: str, capacity_bytes: int) -> str:
        """An empty file for a volume to be; its name."""
        check_volume_name(VolumeName(volume))
        check_capacity(VolumeName(volume), capacity_bytes)
        self._refuse_existing(volume)
        draft = f".{volume}.{uuid.uuid4().hex}{_DRAFT}"
        fd = os.open(self.path / draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o660)
        try:
            os.truncate(fd, capacity_bytes)
        except BaseException:
            self.discard(draft)
            raise
        finally:
            os.close(fd)
        return draft

    def draft_path(self, draft: str) -> Path:
        """NotFoundError: it isn't one."""
        path = self.path / draft
        if "/" in draft or not draft.endswith(_DRAFT) or not path.is_file():
            raise NotFoundError(f"there is no draft {draft}")
        return path

    def publish(self, draft: str, volume: str) -> VolumeInfo:
        """ConflictError: the name was taken meanwhile; the draft is still there."""
        path = self.draft_path(draft)
        check_volume_name(VolumeName(volume))
        durable.sync(path)
        try:
            os.link(path, self.disk(volume))
        except FileExistsError as error:
            raise ConflictError(f"there is a volume {volume} already") from error
        self._state_file(volume).unlink(missing_ok=True)
        path.unlink()
        durable.sync(self.path)
        return self.describe(volume)

    def discard(self, draft: str) -> None:
        """Idempotent."""
        with contextlib.suppress(NotFoundError, FileNotFoundError):
            self.draft_path(draft).unlink()

    def abandoned_drafts(self, fresh: str) -> list[str]:
        """By the storage's own clock, which `fresh`, made just now, tells."""
        now_s = self.draft_path(fresh).stat().st_mtime
        found = []
        for path in self.path.glob(f".*{_DRAFT}"):
            with contextlib.suppress(FileNotFoundError):
                if now_s - path.stat().st_mtime > ABANDONED_AFTER_S:
                    found.append(path.name)
        return found

    def exported_drafts(self) -> list[str]:
        """Those that the last provisioner exported: it may have been killed."""
        return [path.name[1 : -len(_PID)] for path in self.path.glob(f"..*{_DRAFT}{_PID}")]

    def discard_all(self) -> None:
        """What the last provisioner had in the making."""
        for left in self.path.glob(f".*{_DRAFT}"):
            left.unlink(missing_ok=True)

    def copy(self, volume: str, new: str, given_up: threading.Event) -> str:
        """A draft of `new` with what the volume holds, on the disk; its name.

        CopyCancelled: `given_up` was set. Whatever fails leaves nothing.
        """
        present = self.describe(volume)
        draft = self.make_draft(new, present.capacity_bytes)
        try:
            copy_file(self.disk(volume), self.path / draft, given_up)
            durable.sync(self.path / draft)
        except BaseException:
            self.discard(draft)
            raise
        return draft

    def resize(self, volume: str, capacity_bytes: int) -> VolumeInfo:
        present = self.describe(volume)
        check_growth(VolumeName(volume), present.capacity_bytes, capacity_bytes)
        os.truncate(self.disk(volume), capacity_bytes)
        return self.describe(volume)

    def remove(self, volume: str) -> None:
        self.describe(volume)
        self.disk(volume).unlink()
        self._state_file(volume).unlink(missing_ok=True)
        durable.sync(self.path)

    def _refuse_existing(self, volume: str) -> None:
        if self.disk(volume).exists():
            raise ConflictError(f"there is a volume {volume} already")

    # --- states ------------------------------------------------------------------------------

    def read_state(self, volume: str) -> VolumeState:
        """NotFoundError: no such volume. StorageError: what is written there is none."""
        self.describe(volume)
        try:
            return msgspec.json.decode(self._state_file(volume).read_bytes(), type=VolumeState)
        except FileNotFoundError:
            return VolumeState()
        except msgspec.DecodeError as error:
            raise StorageError(f"the state of volume {volume} is unreadable: {error}") from error

    def write_state(self, volume: str, state: VolumeState) -> None:
        """Durable when this returns: after a power loss no ended export may begin again.

        A fence must be written down in a full folder, too: a guest waits for it.
        """
        durable.replace_even_if_full(self._state_file(volume), msgspec.json.encode(state))

    def _state_file(self, volume: str) -> Path:
        return self.path / f".{volume}.json"
