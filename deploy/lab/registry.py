"""Which labs this machine has, whatever folder they're in, and who may change one right now.

    /run/ferry-labs/NAME     locked (flock) by whoever changes the lab; says "INDEX FOLDER"

The lock goes with its holder, also when that is killed. The file is removed by `release` while
the lock is held; a waiter notices that its file is no longer the one under the name and opens the
new one. The folder itself is locked the same way while an index is chosen.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from deploy.lab.plan import INDEX_MAX
from migrator.errors import ConflictError, FerryError

REGISTRY_PATH: Final = Path("/run/ferry-labs")
LOCK_TIMEOUT_S: Final = 120.0
"""`up` of a big lab on a slow machine takes tens of seconds; waiting longer hides a hang."""
_POLL_S: Final = 0.05


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    index: int
    folder: Path


@contextmanager
def _locked(path: Path, what: str, flags: int) -> Iterator[int]:
    """Hold the file's or folder's lock. Raises ConflictError after LOCK_TIMEOUT_S."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while (descriptor := _open_and_lock(path, flags)) is None:
        if time.monotonic() > deadline:
            raise ConflictError(f"another command has been busy with {what} for too long")
        time.sleep(_POLL_S)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_and_lock(path: Path, flags: int) -> int | None:
    """The locked file's descriptor; None: somebody else has it, or removed it meanwhile."""
    descriptor = None
    try:
        REGISTRY_PATH.mkdir(mode=0o755, exist_ok=True)
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            kept, descriptor = descriptor, None
            return kept
    except (BlockingIOError, FileNotFoundError):
        pass
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return None


@contextmanager
def _whole_registry() -> Iterator[None]:
    with _locked(REGISTRY_PATH, "the list of labs", os.O_RDONLY | os.O_DIRECTORY):
        yield


class LabLock:
    """The right to change one lab. Got from `lab_lock`, valid within its `with` block."""

    def __init__(self, name: str, descriptor: int) -> None:
        self._name = name
        self._descriptor = descriptor

    def registration(self) -> Registration | None:
        return _read(self._name)

    def claim(self, folder: Path, preferred: int | None = None) -> Registration:
        """Enter the lab in the registry, with an index that no other lab has, if free `preferred`.

        Raises ConflictError if it's entered with another folder, FerryError if no index is free.
        """
        present = self.registration()
        if present is not None:
            if present.folder != folder:
                raise ConflictError(
                    f"a lab {self._name} exists already, in {present.folder}: choose another name, "
                    f"or `ferry lab down --lab {self._name}` first"
                )
            return present
        with _whole_registry():
            taken = {item.index for item in registered()}
            wanted = [preferred] if preferred is not None else []
            index = next((n for n in (*wanted, *range(INDEX_MAX + 1)) if n not in taken), None)
            if index is None:
                raise FerryError(f"all {INDEX_MAX + 1} labs that fit this machine exist already")
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{index} {folder}\n".encode(), 0)
        return Registration(name=self._name, index=index, folder=folder)

    def release(self) -> None:
        """Strike the lab off the registry; the last one takes the registry along."""
        with _whole_registry():
            (REGISTRY_PATH / self._name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                REGISTRY_PATH.rmdir()


@contextmanager
def lab_lock(name: str) -> Iterator[LabLock]:
    """Wait for the lab's lock and hold it. Raises ConflictError after LOCK_TIMEOUT_S."""
    with _locked(REGISTRY_PATH / name, f"lab {name}", os.O_RDWR | os.O_CREAT) as descriptor:
        lock = LabLock(name, descriptor)
        try:
            yield lock
        finally:
            if lock.registration() is None:
                lock.release()


def registered() -> list[Registration]:
    """Every lab that was entered, by name."""
    try:
        names = sorted(entry.name for entry in REGISTRY_PATH.iterdir())
    except FileNotFoundError:
        return []
    return [item for name in names if (item := _read(name)) is not None]


def find(name: str) -> Registration | None:
    return _read(name)


def _read(name: str) -> Registration | None:
    try:
        text = (REGISTRY_PATH / name).read_text()
    except FileNotFoundError:
        return None
    index, separator, folder = text.rstrip("\n").partition(" ")
    if not (separator and index.isdigit() and folder):
        return None  # Its maker was killed between creating and writing it.
    return Registration(name=name, index=int(index), folder=Path(folder))
