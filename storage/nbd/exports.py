"""The exports of a provisioner: one qemu-nbd a node and token, so that ending it fences.

A qemu-nbd outlives the provisioner: the next one finds it by its pid file, whose path is one of its
arguments. It is ended by SIGKILL, and gone when `end` returns: what it hasn't written by then it
never will.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import select
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from migrator.errors import FenceError, StorageError
from storage.bounded import bounded, run_program

END_TIMEOUT_S: Final = 10.0
START_TIMEOUT_S: Final = 20.0
_NAME_BYTES: Final = 15
"""Of a program's name, that the kernel keeps."""
_NO_SUCH_PROCESS: Final = frozenset({errno.ESRCH, errno.ENOENT, errno.EINVAL})
"""EINVAL: the number is a thread's by now, or none that a process has."""


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """How a provisioner serves."""

    address: str
    tls_directory: Path | None = None
    tls_username: str = "ferry"
    program: str = "qemu-nbd"


class Export:
    """One qemu-nbd, or the place of one. `on_death` is called when it ends by itself."""

    def __init__(
        self,
        serving: Serving,
        *,
        name: str,
        port: int,
        disk: Path,
        read_only: bool,
        pid_file: Path,
        on_death: Callable[[Export], None],
    ) -> None:
        self.name, self.port, self.read_only = name, port, read_only
        self._serving = serving
        self._disk = disk
        self._pid_file = pid_file
        self._on_death = on_death
        self._pidfd: int | None = None
        self._gone = asyncio.Event()
        self._told = False

    @property
    def serves(self) -> bool:
        """Its process is there."""
        return self._pidfd is not None

    async def ensure(self) -> None:
        """It serves when this returns. StorageError with qemu-nbd's words."""
        self._told = False
        if self._pidfd is not None or await self._adopt():
            return
        node = {
            "driver": "raw",
            "file": {
                "driver": "file",
                "filename": str(self._disk),
                # Both ends of a migration have it open; the fence is the export's end, not a lock.
                "locking": "off",
                "cache": {"direct": True},
            },
            "cache": {"direct": True},
        }
        command = [
            *(self._serving.program, "--fork", f"--pid-file={self._pid_file}", "--persistent"),
            *("--bind", self._serving.address, "--port", str(self.port)),
            *("--export-name", self.name, "--shared", "0"),
            *(["--read-only"] if self.read_only else []),
        ]
        if self._serving.tls_directory is not None:
            credentials = {
                "qom-type": "tls-creds-psk",
                "id": "tls0",
                "endpoint": "server",
                "dir": str(self._serving.tls_directory),
            }
            command += ["--object", json.dumps(credentials), "--tls-creds", "tls0"]
        command.append(f"json:{json.dumps(node)}")
        await run_program(f"export {self.name}", command, timeout_s=START_TIMEOUT_S)
        if not await self._adopt():
            raise StorageError(f"export {self.name}: qemu-nbd ended as soon as it was started")

    async def end(self) -> None:
        """It is gone when this returns. Idempotent. FenceError: it won't die."""
        self._told = True
        if self._pidfd is None and not await self._adopt():
            await bounded(lambda: self._pid_file.unlink(missing_ok=True), f"export {self.name}")
            return
        assert self._pidfd is not None
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._gone.wait()
        except TimeoutError:
            raise FenceError(
                f"export {self.name} is still there {END_TIMEOUT_S:.0f} s after SIGKILL"
            ) from None
        await bounded(lambda: self._pid_file.unlink(missing_ok=True), f"export {self.name}")

    def let_go(self) -> None:
        """Forget the process; it goes on."""
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    async def _adopt(self) -> bool:
        """Hold the process of the pid file, if it lives and is ours."""
        program = os.fsencode(Path(self._serving.program).name)
        pidfd = await bounded(lambda: _hold(self._pid_file, program), f"export {self.name}")
        if pidfd is None:
            return False
        self._pidfd = pidfd
        self._gone.clear()
        asyncio.get_running_loop().add_reader(pidfd, self._died)
        return True

    def _died(self) -> None:
        self.let_go()
        self._gone.set()
        if not self._told:
            self._on_death(self)


def is_free(address: str, port: int) -> bool:
    """Whether nobody listens there. Also where that can't be said: qemu-nbd tells why then."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # As qemu-nbd does.
            trial.bind((address, port))
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


def _hold(pid_file: Path, program: bytes) -> int | None:
    """A pidfd of the process that has the pid file among its arguments; None: there is none.

    Also of one of that program's that is ending, and whose arguments are gone with its first
    thread: another of its threads may hang in the disk, and write when that answers.

    OSError: that can't be said, for want of descriptors maybe. It isn't gone then: a fence would be
    confirmed while its writer goes on.
    """
    try:
        pid = int(pid_file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno in _NO_SUCH_PROCESS:
            return None
        raise
    try:
        wanted = os.fsencode(f"--pid-file={pid_file}")
        if wanted in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return pidfd
        if _is_ending(pid, pidfd, program):
            return pidfd
    except OSError as error:
        if error.errno not in _NO_SUCH_PROCESS:
            os.close(pidfd)
            raise
    os.close(pidfd)
    return None


def _is_ending(pid: int, pidfd: int, program: bytes) -> bool:
    """Whether its first thread has ended, and not all. OSError."""
    head, _, rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")
    if rest.split()[0] != b"Z" or head.partition(b"(")[2] != program[:_NAME_BYTES]:
        return False
    ended = select.poll()
    ended.register(pidfd, select.POLLIN)
    return not ended.poll(0)
