"""Running a guest's vCPUs, and what is certain when that fails.

cont ──▶ answered, or RESUME heard      they run; QEMU says since when
     ──▶ refused, or QEMU dead without  none ran: NotResumedError, and a handoff may be undone
     ──▶ anything else                  unknown: HypervisorError
"""

from __future__ import annotations

import asyncio
import time

from hypervisor.qemu.guest import COMMAND_TIMEOUT_S, Guest
from hypervisor.qemu.qmp import QmpCommandError, QmpDisconnected, QmpNotSent
from migrator.errors import HypervisorError, NotResumedError

CONT_TIMEOUT_S = 15.0
"""`cont` on a destination opens its disks for writing first."""
UNFINALIZED_TIMEOUT_S = 2.0
"""QEMU reports `completed` a moment before it accepts `cont`."""
EXIT_NOTICE_TIMEOUT_S = 0.5
"""From a dying process's last word on its monitor to its end."""


async def cont(guest: Guest) -> float:
    """Run the vCPUs; returns the wall-clock time (s) at which QEMU ran them. Idempotent.

    HypervisorError if they don't run; the guest then stands as before. NotResumedError: also
    if QEMU is gone by now, it is certain that none ran. A destination that isn't loaded is
    refused: QEMU would take `cont` as leave to run by itself later.
    """
    await _refuse_unloaded(guest)
    before = guest.resumes
    deadline = time.monotonic() + UNFINALIZED_TIMEOUT_S
    while True:  # Bounded by `deadline`.
        try:
            await _cont_or_resumed(guest, before)
            break
        except QmpCommandError as error:
            if "not finalized" not in str(error) or time.monotonic() > deadline:
                raise NotResumedError(str(error)) from error
            await asyncio.sleep(0.002)
    if guest.resumes > before:
        return guest.resumed_at_s
    run_state = await guest.run_state(timeout_s=COMMAND_TIMEOUT_S)
    if run_state != "running":
        raise HypervisorError(f"{guest.name}: doesn't run after cont: QEMU says {run_state}")
    return guest.resumed_at_s or time.time()


async def _refuse_unloaded(guest: Guest) -> None:
    """NotResumedError if it is a destination that isn't loaded, or doesn't say."""
    try:
        if not guest.incoming or guest.loaded or await guest.refresh() != "inmigrate":
            return
    except HypervisorError as error:
        raise NotResumedError(f"{error}; cont was not sent") from error
    raise NotResumedError(
        f"{guest.name}: can't be resumed: its state is incoming and not loaded yet"
    )


async def _cont_or_resumed(guest: Guest, before: int) -> None:
    """Send `cont` and wait for its answer or for RESUME, which comes up to 3 ms earlier."""
    command = asyncio.create_task(guest.execute("cont", timeout_s=CONT_TIMEOUT_S))
    resumed = asyncio.create_task(
        guest.wait_until(lambda: guest.resumes > before, timeout_s=CONT_TIMEOUT_S)
    )
    await asyncio.sleep(0)  # Both begin.
    number = guest.executed
    try:
        await asyncio.wait((command, resumed), return_when=asyncio.FIRST_COMPLETED)
        if guest.process.exited and guest.resumes == before:
            await asyncio.wait([command])  # Until its connection is read to the end; bounded.
    finally:
        resumed.cancel()
        if not command.done():
            guest.keep(command)
    if not command.done():
        return
    try:
        command.result()
    except QmpNotSent as error:
        raise NotResumedError(f"{error}; cont was not sent") from error
    except QmpDisconnected as error:
        if await _never_ran(guest, before, number):
            raise NotResumedError(f"{error}; QEMU died before any vCPU ran") from error
        raise


async def _never_ran(guest: Guest, before: int, number: int) -> bool:
    """Whether a `cont` whose connection broke is certain to have run no vCPU.

    QEMU writes RESUME to its monitors before it lets a vCPU go (vm_prepare_start, then
    resume_all_vcpus). So if its process is dead, and what it wrote was read to the end without
    a RESUME, none ran. All of it was read unless the socket was reset, which Linux does if the
    dead process left something unread: then that was the `cont`, because nothing was sent
    after it.
    """
    dead = await guest.process.wait(timeout_s=EXIT_NOTICE_TIMEOUT_S)
    return dead and guest.resumes == before and guest.executed == number
