"""The taps of a guest that is ended: held by us until its process is gone.

The kernel takes some 30 ms to remove a tap, and so would the process's end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os

from hypervisor.qemu import records
from hypervisor.qemu.command_line import TAP_FD
from hypervisor.qemu.guest import Guest
from hypervisor.qemu.memory import duplicate_from
from migrator.errors import words

log = logging.getLogger(__name__)


def hold_until_end(guest: Guest) -> list[int]:
    """Just before it is killed: `hold`, and whoever finds it ended will know that it was to.

    Never raises: a disk that takes no writes any more must not keep alive what has to end.
    """
    taps = hold(guest)
    try:
        records.expect_end(guest.directory)
    except OSError as error:
        log.error("%s: that its end is wanted can't be noted: %s", guest.name, words(error))
    return taps


def hold(guest: Guest) -> list[int]:
    """Duplicates of its taps, as far as it has them."""
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
