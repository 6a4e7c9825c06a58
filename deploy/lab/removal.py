"""How a lab is taken away: by what the machine shows of it, not by what a note says."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from deploy.lab import frr, namespaces, processes, registry
from deploy.lab.processes import Process
from deploy.lab.record import DEFAULT_ROOT
from migrator.errors import FerryError, words
from netfabric.macvtap.network import remove_nodes

_MNT_DETACH: Final = 2


def remove_everything(
    name: str, folder: Path, lock: registry.LabLock, agents: Sequence[Process]
) -> None:
    remove_traces(name, folder, agents)
    lock.release()


def remove_traces(name: str, folder: Path, agents: Sequence[Process]) -> None:
    """Processes first, for they hold the namespaces and write into the folder."""
    names = namespaces.lab_namespaces(name)
    processes.kill_all(names, agents)
    for namespace in names:
        key = namespaces.namespace_key(namespace)
        namespaces.remove_namespace(namespace)
        if key is not None:
            remove_nodes(key[1])
    frr.remove(name)
    _remove_folder(folder)


def _remove_folder(folder: Path) -> None:
    """Remove the lab's folder, never what is mounted below it. Raises FerryError."""
    if not folder.exists():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    prefix = f"{folder.resolve()}/"
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in sorted((item for item in mounts if item.startswith(prefix)), reverse=True):
        if libc.umount2(mount.encode(), _MNT_DETACH) != 0:
            raise FerryError(f"{mount} can't be unmounted: {os.strerror(ctypes.get_errno())}")
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise FerryError(f"the lab's folder {folder} can't be removed: {words(error)}") from error
    if folder.parent == DEFAULT_ROOT:
        with contextlib.suppress(OSError):
            DEFAULT_ROOT.rmdir()
            DEFAULT_ROOT.parent.rmdir()


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """One more Ctrl-C must not stop a removal half-way. Every step in it is bounded."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
