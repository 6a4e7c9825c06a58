"""Beside the invariants: a cancel that was noted ends as one, whoever dies meanwhile.

It may come too late, or the guest end by itself. But a guest that goes on at its source was kept
there by the cancel, and that is what its users read, and by whom.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from migrator.model import MigrationState
from migrator.session.source import SourceSession
from tests.simulation.world import InvariantViolation

if TYPE_CHECKING:
    from tests.simulation.side import Side


def note(side: Side) -> None:
    """The journal was written as its session stands."""
    if isinstance(side.session, SourceSession) and side.session.cancel is not None:
        side.cancel_noted = side.session.cancel


def check_end(side: Side) -> None:
    """Its session has ended."""
    session, noted = side.session, side.cancel_noted
    if noted is None or not isinstance(session, SourceSession):
        return
    if side.guest is None or side.guest is not side.leaving:
        return
    if session.state is not MigrationState.CANCELLED or session.cancelled_by != noted.by:
        raise InvariantViolation(
            f"cancel: by {noted.by}, and it ended {session.state.value} by {session.cancelled_by}: "
            f"{session.error}"
        )
