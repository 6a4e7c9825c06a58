"""What is said of a migration that is past what is asked of it: its state, since when, and why."""

from __future__ import annotations

import time
from typing import Final

from migrator.errors import WrongStateError
from migrator.model import Migration, MigrationState

NOT_CANCELLED: Final = "it was not cancelled"
_ENDED: Final = {
    MigrationState.COMPLETED: "has completed",
    MigrationState.CANCELLED: "was cancelled",
    MigrationState.FAILED: "has failed",
}


def too_late(migration: Migration, left: str) -> WrongStateError:
    """`left`: what was not done. Of one that goes on: it is past the beginning of its handoff."""
    if not migration.ended:
        why = f"is in the state {migration.state}, where only its own outcome ends it"
        required = "before its handoff"
    else:
        why = f"{_ENDED[migration.state]} already"
        if migration.ended_at_s is not None:
            ended_at = time.gmtime(migration.ended_at_s)
            why += time.strftime(", at %Y-%m-%d %H:%M:%S UTC", ended_at)
        if migration.error:
            why += f" ({migration.error})"
        required = "under way"
    what = f"migration {migration.id} of domain {migration.domain}"
    return WrongStateError(what, migration.state, required, f"{what} {why}; {left}")
