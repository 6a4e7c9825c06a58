"""The taps of a guest that is ended: held by us until its process is gone.

The kernel takes some 30 ms to remove a tap, and so would the process's end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os

from hypervisor.qemu.command_line import TAP_FD
from hypervisor.qemu.guest import Guest
from hypervisor.qemu.memory import duplicate_from


def hold(guest: Guest) -> list[int]:
    """Just before it is killed: duplicates of its taps, as far as it has them."""
    held: list[int] = []
    for index in range(len(guest.record.spec.nics)):
        with contextlib.suppress(OSError):
            held.append(duplicate_from(guest.process.pidfd, TAP_FD + index))
    return held


def close_aside(descriptors: list[int]) -> None:
    """Close them off the event loop: the last of a tap's takes until its interface is gone."""
    if descriptors:
        asyncio.get_running_loop().run_in_executor(None, _close_all, descriptors)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
