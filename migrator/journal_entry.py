"""What a node remembers of a migration across a crash; pure. `migrator.journal` stores it."""

from __future__ import annotations

from typing import Final

from migrator.model import ENDED, DomainSpec, MigrationRequest, MigrationState, NodeName, Role
from migrator.ports import Struct
from migrator.session.base import Timing
from migrator.session.destination import DestinationSession
from migrator.session.messages import (
    Abort,
    Aborted,
    Commit,
    Inquire,
    Pending,
    Prepare,
    Prepared,
    SessionMessage,
)
from migrator.session.source import SourceSession
from migrator.session.vocabulary import CancelRequested


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
    resuming: bool = False
    """A resume was about to be issued, or was: at the destination; at the source, in a rollback."""
    committed: bool = False
    """The source's device state is known to be out; at the destination: a Commit was heard."""
    post_copy: bool = False
    """Pages are missing at the destination, or may be; unless it is `complete`."""
    complete: bool = False
    cancel: CancelRequested | None = None
    """Source: why it ends, if that was a cancel."""
    switchover_begun: bool = True
    """Source: the guest may have been paused. In SETUP it never was, whatever this says."""
    yielding: bool = False
    """A destination that couldn't run what it had won was about to give the record back."""
    boot_id: str = ""
    """The host's boot that this was written in. A destination's `resuming` may be lost with it."""
    ended_at_s: float | None = None
    last_word: SessionMessage | None = None
    """What the other side is told if it asks after the end."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def entry_of(
    session: SourceSession | DestinationSession, *, boot_id: str, resuming: bool = False
) -> JournalEntry:
    """The session as it stands, for the journal."""
    ended = session.state in ENDED
    last_word = session.last_word() if ended else None
    complete = yielding = False
    cancel: CancelRequested | None = None
    switchover_begun = True
    if isinstance(session, SourceSession):
        cancel, switchover_begun = session.cancel, session.switchover_begun
        committed = session.device_state_out
        resuming = resuming or session.may_have_resumed
    else:
        committed = session.committed
        complete = session.complete is not None
        yielding = session.yielding
        resuming = resuming or session.may_have_run
    return JournalEntry(
        migration_id=session.migration_id,
        role=session.role,
        spec=session.spec,
        source=session.source,
        destination=session.destination,
        token=session.token,
        request=session.request,
        created_at_s=session.created_at_s,
        state=session.state,
        detail=session.error or "",
        resuming=resuming,
        committed=committed,
        post_copy=session.post_copy,
        complete=complete,
        cancel=cancel,
        switchover_begun=switchover_begun,
        yielding=yielding,
        boot_id=boot_id,
        ended_at_s=session.ended_at_s,
        last_word=last_word,
    )


def restore(
    entry: JournalEntry, *, boot_id: str, timing: Timing | None = None
) -> SourceSession | DestinationSession:
    """A fresh session for an entry that has not ended; its first event is to be `Recover`.

    `boot_id` is that of the running host.
    """
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
            journalled=entry.state,
            device_state_out=entry.committed,
            post_copy=entry.post_copy,
            may_have_resumed=entry.resuming,
            cancel=entry.cancel,
            switchover_begun=entry.switchover_begun,
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
        may_have_run=entry.resuming or entry.boot_id != boot_id,
        committed=entry.committed,
        post_copy=entry.post_copy,
        complete=entry.complete,
        yielding=entry.yielding,
    )


def answer_without_session(
    role: Role, entry: JournalEntry | None, message: SessionMessage
) -> SessionMessage | None:
    """What a node says to a message for a migration that it has no session of; None: nothing.

    `role` is the answering side's. Only what waits for an answer gets one, so that two ended sides
    don't keep on answering each other. Entries of ended migrations are kept long enough for this.
    """
    asking = _ASKING[role]
    if not isinstance(message, asking):
        return None
    if entry is not None:
        return entry.last_word  # None: not ended, being restored; the other side asks again.
    if role is Role.SOURCE:
        return Abort(reason="the source doesn't know this migration", over=True)
    if isinstance(message, Prepare):
        return None
    return Aborted(reason="unknown at the destination", unknown=True)


_ASKING: Final = {
    Role.SOURCE: (Inquire, Prepared, Pending),
    Role.DESTINATION: (Inquire, Commit, Prepare),
}
