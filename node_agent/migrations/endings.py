"""What is said of a migration that is past what is asked of it: its state, since when, and why."""

from __future__ import annotations

import time
from typing import Final

from migrator.errors import WrongStateError
from migrator.model import Migration, MigrationState

_ENDED: Final = {
    MigrationState.COMPLETED: "has completed",
    MigrationState.CANCELLED: "was cancelled",
    MigrationState.FAILED: "has failed",
}


def too_late(migration: Migration, asked: str) -> WrongStateError:
    """`asked`: what can't be done to it any more, like "cancel"."""
    what = f"migration {migration.id} of domain {migration.domain}"
    if not migration.ended:
        why = f"is in the state {migration.state}: it is too late to {asked} it, it ends by itself"
        why += f" ({migration.error})" if migration.error else ""
        return WrongStateError(what, migration.state, "before its handoff", f"{what} {why}")
    why = f"{_ENDED[migration.state]} already"
    if migration.ended_at_s is not None:
        why += time.strftime(", at %Y-%m-%d %H:%M:%S UTC", time.gmtime(migration.ended_at_s))
    if migration.error:
        why += f" ({migration.error})"
    sentence = f"{what} {why}; there is nothing to {asked} any more"
    return WrongStateError(what, migration.state, "under way", sentence)
