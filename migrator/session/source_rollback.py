"""A rollback at the source: the record was won back, and the guest is resumed here.

    won, fenced ──► journal: "resuming" ──► `cont`
                     │ it can't be written, or its disk hangs
                     └──► record: (here, t) -> (here, t+3), fenced ──► `cont`

It may fail: the hypervisor dies. As long as it is certain that no vCPU ran here meanwhile, the
destination's copy is the newest there is; so the handoff begins anew, under the token that was won.
The next agent has to be as certain. So a rollback is noted before its `cont`, where that outlives
this host: in the journal. But a guest that stands still doesn't wait for a disk. Where the journal
isn't written soon, the record says it, without which there is no rollback in any case.

- What was tried may land late. So from the first try on, nothing is resumed before the record is
  known to say it. The next agent doesn't know what was tried: what it finds won, it makes say so.
- It says that to the source alone. A destination keeps its copy, as after any rollback, until the
  source has ended; and where the hypervisor dies before its `cont`, the handoff begins anew.
"""

from __future__ import annotations

from migrator.model import OwnershipRecord, OwnershipState
from migrator.ports import DomainEventKind
from migrator.session.messages import Commit
from migrator.session.source_view import SourceView
from migrator.session.vocabulary import (
    CommandFailed,
    Event,
    Fence,
    Fenced,
    GuestReported,
    GuestResumed,
    InspectGuest,
    Journal,
    ReadRecord,
    RecordRead,
    RecordSwapped,
    ResumeGuest,
    SwapRecord,
)


def _held_back_a_resume(event: CommandFailed) -> bool:
    return any(isinstance(command, ResumeGuest) for command in event.dropped)


class SourceRollback(SourceView):
    """See the module."""

    @property
    def _rollback_record(self) -> OwnershipRecord:
        """As we have won it."""
        assert self._rollback_token is not None
        return OwnershipRecord(
            domain=self.domain,
            token=self._rollback_token,
            owner=self.source,
            state=OwnershipState.RUNNING,
        )

    def _commit(self) -> None:
        self._send(Commit(post_copy=self.post_copy, token=self.token))

    def _rollback(self, token: int) -> None:
        """The destination keeps its copy until the guest runs here."""
        self._rollback_token = token
        self._newest_token = max(self._newest_token, token)
        self._do(Fence(token=token))

    def _in_rollback(self, event: Event) -> bool:
        """Whether it was the rollback's to hear."""
        if self._rollback_token is None or self._destination_runs:
            return False
        busy = self._saying or self._resume_pending
        match event:
            case RecordRead() if self._doubts_rollback:
                self._doubts_rollback = False
                self._roll_back_by(event)
            case RecordSwapped(won=True) if self._saying:
                self._said()
            case RecordSwapped() if self._saying:
                self._doubts_rollback = True
                self._look_after_swap(event)
            case Fenced() if event.token == self._rollback_token and not busy:
                self._resume_here()
            case GuestResumed():
                self._note_blackout(event.at_s)
                self._finish_stopped()
            case GuestReported(kind=DomainEventKind.RESUMED) if self._may_have_resumed and not busy:
                # After its answer was given up: what passes until the next look is no blackout.
                self._note_blackout(event.at_s)
                self._finish_stopped()
            case CommandFailed(command="ResumeGuest"):
                self._resume_pending = False
                if event.without_effect:
                    self._may_have_resumed = self._may_have_resumed_before
                self._do(InspectGuest())
            case CommandFailed(command="Journal") if _held_back_a_resume(event):
                self._resume_pending = False  # It wasn't resumed.
                self._may_have_resumed = self._may_have_resumed_before
                self._note("rollback", self._now, self._now, f"the record notes it: {event.error}")
                self._say()
            case _:
                return False
        return True

    def _resume_here(self) -> None:
        """The storage is fenced. What may not be forgotten is noted, unless it is already."""
        noted = self._may_have_resumed or self._said_resuming
        self._may_have_resumed_before = self._may_have_resumed
        self._may_have_resumed = self._resume_pending = True
        if not noted:
            self._do(Journal(state=self.state, resuming=True))
        self._do(ResumeGuest())

    # --- noted in the record ---

    def _say(self) -> None:
        won = self._rollback_record
        self._saying = True
        self._do(SwapRecord(expected=won, new=won.said_resuming()))

    def _said(self) -> None:
        token = self._rollback_record.said_resuming().token
        self._saying, self._said_resuming = False, True
        if self._gone:
            self._gone_after_rollback(token)
        else:
            self._rollback(token)

    def _find_won(self, token: int) -> None:
        """The record was won back, by us or by our last agent, which may have tried to say so."""
        lost = self._gone and (self._may_have_resumed or self._destination_refused)
        if self._journalled is not None and not lost:
            self._rollback_token = token
            self._say()
        elif self._gone:
            self._gone_after_rollback(token)
        else:
            self._rollback(token)

    def _find_said(self, token: int) -> None:
        """The last agent was about to give `cont`. Where the guest is still there, it didn't."""
        self._said_resuming = True
        if self._gone:
            self._may_have_resumed = True
            self._gone_after_rollback(token)
        else:
            self._rollback(token)

    # --- what may become of it ---

    def _doubt_rollback(self) -> None:
        """While it couldn't go on, another node may have taken the domain over."""
        self._doubts_rollback = True
        self._do(ReadRecord())

    def _roll_back_by(self, event: RecordRead) -> None:
        """Go on with a rollback that was interrupted, if the record is still the one we won."""
        record, won = event.record, self._rollback_record
        if not event.known:
            self._retry_later()
        elif record is None or record.state is not OwnershipState.RUNNING:
            self._discard("the domain was stopped or removed meanwhile")
        elif self._saying and record == won.said_resuming():
            self._said()
        elif record == won and self._saying:
            self._say()
        elif record == won:
            self._do(Fence(token=won.token))
        else:
            self._discard(f"{record.owner} took the domain over, with token {record.token}")

    def _gone_after_rollback(self, token: int) -> None:
        """The record is ours, and our hypervisor is gone."""
        self._gone = True
        if self._may_have_resumed or self._destination_refused:
            self._finish_gone()
            return
        self._note("rollback failed", self._now, self._now, "the hypervisor died before it resumed")
        self._rollback_token = None
        self._said_resuming = False
        self.token = token
        self.device_state_out = True
        self._commit()
        self._retry_later()
        self._journal()  # Last: it may fail.

    # --- the ends ---

    def _discard(self, error: str) -> None:
        raise NotImplementedError  # In `source_recovery`.

    def _finish_gone(self) -> None:
        raise NotImplementedError  # In `source_recovery`.

    def _finish_stopped(self) -> None:
        raise NotImplementedError  # In `source_recovery`.
