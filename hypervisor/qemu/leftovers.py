"""What a driver finds, when it opens, of processes that no record tells of. Two kinds:

    run/DOMAIN without a record    a launch that was cut short: its guest never ran, and is ended
    a record that can't be read    of a guest that may run, or be the only copy: left as it is

The second may be a broken disk's, or another release's. As long as somebody listens in its folder
its domain isn't stopped, whatever else is known: whoever took it for that would start it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from pathlib import Path
from typing import Final

from hypervisor.qemu import records
from hypervisor.qemu.config import MONITORS, monitor_path
from hypervisor.qemu.guest import COMMAND_TIMEOUT_S
from hypervisor.qemu.offload import offload_to_disk
from hypervisor.qemu.qmp import Monitor, QmpEvent, short_path
from migrator.errors import HypervisorError

log = logging.getLogger(__name__)

_CONNECT_S: Final = 0.5
"""A listener's kernel answers at once, unless its queue is full."""
_LEFT: Final = "it is left as it is until that is mended, or it ends, and the agent is restarted"


async def see(directory: Path) -> str:
    """Why nothing can be done with the guest in a folder; "": there is none, or none any more."""
    if await offload_to_disk(lambda: records.has_record(directory)):
        return await offload_to_disk(lambda: _see_unreadable(directory))
    return await _end_unrecorded(directory)


async def _end_unrecorded(directory: Path) -> str:
    """End a launch that was cut short before its record; never a guest that may have run."""
    monitor = Monitor(directory.name, _ignore_event, lambda: None)
    try:
        await monitor.connect(monitor_path(directory, 0), timeout_s=COMMAND_TIMEOUT_S)
        answer = await monitor.execute("query-status", timeout_s=COMMAND_TIMEOUT_S)
        state = answer.get("status") if isinstance(answer, dict) else None
        if state not in ("prelaunch", "inmigrate"):
            return f"a QEMU of {directory.name} is here, {state}, and without a record; {_LEFT}"
        await monitor.execute("quit", timeout_s=COMMAND_TIMEOUT_S)
    except HypervisorError as error:
        log.warning("%s: removing what a cut short launch left (%s)", directory, error)
    finally:
        await monitor.close()
    await offload_to_disk(lambda: records.remove_directory(directory))
    return ""


async def see_removed(domain: str, removal: asyncio.Task[None], *, timeout_s: float) -> None:
    """Before its folder is made anew. HypervisorError: the last run's is still being removed."""
    if not (await asyncio.wait({removal}, timeout=timeout_s))[0]:
        raise HypervisorError(
            f"{domain}: the folder of its last run can't be removed: the state directory's disk "
            f"gave no answer in {timeout_s:g} s; nothing was started"
        )


def _see_unreadable(directory: Path) -> str:
    """Blocks for up to a second."""
    if any(_is_listening(monitor_path(directory, index)) for index in range(MONITORS)):
        record = directory / "state.json"
        return f"a QEMU of {directory.name} may run here: {record} can't be read; {_LEFT}"
    records.remove_directory(directory)
    return ""


def _is_listening(path: Path) -> bool:
    """True also where that can't be said."""
    with contextlib.ExitStack() as stack:
        try:
            address = stack.enter_context(short_path(path))
            connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            connection.settimeout(_CONNECT_S)
            connection.connect(address)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True


def _ignore_event(_event: QmpEvent) -> None:
    pass
