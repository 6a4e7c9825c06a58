"""Recovery at the source: the device state is out, or may be; the record decides whose guest it is.

Nothing here resumes the guest without having won, or read, a record that names this node with a
token newer than the one that the migration began with.

A rollback may fail, too: the record was won back, and then the hypervisor dies. As long as it is
certain that no vCPU ran here meanwhile, the destination's copy is the newest there is; so the
handoff begins anew, under the token that was won.
"""

from __future__ import annotations

from migrator.model import MigrationState, OwnershipRecord, OwnershipState
from migrator.session.messages import Abort, Commit, Farewell, Inquire, Pending, Running
from migrator.session.source_view import SourceView
from migrator.session.vocabulary import (
    AbortSwitchover,
    CancelRequested,
    CommandFailed,
    DestroyGuest,
    Event,
    Fence,
    Fenced,
    GuestCondition,
    GuestDestroyed,
    GuestInspected,
    GuestResumed,
    InspectGuest,
    Journal,
    ReadRecord,
    RecordRead,
    RecordSwapped,
    ResumeGuest,
    StopEngine,
    StopTimer,
    SwapRecord,
    TimerFired,
    TimerName,
)
from migrator.states import BEFORE_HANDOFF

_S = MigrationState


class SourceRecovery(SourceView):
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
            case GuestInspected():
                self._recover_guest(event.condition)
            case RecordRead() if not self._destination_runs and self._rollback_token is None:
                self._recover_by(event)
            case RecordRead() if not self._destination_runs and self._doubts_rollback:
                self._doubts_rollback = False
                self._roll_back_by(event, self._rollback_token)
            case RecordSwapped(won=True) if self._rollback_token is None:
                self._rollback(self._swap_token)
            case RecordSwapped() if self._rollback_token is None:
                self._look_after_swap(event)
            case Fenced() if event.token == self._rollback_token:
                self._may_have_resumed_before = self._may_have_resumed
                self._may_have_resumed = True
                self._do(Journal(state=self.state, resuming=True), ResumeGuest())
            case GuestResumed() if self._rollback_token is not None:
                self._note_blackout(event.at_s)
                self._finish_stopped()
            case GuestDestroyed() if self._destination_runs:
                self._complete()
            case CommandFailed(command="ResumeGuest"):
                if event.without_effect:
                    self._may_have_resumed = self._may_have_resumed_before
                self._do(InspectGuest())
            case CommandFailed(command="Journal") if self._rollback_token is not None:
                self._may_have_resumed = self._may_have_resumed_before  # It wasn't resumed.
                self._retry_later()
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
            # While it couldn't go on, another node may have taken the domain over.
            self._doubts_rollback = True
            self._do(ReadRecord())
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
                self._retry_later()
            elif self._gone:
                self._finish_gone()
            elif self._destination_forgot:
                self._was_forgotten()
            else:
                self._swap(record)
        elif record.owner == self.destination:
            self._discard("")  # It runs there, and has been handed over again since.
        else:
            self._discard(f"{record.owner} took the domain over, with token {record.token}")

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
        if record.token == self.token:
            self._recover_unpassed(record)
        elif record.token == self.next_token or (
            record.token == taken_back
            and (self._destination_refused or self._yielded == self.next_token)
        ):
            if self._gone:
                self._gone_after_rollback(record.token)
            else:
                self._rollback(record.token)
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

    def _commit(self) -> None:
        self._send(Commit(post_copy=self.post_copy, token=self.token))

    def _rollback(self, token: int) -> None:
        """The destination keeps its copy until the guest runs here."""
        self._rollback_token = token
        self._newest_token = max(self._newest_token, token)
        self._do(Fence(token=token))

    def _roll_back_by(self, event: RecordRead, token: int | None) -> None:
        """Go on with a rollback that was interrupted, if the record is still the one we won."""
        record = event.record
        if not event.known:
            self._retry_later()
        elif record is None or record.state is not OwnershipState.RUNNING:
            self._discard("the domain was stopped or removed meanwhile")
        elif record.owner == self.source and record.token == token:
            self._do(Fence(token=record.token))
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
        self.token = token
        self.device_state_out = True
        self._commit()
        self._retry_later()
        self._journal()  # Last: it may fail.

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
            self._note("ownership record", self._sent_at_s, message.won_at_s)
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

    def _note_blackout(self, resumed_at_s: float) -> None:
        """Pause to resume. Two hosts' clocks disagree, so ours gives the bounds."""
        if self._paused_at_s is None or self.blackout_ms is not None:
            return
        least_s = (self._sent_at_s or self._paused_at_s) - self._paused_at_s
        most_s = max(self._now - self._paused_at_s, 0.0)
        seconds = min(max(resumed_at_s - self._paused_at_s, least_s), most_s)
        self.blackout_ms = seconds * 1000.0

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
