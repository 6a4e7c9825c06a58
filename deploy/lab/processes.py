"""The lab's processes: found by namespace, started detached, ended for certain.

What runs in a lab's namespace is the lab's: agents, engines, QEMUs, whatever a user started there
with `ferry lab exec`. So membership decides, not a list of pids that a crash may have cut short.
A signal goes through a pidfd whose start time was checked, so it never hits a recycled pid.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from deploy.lab import enter
from deploy.lab.namespaces import namespace_key
from migrator.errors import FerryError

ENTER_SCRIPT: Final = str(Path(enter.__file__).resolve())
_ENTER_BYTES: Final = os.fsencode(ENTER_SCRIPT)
_POLL_S: Final = 0.02
_KILL_TIMEOUT_S: Final = 20.0
"""A killed QEMU gives back its memory first; at a few GiB/s that's seconds at most."""
_HEALTH_TIMEOUT_S: Final = 2.0
_started: dict[int, subprocess.Popen[bytes]] = {}
"""Our own children, by pid, so that one that ended is reaped rather than left a zombie."""


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One process for good: a pid is used again, a pid with its start time isn't."""

    pid: int
    start_ticks: int
    """Clock ticks after boot, field 22 of /proc/PID/stat."""


def read_process(pid: int) -> Process | None:
    """The live process with this pid. None: there's none, or only its zombie."""
    child = _started.get(pid)
    if child is not None and child.poll() is not None:
        del _started[pid]
    try:
        # The command's name may hold anything, also spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else Process(pid=pid, start_ticks=int(fields[19]))


def alive(process: Process) -> bool:
    return read_process(process.pid) == process


def command_of(pid: int) -> list[str]:
    """The process's argument vector; empty once it has ended."""
    return [os.fsdecode(part) for part in _command_bytes(pid).split(b"\0")[:-1]]


def _command_bytes(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:  # noqa: PTH123 - as below
            return file.read()
    except OSError:
        return b""


def processes_in(
    namespaces: Iterable[str], keys: Iterable[tuple[int, int]] = ()
) -> dict[str, list[Process]]:
    """The live processes of each namespace, or on the way into it (still running `enter.py`).

    `keys` adds namespaces that have lost their names; their processes are listed under "".
    """
    names = list(namespaces)
    by_key = dict.fromkeys(keys, "")
    by_key.update({key: name for name in names if (key := namespace_key(name)) is not None})
    found: dict[str, list[Process]] = {name: [] for name in (*names, "")}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            status = os.stat(f"/proc/{entry.name}/ns/net")  # noqa: PTH116 - a Path takes twice as long
        except OSError:
            continue
        pid = int(entry.name)
        name = by_key.get((status.st_dev, status.st_ino))
        if name is None:
            name = _entering(pid, found)
        if name is not None and (process := read_process(pid)):
            found[name].append(process)
    return found


def _entering(pid: int, names: Mapping[str, object]) -> str | None:
    if _ENTER_BYTES not in _command_bytes(pid):
        return None
    command = command_of(pid)
    if ENTER_SCRIPT not in command:
        return None
    target = command[command.index(ENTER_SCRIPT) + 1 :][:1]
    return target[0] if target and target[0] in names else None


def find_by_argument(processes: Iterable[Process], argument: str) -> Process | None:
    """The first process with `argument` in its argument vector."""
    return next((item for item in processes if argument in command_of(item.pid)), None)


def send_signal(process: Process, number: signal.Signals) -> None:
    """Signal exactly this process; nothing happens if it has ended."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(process.pid)
        try:
            if alive(process):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def wait_ended(processes: Sequence[Process], timeout_s: float) -> list[Process]:
    """Wait until all have ended, at most `timeout_s`. Those still alive."""
    deadline = time.monotonic() + timeout_s
    while (left := [item for item in processes if alive(item)]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return left


def kill_all(namespaces: Sequence[str], more: Iterable[Process] = ()) -> None:
    """End every process of these namespaces, and `more`, with SIGKILL; new ones too.

    Raises FerryError naming the pids that live on after 20 s.
    """
    keys = [key for name in namespaces if (key := namespace_key(name)) is not None]
    extra = list(more)
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while True:
        found = [item for group in processes_in(namespaces, keys).values() for item in group]
        found = [item for item in {*found, *filter(alive, extra)} if item.pid != os.getpid()]
        if not found:
            return
        for item in found:
            send_signal(item, signal.SIGKILL)
        if wait_ended(found, deadline - time.monotonic()) or time.monotonic() > deadline:
            pids = ", ".join(str(item.pid) for item in found if alive(item))
            raise FerryError(f"processes that won't end, even when killed: {pids}")


def spawn_in(namespace: str, command: Sequence[str], log_path: Path) -> Process:
    """Start `command` in the namespace: own session, no terminal, output appended to the log.

    It outlives the caller. Raises FerryError if it can't even be started.
    """
    with log_path.open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", ENTER_SCRIPT, namespace, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
    _started[child.pid] = child
    process = read_process(child.pid)
    if process is None:
        raise FerryError(f"{command[0]} ended at once; the end of {log_path}:\n{tail(log_path)}")
    return process


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log, indented; reads at most its last 16 KiB."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - 16384))
            text = log.read().decode(errors="replace")
    except OSError:
        text = ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (empty)"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def healthy(api_socket: Path) -> bool:
    """Whether GET /healthz on the API's socket answers 200 within 2 s."""
    connection = _UnixConnection(api_socket, _HEALTH_TIMEOUT_S)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def wait_healthy(name: str, process: Process, api_socket: Path, log: Path, limit_s: float) -> None:
    """Wait until the agent answers. Raises FerryError with the log's end; the agent stays."""
    deadline = time.monotonic() + limit_s
    while not healthy(api_socket):
        if not alive(process):
            raise FerryError(f"the agent of {name} ended; the end of {log}:\n{tail(log)}")
        if time.monotonic() > deadline:
            raise FerryError(
                f"the agent of {name} doesn't answer on {api_socket} after {limit_s:g} s; "
                f"the end of {log}:\n{tail(log)}"
            )
        time.sleep(_POLL_S)
