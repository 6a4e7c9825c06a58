"""A QEMU process: spawned so that it outlives the agent, watched by its pidfd.

The agent is often not the parent (it was restarted), so nothing here relies on being it: the exit
is learnt from the pidfd, which the kernel makes readable for anybody. A process is known by its
pid, its start time and the boot: a reused pid is never taken for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from migrator import shortage
from migrator.errors import HypervisorError

_DUP_FLOOR = 512
"""Descriptors are first moved above every fixed number, so that no dup2 overwrites a source."""
_SHORT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What says nothing about a process."""
ENDING_S = 2.0
"""So long a process is waited for whose first thread has ended. One that was killed frees its
memory then; one whose disk hangs stays like that until the disk answers, and may write until then.
"""


class ProcessIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which process: the pid alone is ambiguous once it may have been reused."""

    pid: int
    start_ticks: int
    """Field 22 of /proc/PID/stat: clock ticks after the boot."""
    boot_id: str


def current_boot() -> str:
    """The id of this boot. OSError if there is no /proc."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def identify(pid: int) -> ProcessIdentity | None:
    """The identity of the live process `pid`; None if there is none, or only its zombie."""
    identity, ended = _look_at(pid)
    return None if ended else identity


def _look_at(pid: int) -> tuple[ProcessIdentity | None, bool]:
    """Who it is, None if that can't be read; and whether its first thread has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot_id = current_boot()
    except OSError:
        return None, False
    fields = stat.rpartition(")")[2].split()
    identity = ProcessIdentity(pid=pid, start_ticks=int(fields[19]), boot_id=boot_id)
    return identity, fields[0] in ("Z", "X")


def _has_ended(pidfd: int, within_s: float = 0.0) -> bool:
    """Whether its process is a zombie, all its threads, or gone."""
    waiting = select.poll()
    waiting.register(pidfd, select.POLLIN)
    return bool(waiting.poll(within_s * 1e3))


class Spawn(msgspec.Struct, frozen=True, kw_only=True):
    """What to start. `descriptors` maps numbers in the child to our descriptors."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    descriptors: Mapping[int, int]
    log: Path
    """stdout and stderr are appended to it."""


def spawn(request: Spawn) -> int:
    """Start a detached process in a session of its own and return its pid. Blocks for some ms.

    Every other descriptor of ours stays closed in it. HypervisorError if it can't be started.
    """
    moved: list[int] = []
    actions: list[tuple[int, int, str, int, int] | tuple[int, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(request.log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    try:
        for target, descriptor in request.descriptors.items():
            moved.append(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _DUP_FLOOR))
            actions.append((os.POSIX_SPAWN_DUP2, moved[-1], target))
        return os.posix_spawn(
            request.arguments[0],
            list(request.arguments),
            dict(request.environment),
            file_actions=actions,
            setsid=True,
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGCHLD],
        )
    except OSError as error:
        why = shortage.unstarted(error)
        raise HypervisorError(f"can't start {request.arguments[0]}: {why}") from error
    finally:
        for descriptor in moved:
            os.close(descriptor)


class QemuProcess:
    """A live process that we hold by its pidfd. Close it by `release`, which lets it live."""

    def __init__(self, identity: ProcessIdentity, pidfd: int, *, ending: bool = False) -> None:
        self.identity = identity
        self.pidfd = pidfd
        self.found_ending = ending
        """Only some of its threads were left when it was opened."""
        self.exit_status: int | None = None
        """As os.waitstatus_to_exitcode; known only where we are the parent."""
        self._exited = asyncio.Event()
        self._on_exit: Callable[[], None] | None = None

    @classmethod
    def hold(cls, identity: ProcessIdentity) -> QemuProcess | None:
        """Open the process if it still is the same one; None if it is gone.

        HypervisorError if that can't be found out. Reads /proc, and waits for one that is ending,
        ENDING_S at most: call it off the loop.
        """
        try:
            pidfd = os.pidfd_open(identity.pid)
        except OSError as error:  # It is gone; its pid may be a thread's by now.
            if error.errno not in _SHORT_OF:
                return None
            raise HypervisorError(f"can't look at process {identity.pid}: {error}") from error
        found, ending = _look_at(identity.pid)
        if found == identity and not (ending and _has_ended(pidfd, ENDING_S)):
            return cls(identity, pidfd, ending=ending)
        lives = found is None and not _has_ended(pidfd)
        os.close(pidfd)
        if lives:
            raise HypervisorError(f"can't look at process {identity.pid}, which lives")
        return None

    @property
    def pid(self) -> int:
        return self.identity.pid

    @property
    def exited(self) -> bool:
        return self._exited.is_set()

    @property
    def how_it_ended(self) -> str:
        """For a sentence that begins with QEMU."""
        if self.exit_status is None:
            return f"ended, and nobody saw how ({shortage.WHO_KNOWS})"
        if self.exit_status < 0:
            return shortage.killed_by(-self.exit_status)
        return f"exited: {self.exit_status}"

    def watch(self, on_exit: Callable[[], None]) -> None:
        """Call `on_exit` once, from the event loop, when the process has ended."""
        self._on_exit = on_exit
        asyncio.get_running_loop().add_reader(self.pidfd, self._readable)

    def _readable(self) -> None:
        asyncio.get_running_loop().remove_reader(self.pidfd)
        with contextlib.suppress(ChildProcessError):  # Adopted: somebody else reaps it.
            result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
            if result is not None:
                killed = result.si_code != os.CLD_EXITED
                self.exit_status = -result.si_status if killed else result.si_status
        self._exited.set()
        if self._on_exit is not None:
            self._on_exit()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process is gone. It can't hit another one."""
        if self.pidfd < 0:  # Gone, and released.
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    async def wait(self, *, timeout_s: float) -> bool:
        """Whether the process ends within `timeout_s`. Needs `watch`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._exited.wait()
        except TimeoutError:
            return self.exited
        return True

    def release(self) -> None:
        """Stop watching and close the descriptor. Idempotent; the process lives on."""
        if self.pidfd < 0:
            return
        if self._on_exit is not None and not self.exited:
            asyncio.get_running_loop().remove_reader(self.pidfd)
        os.close(self.pidfd)
        self.pidfd = -1
