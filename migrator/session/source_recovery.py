"""Recovery at the source: the device state is out, or may be; the record decides whose guest it is.

Nothing here resumes the guest without having won, or read, a record that names this node with a
token newer than the one that the migration began with.
"""

from __future__ import annotations

from migrator.model import MigrationState, OwnershipRecord
from migrator.session.messages import Abort, Commit, Farewell, Inquire, Running
from migrator.session.source_view import SourceView
from migrator.session.vocabulary import (
    AbortSwitchover,
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
            case RecordSwapped(won=True) if self._rollback_token is None:
                self._rollback(self._swap_token)
            case RecordSwapped() if self._rollback_token is None:
                self._do(ReadRecord())  # Lost, or unknown: what is true now?
            case Fenced() if event.token == self._rollback_token:
                self._do(ResumeGuest())
            case GuestResumed() if self._rollback_token is not None:
                self._note_blackout(event.at_s)
                self._finish_stopped()
            case GuestDestroyed() if self._destination_runs:
                self._complete()
            case CommandFailed(command="ResumeGuest"):
                self._do(InspectGuest())
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
            self._do(Fence(token=self._rollback_token))
        else:
            self._send(Inquire())
            self._do(InspectGuest())

    def _recover_guest(self, condition: GuestCondition) -> None:
        """What the hypervisor says, after a restart or while the record is awaited."""
        match condition:
            case GuestCondition.RUNNING | GuestCondition.STOPPED_OTHERWISE:
                # It never left, or it is back: only a won record resumes a sent guest.
                self.error = self.error or "the agent restarted during the migration"
                self._finish_stopped()
            case GuestCondition.SWITCHING:
                self.error = self.error or "the agent restarted during the switchover"
                self._enter(_S.CANCELLING, self.error)
                self._do(AbortSwitchover())
            case _ if self._rollback_token is not None:
                self._gone = condition is GuestCondition.GONE
                if self._gone:
                    self._finish(_S.FAILED, f"{self.error}; the guest's hypervisor is gone")
                else:
                    self._retry_later()
            case _:
                self.error = self.error or "the agent restarted during the handoff"
                self._gone = condition is GuestCondition.GONE
                self._do(ReadRecord())

    def _recover_by(self, event: RecordRead) -> None:
        record = event.record
        if not event.known:
            self._retry_later()
        elif record is not None and record.owner == self.source:
            self._recover_own(record)
        elif (
            record is not None
            and record.owner == self.destination
            and record.token == self.next_token
            and not (self._destination_refused and self._gone)
        ):
            # The destination won. Keep our copy until its vCPUs are known to run, or to never run.
            if self._destination_refused:
                self._swap(record)
            else:
                self._send(Inquire())
                self._retry_later()
        else:
            # The record moved on past the destination, or the domain was removed: ours is stale.
            self._destination_runs = True
            self._do(DestroyGuest())

    def _recover_own(self, record: OwnershipRecord) -> None:
        if record.token != self.token:
            if self._gone:
                self._finish(_S.FAILED, f"{self.error}; the guest's hypervisor is gone")
            else:
                self._rollback(record.token)  # Won before, or given back.
        elif not self._gone:
            self._swap(record)
        elif self._destination_refused:
            self._finish(_S.FAILED, f"{self.error}; the guest's hypervisor is gone")
        else:
            # Only the destination may have the guest's memory. It can't have loaded the device
            # state before the last page was in place, so what it has loaded is whole.
            self._send(Commit())
            self._retry_later()

    def _swap(self, record: OwnershipRecord) -> None:
        self._swap_token = record.token + 1
        self._do(SwapRecord(expected=record, new=record.passed_to(self.source)))

    def _rollback(self, token: int) -> None:
        self._rollback_token = token
        self._send(Abort(reason=self.error or "rolled back"))
        self._do(Fence(token=token))

    # --- the ends ---

    def _destination_runs_now(self, message: Running) -> None:
        if self.state not in (_S.HANDOFF, _S.RECOVERING) or self._destination_runs:
            return
        if self._rollback_token is not None:
            return  # We hold a newer token: this word is stale.
        self._destination_runs = True
        self._note_blackout(message.resumed_at_s)
        if self._sent_at_s is not None and message.won_at_s:
            self._note("ownership record", self._sent_at_s, message.won_at_s)
            self._note("fence and resume", message.won_at_s, message.resumed_at_s)
        self._do(StopTimer(name=TimerName.HANDOFF), StopTimer(name=TimerName.RETRY), DestroyGuest())

    def _note_blackout(self, resumed_at_s: float) -> None:
        if self._paused_at_s is not None and self.blackout_ms is None:
            self.blackout_ms = (resumed_at_s - self._paused_at_s) * 1000.0

    def _complete(self) -> None:
        self.error = None
        self._send(Farewell())
        self._do(StopEngine())
        self._finish(_S.COMPLETED)

    def _finish_stopped(self) -> None:
        """The guest runs here, as it did before."""
        self._do(StopEngine())
        self._send(Abort(reason=self.error or "cancelled"))
        self._finish(_S.CANCELLED if self._cancelled else _S.FAILED)
