"""A real tgtd on loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from migrator.errors import StorageError
from migrator.model import NodeName
from storage.iscsi import IscsiPool, make_iscsi_pool
from storage.iscsi.restore import restore
from storage.settings import IscsiSettings

WAIT_S: Final = 30.0
CONTROL_NUMBER: Final = 7
SECRET: Final = "a-secret-of-16-b"
_SUPERVISED: Final = '"$@" </dev/null & read -r _; kill -9 $!; wait $! 2>/dev/null'
"""Ends with its standard input, and so with the tests, however they end."""


def missing_tools() -> str | None:
    """What these tests need and this machine hasn't got."""
    absent = [name for name in ("tgtd", "qemu-io") if not _which(name)]
    modules = Path("/usr/lib/x86_64-linux-gnu/qemu/block-iscsi.so")
    if not modules.exists() and "iscsi" not in _formats():
        absent.append("QEMU's iSCSI module")
    return f"needs {', '.join(absent)}" if absent else None


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _formats() -> str:
    if not _which("qemu-img"):
        return ""
    return subprocess.run(
        ["qemu-img", "--help"], capture_output=True, text=True, check=False, timeout=30
    ).stdout


class TgtWorld:
    """One tgtd and the folder of its volumes. `kill` and `start` it as often as you like."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.volumes = folder / "volumes"
        self.volumes.mkdir()
        self.secret = folder / "chap"
        self.secret.touch(mode=0o600)
        self.secret.write_text(SECRET)
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def portal(self) -> str:
        return f"127.0.0.1:{self.port}"

    def settings(self, pool: str = "default") -> IscsiSettings:
        return IscsiSettings(
            name=pool,
            portal=self.portal,
            tgt_folder=str(self.volumes),
            tgt_socket=f"{self.folder}/tgt.{CONTROL_NUMBER}",
            chap_user="ferry",
            chap_secret_file=str(self.secret),
        )

    def pool(self, node: str, pool: str = "default") -> IscsiPool:
        return make_iscsi_pool(self.settings(pool), NodeName(node))

    def start(self) -> None:
        """Returns when it serves, with every target that the folder knows."""
        for _ in range(5):
            self.port = self.port or _free_port()
            log = (self.folder / "tgtd.log").open("ab")
            with log:
                self._process = subprocess.Popen(
                    [
                        *("sh", "-c", _SUPERVISED, "sh"),
                        *(_which("tgtd") or "tgtd", "-f", "-C", str(CONTROL_NUMBER)),
                        *("--iscsi", f"portal={self.portal}"),
                    ],
                    env={**os.environ, "TGT_IPC_SOCKET": f"{self.folder}/tgt"},
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                )
            if self._serves():
                restore(self.settings())
                return
            self.kill()
            self.port = 0
        raise AssertionError((self.folder / "tgtd.log").read_text())

    def _serves(self) -> bool:
        assert self._process is not None
        deadline = time.monotonic() + WAIT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                with contextlib.suppress(StorageError):
                    restore(self.settings())
                    return True
            time.sleep(0.02)
        return False

    def kill(self) -> None:
        """As a crash does: it forgets every target and reservation."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(WAIT_S)
            self._process = None

    def clean(self) -> None:
        """No volumes, for the next test. tgtd is started anew if somebody is still logged in."""
        if any(self.volumes.glob("*.json")):
            self.kill()
            for path in self.volumes.iterdir():
                path.unlink()
            self.start()

    def bytes_of(self, volume: str, offset: int, count: int) -> bytes:
        """What has reached the volume, read at the storage."""
        with (self.volumes / f"{volume}.raw").open("rb") as file:
            file.seek(offset)
            return file.read(count)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_tgt(folder: Path) -> Iterator[TgtWorld]:
    world = TgtWorld(folder)
    try:
        world.start()
        yield world
    finally:
        world.kill()
