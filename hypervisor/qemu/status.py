"""QEMU's run states -> Ferry's domain states. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from migrator.model import DomainState


class MigrationStatus(enum.StrEnum):
    """QEMU's MigrationStatus as far as we tell its members apart."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    COMPLETED = "completed"
    FAILED = "failed"
    OTHER = "other"

    @classmethod
    def parse(cls, value: object) -> MigrationStatus:
        """A status that we don't know (another QEMU's) becomes OTHER."""
        try:
            return cls(str(value))
        except ValueError:
            return cls.OTHER


IDLE = frozenset(
    {
        MigrationStatus.NONE,
        MigrationStatus.CANCELLED,
        MigrationStatus.COMPLETED,
        MigrationStatus.FAILED,
    }
)
"""No migration is under way."""

_STATES: Mapping[str, tuple[DomainState, str | None]] = {
    "running": (DomainState.RUNNING, None),
    "paused": (DomainState.PAUSED, None),
    "debug": (DomainState.PAUSED, "stopped by a debugger"),
    "suspended": (DomainState.PAUSED, "the guest suspended itself"),
    "watchdog": (DomainState.PAUSED, "the watchdog fired"),
    "save-vm": (DomainState.PAUSED, "a snapshot is taken"),
    "restore-vm": (DomainState.PAUSED, "a snapshot is restored"),
    "prelaunch": (DomainState.STARTING, None),
    "inmigrate": (DomainState.INCOMING, None),
    "finish-migrate": (DomainState.PRE_SWITCHOVER, None),
    "io-error": (DomainState.IO_ERROR, "a disk failed"),
    "guest-panicked": (DomainState.CRASHED, "the guest panicked"),
    "internal-error": (DomainState.CRASHED, "the hypervisor reports an internal error"),
    "shutdown": (DomainState.STOPPED, "the guest powered off"),
}


def domain_state(
    run_state: str, migration: MigrationStatus, *, incoming: bool, has_run: bool
) -> tuple[DomainState, str | None]:
    """The domain's state and why.

    `incoming`: started as a destination, vCPUs have never run; QEMU calls a loaded one `paused`.
    `has_run`: its vCPUs have run; QEMU calls it `prelaunch` again when it is reset while paused.
    A guest that was paused when its migration began ends in QEMU's `postmigrate` also if that
    migration failed; only a completed one has sent anything away.
    """
    if run_state == "finish-migrate" and migration is MigrationStatus.COMPLETED:
        return DomainState.POSTMIGRATE, None  # QEMU says `completed` a moment earlier.
    if run_state == "postmigrate":
        if migration is MigrationStatus.COMPLETED:
            return DomainState.POSTMIGRATE, None
        return DomainState.PAUSED, None
    if run_state == "prelaunch" and has_run:
        return DomainState.PAUSED, None
    if run_state == "paused" and incoming:
        return DomainState.LOADED, None
    return _STATES.get(run_state, (DomainState.UNKNOWN, f"QEMU's run state is {run_state!r}"))
