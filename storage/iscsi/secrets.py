"""The CHAP secret of a pool: a file on each node that only root may read.

The hypervisor reads the file itself (QEMU's `secret` object), so the secret is in no command line,
no log and no message; only its path is.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Final

from migrator.errors import StorageError
from storage.bounded import bounded
from storage.iscsi.session import Credentials

_LENGTH: Final = (12, 255)
"""RFC 7143 asks for 96 bits; libiscsi takes up to 255 bytes."""


class ChapFile:
    """StorageError, which never quotes the secret: the file is missing, too open, or wrong."""

    def __init__(self, user: str, path: Path) -> None:
        self.user = user
        self._path = path

    async def read(self) -> Credentials:
        return await bounded(self.read_now, "the CHAP secret", timeout_s=5.0)

    async def checked_path(self) -> str:
        """The file's path, once it is known to be right."""
        await self.read()
        return str(self._path)

    def read_now(self) -> Credentials:
        """The same, blocking."""
        where = f"the CHAP secret's file {self._path}"
        try:
            mode = self._path.stat().st_mode
            data = self._path.read_bytes()
        except OSError as error:
            raise StorageError(f"{where} can't be read: {error.strerror}") from error
        if stat.S_IMODE(mode) & 0o077:
            raise StorageError(f"{where} is open to others: chmod 600 it")
        if not _LENGTH[0] <= len(data) <= _LENGTH[1]:
            raise StorageError(f"{where} must hold {_LENGTH[0]} to {_LENGTH[1]} bytes")
        if not data.isascii() or any(byte <= 0x20 for byte in data):
            raise StorageError(
                f"{where} must hold the secret alone: no space, no line break (printf %s, not echo)"
            )
        return Credentials(self.user, data.decode("ascii"))
