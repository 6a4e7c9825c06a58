"""Recovery at the source: the device state is out, or may be; the record decides whose guest it is.

Nothing here resumes the guest without having won, or read, a record that names this node with a
token newer than the one that the migration began with.
"""

from __future__ import annotations

from typing import Final

from migrator.model import MigrationState, OwnershipRecord, OwnershipState
from migrator.session.messages import Abort, Farewell, Inquire, Lost, Pending, Running
from migrator.session.source_rollback import SourceRollback
from migrator.session.vocabulary import (
    AbortSwitchover,
    CancelRequested,
    CommandFailed,
    DestroyGuest,
    Event,
    GuestCondition,
    GuestDestroyed,
    GuestInspected,
    InspectGuest,
    Journal,
    ReadRecord,
    RecordRead,
    RecordSwapped,
    StopEngine,
    StopTimer,
    SwapRecord,
    TimerFired,
    TimerName,
)
from migrator.states import BEFORE_HANDOFF

_S = MigrationState
PAGES_GONE: Final = (
    "the source's hypervisor and engine ended before the destination held every page"
)


class SourceRecovery(SourceRollback):
    """See the module."""

    def _recover(self, reason: str) -> None:
        """The device state is out. Find out from the record whose guest it is."""
        self.error = self.error or reason
        if self.state is not _S.RECOVERING:
            self._enter(_S.RECOVERING, reason)
        self._do(
            StopTimer(name=TimerName.HANDOFF), StopTimer(name=TimerName.SWITCHOVER), ReadRecord()
        )

    def _in_recovering(self, event: Event) -> None:
        match event:
            case _ if self._in_rollback(event):
                pass
            case GuestInspected():
                self._recover_guest(event.condition)
            case RecordRead() if not self._destination_runs and self._rollback_token is None:
                self._recover_by(event)
            case RecordSwapped(won=True) if self._rollback_token is None:
                self._rollback(self._swap_token)
            case RecordSwapped() if self._rollback_token is None:
                self._look_after_swap(event)
            case GuestDestroyed() if self._destination_runs:
                self._complete()
            case CommandFailed():
                self._retry_later()
            case TimerFired(name=TimerName.RETRY):
                self._retry()
            case _:
                pass

    def _retry(self) -> None:
        if self._destination_runs:
            self._do(DestroyGuest())
        elif self._rollback_token is not None:
            if not self._resume_pending:  # Else its answer comes.
                self._doubt_rollback()
        else:
            self._send(Inquire())
            self._do(InspectGuest())

    def _recover_guest(self, condition: GuestCondition) -> None:
        """What the hypervisor says, after a restart or while the record is awaited."""
        match condition:
            case GuestCondition.RUNNING | GuestCondition.STOPPED_OTHERWISE if (
                self._rollback_token is not None
            ):
                self._finish_stopped()
            case (
                GuestCondition.RUNNING | GuestCondition.STOPPED_OTHERWISE | GuestCondition.SWITCHING
            ):
                # It never left: only a won record resumes a sent guest. But a switchover that was
                # begun before the restart may not show yet, so it is aborted in any case.
                self.error = self.error or "the agent restarted during the migration"
                self._enter(_S.CANCELLING, self.error)
                self._do(AbortSwitchover())
            case GuestCondition.GONE if self._saying:
                self._gone = True  # Once the record is known to say it, that counts.
            case GuestCondition.GONE if self._rollback_token is not None:
                self._gone_after_rollback(self._rollback_token)
            case GuestCondition.GONE if not self._switchover_begun:
                self._finish_gone()
            case _ if self._rollback_token is not None:
                self._retry_later()
            case _:
                self.error = self.error or "the agent restarted during the handoff"
                self._gone = condition is GuestCondition.GONE
                if condition is GuestCondition.SENT:
                    self.device_state_out = True
                self._do(ReadRecord())

    def _recover_by(self, event: RecordRead) -> None:
        record = event.record
        if not event.known:
            self._retry_later()
        elif record is None or record.state is not OwnershipState.RUNNING:
            self._discard("the domain was stopped or removed meanwhile")
        elif record.owner == self.source:
            self._recover_own(record)
        elif record == self.record_before.passed_to(self.destination):
            # The destination won. Keep our copy until its vCPUs are known to run, or to never run.
            if self._removed and self.post_copy and not self._destination_refused:
                self._give_no_more()  # Its word can't come any more.
            elif not self._destination_refused:
                self._send(Inquire(whole=not self._gone))
                if self._pages_gone and self._destination_is_at_it:
                    self._send(Lost(reason=PAGES_GONE))  # It may wait for one of them.
                self._retry_later()
            elif self._gone:
                self._finish_gone()
            elif self._destination_forgot:
                self._was_forgotten()
            else:
                self._swap(record)
        elif record.owner == self.destination:
            # It has been started there, or handed over again, since.
            self._discard(self._unfinished(record) if self.post_copy else "")
        else:
            self._discard(f"{record.owner} took the domain over, with token {record.token}")

    def _unfinished(self, record: OwnershipRecord) -> str:
        """Of a post-copy that nobody has told the end of."""
        return (
            f"it ended at {self.destination} before all of its memory was there, as far as "
            f"{self.source} knows; it was started anew since, with token {record.token}"
        )

    def _was_forgotten(self) -> None:
        """It won, and has ended since then, or it would know us. So our copy is stale: one that
        ends without having run the guest passes the record back first. This read may have begun
        before that; the next one didn't.
        """
        self._reads_since += 1
        if self._reads_since > 1:
            self._discard("")
        else:
            self._retry_later()

    def _recover_own(self, record: OwnershipRecord) -> None:
        """The record names this node. With which token, and whose doing was it?"""
        taken_back = self.next_token + 1
        won = self.record_before.passed_to(self.source)
        said = (won.said_resuming(), won.passed_to(self.source).said_resuming())
        if record.token == self.token:
            self._recover_unpassed(record)
        elif record.token == self.next_token or (
            record.token == taken_back
            and (self._destination_refused or self._yielded == self.next_token)
        ):
            self._find_won(record.token)
        elif record in said:
            self._find_said(record.token)
        elif record.token == taken_back:
            # Taken back before our restart, or the domain ran there and was started anew here: then
            # our copy is stale. The destination knows which.
            self._send(Inquire())
            self._retry_later()
        else:
            self._discard(f"the domain was started anew, with token {record.token}")

    def _recover_unpassed(self, record: OwnershipRecord) -> None:
        if not self._gone:
            self._swap(record)
        elif self._destination_refused:
            self._finish_gone()
        elif self.device_state_out:
            # Only the destination has the guest's memory, and it can't have loaded the device state
            # before the last page was in place: what it has loaded is whole.
            self._commit()
            self._retry_later()
        else:
            # Whether the device state went out, or the guest resumed here and ran on before it
            # died, nobody knows. So what the destination has may be stale: it must not run, unless
            # it has a Commit from before our restart.
            self._send(Abort(reason=self.error or "the source's hypervisor is gone"))
            self._retry_later()

    def _discard(self, error: str) -> None:
        """Our copy is stale for good. With an `error` that isn't this migration's success."""
        if self._handed_over_at_s is None:
            self._discard_error = error
        self._destination_runs = True
        if not self._discard_error:
            self._hand_over()
        self._do(StopTimer(name=TimerName.RETRY), DestroyGuest())

    def _swap(self, record: OwnershipRecord) -> None:
        self._swap_token = record.token + 1
        self._do(SwapRecord(expected=record, new=record.passed_to(self.source)))

    # --- the ends ---

    def _cancel(self, event: CancelRequested) -> None:
        """A user's wish outlives the agent; not the host, with which the guest would be gone.

        It is noted last: a disk that hangs must not keep the guest paused.
        """
        self._cancelled, self.cancelled_by = True, event.by
        self._give_up(event.reason)
        if self.state is _S.CANCELLING:  # Else it has ended, which is journalled.
            self._do(Journal(state=self.state, durable=False))

    def _destination_gave_up(self, reason: str, *, unknown: bool) -> None:
        known = self._destination_refused and not self._destination_forgot
        self._destination_forgot = unknown and not known
        if self.state in BEFORE_HANDOFF:
            self._give_up(f"the destination gave up: {reason}")
        elif self.state is _S.POSTCOPY and unknown and not self._destination_runs:
            self._discard("")  # It ran there, and has ended: it needs nothing any more.
        elif self.state is _S.CANCELLING:
            self._destination_refused = True
        elif self.state in (_S.HANDOFF, _S.RECOVERING) and not self._destination_runs:
            self._destination_refused = True
            if self.state is _S.HANDOFF:
                self._recover(f"the destination gave up: {reason}")
            elif self._rollback_token is None:
                # After a restart the guest may never have been paused: ask it before the record.
                self._do(InspectGuest())

    def _destination_cut_off(self, reason: str) -> None:
        """It will hardly get the rest of the guest, but keeps its copy until we say so."""
        if self.state in BEFORE_HANDOFF:
            self._give_up(f"the destination gave up: {reason}")
        elif self.state is _S.HANDOFF and not self._destination_runs:
            self._recover(f"the destination gave up: {reason}")

    def _destination_stuck(self, message: Pending) -> None:
        """It has won the guest, which stands still. The operator has to know; and if it has passed
        the record back, keeping its copy, which never ran, the guest is ours to resume.
        """
        rolls_back = self._rollback_token is not None
        if self.state is not _S.RECOVERING or self._destination_runs or rolls_back:
            return
        self._destination_is_at_it = True
        why = f": {message.stuck}" if message.stuck else ""
        if message.yielded == self.next_token:
            self._yielded = message.yielded
            self.error = f"{self.destination} couldn't run the guest, and gave it back{why}"
            self._do(ReadRecord())
        elif message.stuck:
            self.error = f"the guest stands still: {self.destination} can't run it yet{why}"

    def _destination_runs_now(self, message: Running) -> None:
        if self.state is _S.POSTCOPY and not message.resumed_at_s and not self._destination_runs:
            self._discard("the destination's hypervisor died during post-copy")
            return
        if self.state not in (_S.HANDOFF, _S.RECOVERING) or self._destination_runs:
            return
        if self._rollback_token is not None or message.token != self.next_token:
            return  # We hold a newer token, or it isn't about this handoff: the word is stale.
        message = message.by_clock_of(self._sent_at_s or self._paused_at_s or 0.0, self._now)
        if message.resumed_at_s:
            self._note_blackout(message.resumed_at_s)
        elif self._handed_over_at_s is None:
            self._discard_error = "the destination's hypervisor died in the handoff"
        if self._sent_at_s is not None and message.won_at_s:
            # Before it had heard of its last byte, it may have loaded it.
            loaded_at_s = max(message.loaded_at_s, self._sent_at_s)
            self._note("load", self._sent_at_s, loaded_at_s, "device state, at the destination")
            self._note("ownership record", loaded_at_s, message.won_at_s)
            fenced_at_s = message.fenced_at_s or message.won_at_s
            self._note("fence", message.won_at_s, fenced_at_s, message.fence_detail)
            self._note("activate", fenced_at_s, message.resumed_at_s, "disks opened, guest resumed")
        if self.post_copy and message.resumed_at_s:
            self._begin_post_copy()
            return
        self._destination_runs = True
        if not self._discard_error:
            self._hand_over()
        self._do(StopTimer(name=TimerName.HANDOFF), StopTimer(name=TimerName.RETRY), DestroyGuest())

    def _give_up(self, reason: str) -> None:
        raise NotImplementedError  # In `source`.

    def _begin_post_copy(self) -> None:
        raise NotImplementedError  # In `source_post_copy`.

    def _give_no_more(self) -> None:
        raise NotImplementedError  # In `source_post_copy`.

    def _complete(self) -> None:
        """The guest lives elsewhere, or not at all; our copy is destroyed."""
        self._copy_gone = True
        self._send(Farewell())
        self._do(StopEngine())
        if self._discard_error:
            self._finish(_S.FAILED, self._discard_error)
        else:
            self.error = None
            self._finish(_S.COMPLETED)
            self.ended_at_s = self._handed_over_at_s or self.ended_at_s

    def _finish_gone(self) -> None:
        reason = f"{self.error or 'the migration ended'}; the guest's hypervisor is gone"
        self._cancelled = False
        self._do(StopEngine())
        self._send(Abort(reason=reason, over=True))
        self._finish(_S.FAILED, reason)

    def _finish_stopped(self) -> None:
        """The guest runs here, as it did before."""
        self._do(StopEngine())
        self._send(Abort(reason=self.error or "cancelled", over=True))
        self._finish(_S.CANCELLED if self._cancelled else _S.FAILED)
