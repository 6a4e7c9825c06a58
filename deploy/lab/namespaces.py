"""Network namespaces by name, the way `ip netns` keeps them: bind mounts in /run/netns.

Entering and making happen in a thread of their own that ends at once, because a namespace belongs
to a thread. Not in a forked child (pyroute2's way): a Ctrl-C or SIGTERM that hits a forked child
of this process would unwind a copy of our caller's stack there and undo the lab a second time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from deploy.lab.enter import CLONE_NEWNET, NAMESPACES_FOLDER, enter
from deploy.lab.plan import lab_of_namespace
from migrator.errors import FabricError, words

NAMESPACES_PATH: Final = Path(NAMESPACES_FOLDER)
_MS_BIND: Final = 0x1000
_MS_REC: Final = 0x4000
_MS_SHARED: Final = 0x10_0000
_MNT_DETACH: Final = 2
_THREAD_TIMEOUT_S: Final = 10.0
"""A few system calls, a millisecond in all, unless the kernel is in trouble."""


def namespace_path(name: str) -> Path:
    return NAMESPACES_PATH / name


def namespace_key(name: str) -> tuple[int, int] | None:
    """(device, inode) of a live namespace, as in /proc/PID/ns/net; None: it isn't there.

    A name whose making was interrupted before the mount is a plain file, on another device.
    """
    try:
        status = namespace_path(name).stat()
        own = Path("/proc/self/ns/net").stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_dev == own.st_dev else None


def lab_namespaces(lab: str | None = None) -> list[str]:
    """Names of the namespaces of `lab` (None: of every lab), half-made ones too, sorted."""
    if not NAMESPACES_PATH.is_dir():
        return []
    found = ((entry.name, lab_of_namespace(entry.name)) for entry in NAMESPACES_PATH.iterdir())
    return sorted(
        name for name, owner in found if owner is not None and (lab is None or owner == lab)
    )


def ensure_namespace(name: str) -> bool:
    """Make the namespace unless it's there. True: made. Raises FabricError, leaving nothing."""
    if namespace_key(name) is not None:
        return False
    try:
        remove_namespace(name)
        _share_folder()
        namespace_path(name).touch(mode=0o444, exist_ok=False)
        _in_thread(lambda: _unshare_onto(name))
    except OSError as error:
        remove_namespace(name)
        raise FabricError(f"the network namespace {name} can't be made: {words(error)}") from error
    return True


def remove_namespace(name: str) -> None:
    """Remove the namespace and, with it, its interfaces. Does nothing if it isn't there.

    The kernel lets go of it when its last process has ended. Raises FabricError.
    """
    path = namespace_path(name)
    if namespace_key(name) is not None:
        try:
            _check(_libc().umount2(os.fsencode(path), _MNT_DETACH))
        except OSError as error:
            raise FabricError(f"the namespace {name} can't be removed: {words(error)}") from error
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def netlink_socket(name: str) -> int:
    """Descriptor of a new route netlink socket in the namespace, the caller's to close.

    Raises OSError.
    """
    return _netlink_socket_after(lambda: enter(name))


def nameless_netlink_socket() -> int:
    """The same in a new namespace without a name, which ends when the descriptor is closed.

    Raises OSError.
    """
    return _netlink_socket_after(lambda: _check(_libc().unshare(CLONE_NEWNET)))


def _netlink_socket_after(enter_it: Callable[[], None]) -> int:
    descriptors: list[int] = []

    def work() -> None:
        enter_it()
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        descriptors.append(socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE).detach())

    _in_thread(work)
    return descriptors[0]


def write_setting(name: str, setting: str, value: str) -> None:
    """Set a value below /proc/sys/net in the namespace. Raises FabricError."""

    def work() -> None:
        enter(name)
        Path("/proc/sys/net", setting).write_text(value)

    try:
        _in_thread(work)
    except OSError as error:
        raise FabricError(f"net/{setting} can't be set in {name}: {words(error)}") from error


def work_in(name: str, work: Callable[[], None]) -> None:
    """Do `work` in a thread inside the namespace. Raises FabricError, also for an OSError of it."""

    def inside() -> None:
        enter(name)
        work()

    try:
        _in_thread(inside)
    except OSError as error:
        raise FabricError(f"in {name}: {error}") from error


def _share_folder() -> None:
    """Let other mount namespaces see what is mounted in the folder, as `ip netns add` does."""
    NAMESPACES_PATH.mkdir(mode=0o755, exist_ok=True)
    folder, libc = os.fsencode(NAMESPACES_PATH), _libc()
    if libc.mount(b"", folder, b"none", _MS_SHARED | _MS_REC, None) != 0:
        _check(libc.mount(folder, folder, b"none", _MS_BIND | _MS_REC, None))
        _check(libc.mount(b"", folder, b"none", _MS_SHARED | _MS_REC, None))


def _unshare_onto(name: str) -> None:
    libc = _libc()
    _check(libc.unshare(CLONE_NEWNET))
    target = os.fsencode(namespace_path(name))
    _check(libc.mount(b"/proc/thread-self/ns/net", target, b"none", _MS_BIND, None))


def _in_thread(work: Callable[[], None]) -> None:
    """Do `work` in a thread that ends; also when interrupted, only return after its end."""
    failures: list[OSError] = []

    def run() -> None:
        try:
            work()
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="namespace", daemon=True)
    thread.start()
    try:
        thread.join(_THREAD_TIMEOUT_S)
    except KeyboardInterrupt:
        thread.join(_THREAD_TIMEOUT_S)
        raise
    if thread.is_alive():
        raise TimeoutError(f"the kernel took more than {_THREAD_TIMEOUT_S:g} s")
    if failures:
        raise failures[0]


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
