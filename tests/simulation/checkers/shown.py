"""Beside the invariants: an end that users were shown stays as it was shown.

A source shows `completed` as soon as the guest is the destination's, before its own copy is gone.
"""

from __future__ import annotations

from migrator.model import MigrationState
from migrator.session.base import Session
from migrator.session.source import SourceSession
from tests.simulation.world import InvariantViolation


def end_of(session: Session) -> MigrationState | None:
    """As users see it."""
    if not isinstance(session, SourceSession) or not session.over:
        return None
    return session.view().state


def check(before: MigrationState | None, session: Session) -> None:
    """After each event: `before` was shown when it came."""
    if before is not None and end_of(session) is not before:
        raise InvariantViolation(f"6: shown as {before}, and then as {session.state}")
