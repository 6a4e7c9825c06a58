"""The newest token of each volume as this node knows it, in files. Synchronous: for a thread."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from migrator import durable
from migrator.errors import FenceError, StorageError
from migrator.model import FencingToken, VolumeName


class TokenFolder:
    """Made when first written to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, volume: VolumeName) -> FencingToken | None:
        try:
            text = self._path(volume).read_text()
        except FileNotFoundError:
            return None
        if not text.strip().isdigit():
            raise StorageError(f"{self._path(volume)} is damaged: it must hold one number")
        return FencingToken(int(text))

    def raise_to(self, volume: VolumeName, token: FencingToken) -> None:
        """FenceError, and nothing changed, if it is newer already."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            newest = self.read(volume)
            if newest is not None and token < newest:
                raise FenceError(f"volume {volume} is fenced by token {newest}; {token} is too old")
            durable.replace(self._path(volume), f"{token}\n".encode())
        finally:
            os.close(lock)

    def forget(self, volume: VolumeName) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path(volume).unlink()

    def _path(self, volume: VolumeName) -> Path:
        return self._folder / f"{volume}.token"
