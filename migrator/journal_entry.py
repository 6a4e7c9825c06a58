"""What a node remembers of a migration across an agent's crash: pure; `migrator.journal` stores it."""

from __future__ import annotations

from migrator.model import ENDED, DomainSpec, MigrationRequest, MigrationState, NodeName, Role
from migrator.ports import Struct
from migrator.session.base import Session, Timing
from migrator.session.destination import DestinationSession
from migrator.session.messages import Abort, Aborted, Inquire, SessionMessage
from migrator.session.source import SourceSession


class JournalEntry(Struct, frozen=True, kw_only=True):
    """One side of one migration. Written before its first effect, and at each `Journal` command."""

    migration_id: str
    role: Role
    spec: DomainSpec
    source: str
    destination: str
    token: int
    request: MigrationRequest
    created_at_s: float
    state: MigrationState
    detail: str = ""
    ended_at_s: float | None = None
    last_word: SessionMessage | None = None
    """What the other side is told if it asks after the end."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def entry_of(session: Session, request: MigrationRequest, spec: DomainSpec) -> JournalEntry:
    """The session as it stands, for the journal."""
    ended = session.state in ENDED
    last_word: SessionMessage | None = None
    if ended and isinstance(session, SourceSession | DestinationSession):
        last_word = session.last_word()
    return JournalEntry(
        migration_id=session.migration_id,
        role=session.role,
        spec=spec,
        source=session.source,
        destination=session.destination,
        token=session.token,
        request=request,
        created_at_s=session.created_at_s,
        state=session.state,
        detail=session.error or "",
        ended_at_s=session.ended_at_s,
        last_word=last_word,
    )


def restore(
    entry: JournalEntry, timing: Timing | None = None
) -> SourceSession | DestinationSession:
    """A fresh session for an entry that has not ended; its first event is to be `Recover`."""
    if entry.role is Role.SOURCE:
        return SourceSession(
            migration_id=entry.migration_id,
            spec=entry.spec,
            source=NodeName(entry.source),
            destination=NodeName(entry.destination),
            token=entry.token,
            request=entry.request,
            created_at_s=entry.created_at_s,
            timing=timing,
        )
    return DestinationSession(
        migration_id=entry.migration_id,
        spec=entry.spec,
        source=NodeName(entry.source),
        destination=NodeName(entry.destination),
        token=entry.token,
        request=entry.request,
        created_at_s=entry.created_at_s,
        timing=timing,
    )


def answer_without_session(
    role: Role, entry: JournalEntry | None, message: SessionMessage
) -> SessionMessage | None:
    """What a node says to a message for a migration that it has no session of; None: nothing.

    `role` is the answering side's. Entries of ended migrations are kept long enough for this.
    """
    if isinstance(message, Abort | Aborted):
        return None
    if entry is not None and entry.last_word is not None:
        return entry.last_word
    if entry is not None:
        return None  # Not ended: the session is being restored; the other side asks again.
    if role is Role.SOURCE:
        return Abort(reason="the source doesn't know this migration")
    if isinstance(message, Inquire):
        return Aborted(reason="the destination doesn't know this migration")
    return None
