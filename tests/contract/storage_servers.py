"""Real storage servers for the contract suite, in a network namespace that the tests enter.

The test's thread is in the namespace while the servers are there, and so are the threads and
programs that it starts. All is on loopback. Nothing is left: the servers end with the fixture, the
namespace with the last of its processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from pyroute2 import IPRoute

from deploy.lab import nfs_server
from storage.nbd.protocol import PORT as NBD_PORT

_CLONE_NEWNET: Final = 0x40000000
ADDRESS: Final = "127.0.0.1"
READY_S: Final = 60.0


class Server:
    """One process, whose port is awaited, and what it says in `own_log` if that isn't enough."""

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        log: Path,
        *,
        own_log: Path | None = None,
        serves: Callable[[], bool] = lambda: True,
    ) -> None:
        self._command, self._port, self._log = command, port, log
        self._own_log, self._serves = own_log, serves
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._own_log is not None:
            self._own_log.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline_s = time.monotonic() + READY_S
        while not (listens(self._port) and self._serves()):
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline_s, self._log.read_text()
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((ADDRESS, port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def in_new_namespace() -> Iterator[None]:
    """The calling thread's network is a new one, with loopback up."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(_CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        with IPRoute() as route:
            route.link("set", index=1, state="up")
        yield
    finally:
        assert libc.setns(before, _CLONE_NEWNET) == 0
        os.close(before)


@contextlib.contextmanager
def small_file_system(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of its own, that is soon full."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "ferry-test", str(folder)]
    subprocess.run(command, check=True, timeout=30)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


def fill(folder: Path) -> Path:
    """A file that takes all the room that there is; remove it to have it back."""
    filler = folder / ".filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


class NfsServer:
    """rpcbind and nfs-ganesha."""

    def __init__(self, folder: Path) -> None:
        """`folder` must not be below /run."""
        commands = nfs_server.prepare(folder)
        self.export = str(nfs_server.export_path(folder))
        self.rpcbind = Server(commands["rpcbind"], 111, folder / "rpcbind.log")
        self.nfs = Server(
            commands["nfs"],
            nfs_server.PORT,
            folder / "nfs.log",
            own_log=nfs_server.log_path(folder),
            serves=lambda: nfs_server.serves(folder),
        )

    def __enter__(self) -> NfsServer:
        self.rpcbind.start()
        try:
            self.nfs.start()
        except BaseException:
            self.rpcbind.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.nfs.kill()
        self.rpcbind.kill()


class NbdServer:
    """Ferry's provisioner, with its exports."""

    def __init__(
        self, folder: Path, tls_directory: Path | None = None, port: int = NBD_PORT
    ) -> None:
        self.port = port
        self.folder = folder / "volumes"
        self.tls_directory = tls_directory
        tls = [] if tls_directory is None else ["--tls-directory", str(tls_directory)]
        command = [
            *(sys.executable, "-m", "storage.nbd", "--folder", str(self.folder)),
            *("--address", ADDRESS, "--port", str(port), *tls),
            *("--first-export-port", str(port + 1000)),
        ]
        self.provisioner = Server(command, port, folder / "nbd.log")

    def __enter__(self) -> NbdServer:
        self.provisioner.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.provisioner.kill()
        self.kill_exports()

    def kill_exports(self) -> None:
        """End every qemu-nbd of this server, as a crash of its host would."""
        for pid_file in self.folder.glob(".*.pid"):
            with contextlib.suppress(OSError, ValueError):
                pid = int(pid_file.read_text())
                if f"--pid-file={pid_file}" in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                    pidfd = os.pidfd_open(pid)
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    select.select([pidfd], [], [], READY_S)
                    os.close(pidfd)
