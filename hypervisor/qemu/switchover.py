"""The switchover's part that QEMU does: stop the guest, move its device state, or give it up.

    source                                      destination
    prepare    capabilities, parameters         receive    capabilities, migrate-incoming
    begin      migrate ──▶ STOP, pre-switchover
               (the last pages are copied by the page engine)
    proceed    migrate-continue ──▶ completed   ──▶ completed: loaded, paused
    abort      cancel ──▶ runs again, or too late

Guest memory is shared (`x-ignore-shared`): QEMU sends device state and small ROMs only. Who runs
the guest after `completed` is none of QEMU's business, see
ARCHITECTURE, "What keeps it to one writer".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from hypervisor.qemu.guest import Guest
from hypervisor.qemu.qmp import QmpCommandError, QmpDisconnected, QmpNotSent, QmpTimeout
from hypervisor.qemu.status import IDLE, MigrationStatus
from migrator.errors import HypervisorError
from migrator.model import DomainState
from migrator.ports import AbortOutcome

HANDOFF_CAPABILITIES: Final = {
    "pause-before-switchover": True,
    "late-block-activate": True,
    "events": True,
}
_CAPABILITIES: Final = {**HANDOFF_CAPABILITIES, "x-ignore-shared": True, "multifd": False}
"""All that an earlier migration of the same process, of either engine, may have set otherwise."""

UNLIMITED_BYTES_PER_S: Final = 1 << 40
DOWNTIME_MS_MAX: Final = 2_000_000
_PARAMETERS: Final = {
    "max-bandwidth": UNLIMITED_BYTES_PER_S,
    "downtime-limit": DOWNTIME_MS_MAX,
    "tls-creds": "",
}
"""QEMU's largest: so that it goes to the switchover at once and isn't throttled."""

CANCEL_TIMEOUT_S = 0.3
"""QEMU answers in ms. If it doesn't, its migration hangs in its socket and holds the main loop's
lock; then `yank`, which needs no lock, cuts the socket (measured: it resumes 1 ms later)."""
DEVICE_TIMEOUT_S = 0.5
"""Sending the device state takes some ms. While it lasts we wait instead of cancelling: cancelled
between inactivating its disks and `completed`, a QEMU may run on with inactive disks."""
SETTLE_TIMEOUT_S = 3.0
_SETTLE_PAUSE_S = 0.003


async def prepare(guest: Guest) -> None:
    """Set all that can be set while the guest runs. Idempotent."""
    await set_capabilities(guest, _CAPABILITIES)
    await guest.execute("migrate-set-parameters", _PARAMETERS)
    guest.prepared = True


async def begin(guest: Guest, device_channel: Path) -> None:
    """Stop the guest and send its device state up to the last pages, to a unix socket.

    HypervisorError if QEMU refuses; the guest then runs on. Events tell the rest. A guest that
    was paused when an earlier switchover was aborted is refused until it has run: QEMU 7.2 can't
    tell it from one that was sent away.
    """
    if not guest.prepared:
        await prepare(guest)
    await guest.urgency.hurry()
    await start(guest, f"unix:{device_channel}")


async def start(guest: Guest, uri: str) -> None:
    """QEMU's `migrate`. HypervisorError if QEMU refuses; the guest then runs on. Without an answer
    it counts as under way, until `abort` or an event tells.
    """
    before = guest.migration
    guest.migration = MigrationStatus.SETUP
    guest.awaits_pause = True
    try:
        await guest.execute("migrate", {"uri": uri})
    except (QmpCommandError, QmpNotSent):
        guest.migration = before
        guest.awaits_pause = False
        raise


async def proceed(guest: Guest) -> None:
    """The last pages are in place: send the rest. HypervisorError if it isn't pre-switchover."""
    await guest.execute("migrate-continue", {"state": "pre-switchover"})


async def receive(guest: Guest, device_channel: Path) -> None:
    """Destination: listen on a unix socket for the device state. HypervisorError if it can't."""
    await guest.urgency.hurry()  # Until it is sent a guest, it does nothing.
    await set_capabilities(guest, _CAPABILITIES)
    await guest.execute("migrate-incoming", {"uri": f"unix:{device_channel}"})


async def set_capabilities(guest: Guest, wanted: Mapping[str, bool]) -> None:
    states = [{"capability": name, "state": state} for name, state in wanted.items()]
    await guest.execute("migrate-set-capabilities", {"capabilities": states})


async def abort(guest: Guest) -> AbortOutcome:
    """Give the switchover up and find out what became of the guest. Idempotent.

    Takes some ms, 1 s where a peer is stuck, 7 s at most.

    HypervisorError if QEMU stays silent: the outcome is unknown, and the guest is left alone. It
    may still be the only copy, so it is the caller that decides whether to kill it.
    """
    if guest.process.exited:
        return AbortOutcome.GONE
    try:
        await _cancel(guest)
    except (QmpTimeout, QmpDisconnected):
        await guest.yank_migration()
    if not await guest.wait_until(lambda: guest.migration in IDLE, timeout_s=SETTLE_TIMEOUT_S):
        await guest.yank_migration()
    return await _outcome(guest)


async def _cancel(guest: Guest) -> None:
    """Make QEMU end its migration, by the gentlest means that its phase allows."""
    await guest.refresh(timeout_s=CANCEL_TIMEOUT_S)
    if guest.migration is MigrationStatus.DEVICE:
        ended = await guest.wait_until(lambda: guest.migration in IDLE, timeout_s=DEVICE_TIMEOUT_S)
        if not ended:
            await guest.yank_migration()
    elif guest.migration not in IDLE:
        await guest.execute("migrate_cancel", timeout_s=CANCEL_TIMEOUT_S)


async def _outcome(guest: Guest) -> AbortOutcome:
    """Wait until QEMU has settled. The run state follows the migration's end by a few ms."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while time.monotonic() < deadline:
        if guest.process.exited:
            return AbortOutcome.GONE
        try:
            run_state = await guest.refresh(timeout_s=CANCEL_TIMEOUT_S)
        except HypervisorError:
            await asyncio.sleep(_SETTLE_PAUSE_S)
            continue
        if run_state != "finish-migrate" and guest.migration in IDLE:
            state, _ = guest.domain_state(run_state)
            return AbortOutcome.SENT if state is DomainState.POSTMIGRATE else AbortOutcome.RESUMED
        await asyncio.sleep(_SETTLE_PAUSE_S)
    if guest.process.exited:
        return AbortOutcome.GONE
    raise HypervisorError(
        f"{guest.name}: QEMU doesn't say whether it gave the switchover up; it was left as it is"
    )
