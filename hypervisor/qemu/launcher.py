"""Starts a QEMU process with all that it inherits, and its record: all of it, or nothing.

The order matters. The memory, the listening monitor sockets and the process come first, then the
record; the guest is still paused. An agent that dies in between leaves a folder without a record,
and the next one ends the process in it (`driver.open`).

These functions block for some ms; call them off the event loop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from hypervisor.qemu import records
from hypervisor.qemu.command_line import (
    END_FD,
    MONITOR_FD,
    RAM_FD,
    TAP_FD,
    UFFD_FD,
    QemuLaunch,
    build_command,
)
from hypervisor.qemu.config import MONITORS, monitor_path
from hypervisor.qemu.kernel import SHIM
from hypervisor.qemu.memory import create_memfd
from hypervisor.qemu.process import ProcessIdentity, QemuProcess, Spawn, identify, spawn
from hypervisor.qemu.qmp import short_path
from hypervisor.qemu.records import ProcessRecord
from migrator import shortage
from migrator.errors import HypervisorError
from migrator.model import FileSource, IscsiSource
from migrator.ports import Launch

_KEPT_ENVIRONMENT = ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "FERRY_TEST_SESSION")
"""QEMU inherits no more of the agent's environment, which may hold secrets. The last one is the
mark by which the tests find what they left behind."""


class Launched:
    """A process that was just started: ours to watch or to kill."""

    def __init__(self, directory: Path, process: QemuProcess, record: ProcessRecord) -> None:
        self.directory = directory
        self.process = process
        self.record = record

    def kill(self) -> None:
        """End it at once, reap it and forget it. Blocks until it is gone."""
        self.process.signal(signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self.process.pidfd, os.WEXITED)
        os.close(self.process.pidfd)
        records.remove_directory(self.directory)


def launch_process(
    request: QemuLaunch, directory: Path, log: Path, memory: Callable[[], int] | None = None
) -> Launched:
    """Start QEMU, paused, and record it. HypervisorError leaves nothing behind.

    `memory`: a new descriptor of the memory file that was made for it ahead; HypervisorError.
    """
    arguments = build_command(request)
    spec = request.launch.spec
    records.remove_directory(directory)
    with contextlib.ExitStack() as ours:
        descriptors: dict[int, int] = {}
        try:
            directory.mkdir(mode=0o700)
            ram = create_memfd(spec) if memory is None else memory()
            ours.callback(os.close, ram)
            descriptors[RAM_FD] = ram
            descriptors[END_FD] = records.make_end(directory)
            ours.callback(os.close, descriptors[END_FD])
            for index in range(MONITORS):
                listener = ours.enter_context(_listen(monitor_path(directory, index)))
                descriptors[MONITOR_FD + index] = listener.fileno()
            for index, tap in enumerate(request.launch.tap_fds):
                descriptors[TAP_FD + index] = tap
            pid = spawn(
                Spawn(
                    arguments=arguments,
                    environment=_environment(request.binary, _reservation_key(request)),
                    descriptors=descriptors,
                    log=log,
                )
            )
            return _record(pid, request, directory)
        except BaseException as error:
            records.remove_directory(directory)
            if isinstance(error, OSError):
                raise HypervisorError(f"{spec.name}: can't start QEMU: {error}") from error
            raise


def host_devices(launch: Launch) -> frozenset[str]:
    """Those of its disks that are block devices of this host."""
    found = set()
    for source in launch.disks:
        if not isinstance(source, FileSource):
            continue
        with contextlib.suppress(OSError):
            if stat.S_ISBLK(Path(source.path).stat().st_mode):
                found.add(source.path)
    return frozenset(found)


def _record(pid: int, request: QemuLaunch, directory: Path) -> Launched:
    pidfd = os.pidfd_open(pid)
    # A child that died already is a zombie until we reap it: without an identity, but ours.
    identity = identify(pid) or ProcessIdentity(pid=pid, start_ticks=0, boot_id="")
    record = ProcessRecord(
        process=identity,
        spec=request.launch.spec,
        token=request.launch.token,
        incoming=request.incoming,
        ram_fd=RAM_FD,
        uffd_fd=UFFD_FD,
    )
    launched = Launched(directory, QemuProcess(identity, pidfd), record)
    try:
        if request.incoming:
            shortage.set_adjustment(pid, shortage.FIRST)
        records.write_record(directory, record)
    except BaseException:
        launched.kill()
        raise
    return launched


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short_path(path) as address:
            listener.bind(address)
        listener.listen(8)
    except BaseException:
        listener.close()
        raise
    return listener


def _reservation_key(request: QemuLaunch) -> int | None:
    """The key that its iSCSI sessions register. One process has one: a domain has one token."""
    keys = {
        source.reservation_key
        for source in request.launch.disks
        if isinstance(source, IscsiSource) and source.reservation_key is not None
    }
    if not keys:
        return None
    name = request.launch.spec.name
    if len(keys) > 1:
        raise HypervisorError(f"{name}: its iSCSI disks have different reservation keys")
    if not SHIM.exists():
        raise HypervisorError(
            f"{name}: the shim {SHIM.name} was not built: its iSCSI disks can't be fenced"
        )
    return keys.pop()


def _environment(binary: str, reservation_key: int | None) -> dict[str, str]:
    environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    if SHIM.exists():
        environment |= {
            "LD_PRELOAD": str(SHIM),
            "FERRY_UFFD_FD": str(UFFD_FD),
            "FERRY_END_FD": str(END_FD),
            "FERRY_QEMU": binary,
        }
    if reservation_key is not None:
        environment["FERRY_ISCSI_KEY"] = f"{reservation_key:#x}"
    return environment
