"""What state a guest is in, and which disk paused it: more than its run state alone tells.

QEMU 7.2 calls a guest `postmigrate` that a disk's error had paused before its migration failed. Its
disks still know that they failed, until it is resumed; without that it would stay paused for good.
"""

from __future__ import annotations

import time

from hypervisor.qemu import io_errors
from hypervisor.qemu.guest import Guest
from hypervisor.qemu.status import MigrationStatus
from migrator.errors import HypervisorError
from migrator.model import DomainState


async def asked(guest: Guest, *, timeout_s: float) -> tuple[DomainState, str | None]:
    """The domain's state, and why. HypervisorError: QEMU doesn't say within that time in all."""
    end_s = time.monotonic() + timeout_s
    if guest.said is not None:  # It starts, and doesn't answer yet.
        run_state = "inmigrate" if guest.incoming else "prelaunch"
    else:
        run_state = await guest.run_state(timeout_s=timeout_s)
    if run_state == "postmigrate" and guest.migration is not MigrationStatus.COMPLETED:
        await guest.refresh(timeout_s=(end_s - time.monotonic()) / 2)  # It asks twice.
    return await told(guest, run_state, timeout_s=end_s - time.monotonic())


async def told(guest: Guest, run_state: str, *, timeout_s: float) -> tuple[DomainState, str | None]:
    """The domain's state for QEMU's `run_state`, and why. What QEMU doesn't say is left out."""
    state, cause = guest.domain_state(run_state)
    forgotten = state is DomainState.PAUSED and run_state == "postmigrate"
    if state is not DomainState.IO_ERROR and not forgotten:
        return state, cause
    failed = await _disk_error(guest, timeout_s)
    if forgotten and failed is None:
        return state, cause
    return DomainState.IO_ERROR, failed or cause


async def _disk_error(guest: Guest, timeout_s: float) -> str | None:
    """Which disk failed and how; less of it where the event was another agent's to hear."""
    if guest.io_error is None:
        try:
            devices = await guest.execute("query-block", timeout_s=timeout_s)
        except HypervisorError:
            return None
        guest.io_error = io_errors.describe_status(devices, guest.record.spec)
    return guest.io_error
