"""The destination's side of a migration, as a pure machine.

Its rules (ARCHITECTURE: "What keeps it to one writer"):
- It tries the compare-and-set only when both are true: its hypervisor has loaded the device state
  (so every page and every device is here), and the source said Commit (so the source's hypervisor
  won't resume by itself any more).
- It gives no copy up that may be whole (`destination_arrival`).
- It resumes the guest only after it won, and fenced every volume with the token that it won.
- An unknown outcome of the compare-and-set is resolved by reading the record, never by a guess;
  until then it keeps its copy, and hears no Abort.
- It never ends while a compare-and-set of its own may land yet: it overtakes that by a write that
  changes nothing of the record, after which the late one fails. Else a record that names this node
  may appear when nobody looks for it any more, and its node would stop the domain.
- A source that won the record back may have died before its guest ran again. So the copy here is
  kept until the source has ended; if it says Commit under its newer token, the handoff begins anew.
- If it won but can't run the guest, whose vCPUs have never run here, it discards its copy, says
  Aborted, and passes the record back: to (source, n+2). It keeps the domain until that is done:
  else its node would find a domain that is its own and doesn't run, and stop it. Once a resume was
  issued it never says Aborted.
- If it won but can't run the guest *yet* (no fence: its storage is away), it goes on trying for as
  long as it takes. But where the source says that it has all of it, it yields after a while: it
  passes the record to (source, n+2), and keeps its copy as after any rollback. From the first try
  to pass it on, which may land late, it doesn't resume under its token any more; nor does its next
  agent.
"""

from __future__ import annotations

from migrator.model import (
    ENDED,
    MigrationState,
    NodeName,
    OwnershipRecord,
    OwnershipState,
)
from migrator.ports import DomainEventKind
from migrator.session.destination_yield import DestinationYield
from migrator.session.messages import (
    Abort,
    Aborted,
    Commit,
    Farewell,
    Inquire,
    Lost,
    Prepare,
    SessionMessage,
)
from migrator.session.vocabulary import (
    Announce,
    CommandFailed,
    DestroyGuest,
    EngineLost,
    Event,
    Fence,
    Fenced,
    GuestCondition,
    GuestDestroyed,
    GuestInspected,
    GuestReported,
    GuestResumed,
    InspectGuest,
    Journal,
    ReadRecord,
    Received,
    RecordRead,
    RecordSwapped,
    ResumeGuest,
    StartTimer,
    StopEngine,
    StopTimer,
    SwapRecord,
    TimerFired,
    TimerName,
)
from migrator.states import BEFORE_HANDOFF

_S = MigrationState


class DestinationSession(DestinationYield):
    """See the module. Public attributes are for reading; `handle` alone changes them."""

    @classmethod
    def asked(
        cls,
        prepare: Prepare,
        migration_id: str,
        *,
        source: NodeName,
        here: NodeName,
        created_at_s: float,
    ) -> DestinationSession:
        """The session that is made for `prepare`, which came from `source`."""
        return cls(
            migration_id=migration_id,
            spec=prepare.spec,
            source=source,
            destination=here,
            token=prepare.token,
            request=prepare.request,
            created_at_s=created_at_s,
            pages_first=prepare.asks_whether_arrived,
        )

    # --- dispatch ---

    def _handle(self, event: Event) -> None:
        match event:
            case Received(message=message):
                self._hear(message)
            case GuestReported(kind=DomainEventKind.DEVICE_STATE_LOADED):
                self._loaded()
            case GuestReported(kind=DomainEventKind.EXITED | DomainEventKind.MIGRATION_FAILED) if (
                self.state in BEFORE_HANDOFF
            ):
                failure = f"the destination's hypervisor failed: {event.detail or event.kind}"
                self._give_up(self._engine_lost_reason or failure)
            case EngineLost() if self.state in BEFORE_HANDOFF:
                self._engine_gone(event.reason)
            case _ if self._heard_of_pages(event):
                pass
            case _:
                self._handle_in_state(event)

    def _handle_in_state(self, event: Event) -> None:
        match self.state:
            case _S.CREATED:
                self._in_created(event)
            case _S.SETUP | _S.PRECOPY | _S.SWITCHOVER:
                self._before_handoff(event)
            case _S.HANDOFF | _S.RECOVERING:
                self._in_handoff(event)
            case _S.POSTCOPY:
                self._in_post_copy(event)
            case _S.CANCELLING:
                self._in_cancelling(event)

    def _handle_after_end(self, event: Event) -> None:
        if isinstance(event, Received) and isinstance(event.message, Inquire | Commit | Prepare):
            self._send(self.last_word())

    def _hear(self, message: SessionMessage) -> None:
        if self.state in BEFORE_HANDOFF and not self._commit:
            # Any word from the source: it is alive and at it.
            self._do(StartTimer(name=TimerName.PEER, seconds=self.timing.abandoned_s))
        match message:
            case Inquire() | Commit() | Prepare() if self._discarded:
                self._send(Aborted(reason=self.error or "cancelled"))
            case Commit() if self.state in BEFORE_HANDOFF:
                self._note_commit(message)
                self._try_commit()
            case Commit() if self.state is _S.RECOVERING and not self._commit:
                self._note_commit(message)
                self._do(InspectGuest())
            case Commit() if self._begins_anew(message):
                self._note_commit(message)
                self._do(InspectGuest())
            case _ if self.state is _S.POSTCOPY:
                self._hear_in_post_copy(message)
            case Farewell() | Lost() if self._waits_silently:
                self._hear_in_post_copy(message)
            case Abort() if self.state in BEFORE_HANDOFF or self._may_discard:
                self._give_up(message.reason)
            case Abort(over=True) if self._taken_back and self.state is _S.RECOVERING:
                self._give_up(message.reason)
            case Farewell() | Lost() if self._taken_back and self.state is _S.RECOVERING:
                self._give_up("the source ended the migration without us")
            case Prepare() if self._cut_off:
                self._send(self._pending())
            case Prepare() if self.state in BEFORE_HANDOFF:
                self._answer_ready()
            case Inquire(whole=True) if self._may_yield:
                self._yield()
            case Inquire():
                self._send(self._pending())
                if self.pages_missing:
                    self._answer_ready()
            case Farewell() | Lost() if self.state in BEFORE_HANDOFF:
                self._give_up("the source ended the migration without us")
            case _:
                pass

    def _note_commit(self, message: Commit) -> None:
        self._commit = True
        self._taken_back = self._yielding = self._yielded = False
        self.token = max(self.token, message.token)
        if message.post_copy:
            self._note_post_copy()

    def _begins_anew(self, message: Commit) -> bool:
        """It is said under a token that is newer than ours, and nothing was won under ours."""
        won = self._won_at_s or self._resume_issued
        return self.state in (_S.HANDOFF, _S.RECOVERING) and message.token > self.token and not won

    # --- the handoff ---

    def _try_commit(self) -> None:
        if self.state not in BEFORE_HANDOFF:
            return
        if self.state is _S.PRECOPY:
            self._enter(_S.SWITCHOVER)
        if self._loaded_at_s and self._commit and self.state is _S.SWITCHOVER:
            self._enter(_S.HANDOFF)
            self._swap()

    def _swap(self) -> None:
        before = self.record_before
        self._swap_pending = self._swap_open = True
        # A restart must know that this may be under way, and that the guest is ours to take.
        self._do(Journal(state=self.state, durable=False))
        self._do(SwapRecord(expected=before, new=before.passed_to(self.destination)))

    def _in_handoff(self, event: Event) -> None:
        """HANDOFF, and RECOVERING: the same, with the outcome read from the record."""
        match event:
            case GuestInspected():
                self._recover_guest(event.condition)
            case RecordSwapped(won=True) if self._yielding:
                self._note_yielded()
            case RecordSwapped() if self._yielding:
                self._retry_later()
            case RecordSwapped(won=True):
                self._swap_pending = False
                self._won()
            case RecordSwapped():  # Lost, or unknown: what is true now?
                self._swap_pending = False
                self._enter_recovering("lost the record" if event.won is False else "unknown")
                self._look_after_swap(event)
            case RecordRead():
                self._recover_by(event)
            case Fenced() if self._yielding or self._yielded:
                pass  # Too late.
            case Fenced() if event.token == self.next_token and not self._dead:
                self._fenced_at_s, self._fence_detail = self._now, event.detail
                self._resume_issued_before = self._resume_issued
                self._resume_issued = self._resume_pending = True
                self._do(Journal(state=self.state, resuming=True, durable=False), ResumeGuest())
            case GuestResumed():
                self._resumed(event.at_s)
            case GuestReported(kind=DomainEventKind.RESUMED) if self._resume_came_late:
                self._resumed(event.at_s)
            case GuestReported(kind=DomainEventKind.EXITED):
                self._died()
            case CommandFailed(command="Journal"):
                self._not_noted(event)
            case CommandFailed(command="ResumeGuest", without_effect=True):
                self._stuck = event.error
                self._resume_issued = self._resume_issued_before
                self._resume_answered()
                if self.state not in ENDED:
                    self._do(Journal(state=self.state, durable=False))  # Last: it may fail.
            case CommandFailed(command="ResumeGuest"):
                self._stuck = event.error
                self._resume_answered()
            case CommandFailed():
                # Also a fence, for as long as it takes: the source may be gone by now, so that
                # this is the only copy.
                self._stuck = event.error
                self._swap_pending = self._swap_pending and event.command != "SwapRecord"
                self._retry_later()
            case TimerFired(name=TimerName.RETRY):
                self._do(InspectGuest())
            case _:
                pass

    def _won(self) -> None:
        self._won_at_s = self._won_at_s or self._now
        if self._dead:
            self._died()
        else:
            self._do(Fence(token=self.next_token))

    @property
    def _resume_came_late(self) -> bool:
        """One was issued, and its answer isn't waited for any more: its hypervisor, or the storage
        under it, hung. What passes until the next look would count as the guest's blackout."""
        return self._resume_issued and not self._resume_pending

    def _resume_answered(self) -> None:
        self._resume_pending = False
        if self._dead:
            self._died()
        else:
            self._retry_later()

    def _not_noted(self, event: CommandFailed) -> None:
        """A note failed, and what stood behind it wasn't performed: no resume, no compare-and-set.

        It may be an older note that failed: what waits for its own is performed yet.
        """
        self._stuck = event.error
        for command in event.dropped:
            match command:
                case SwapRecord() if command.new.owner == self.source:
                    self._yielding = False
                case SwapRecord():
                    self._swap_pending = False
                case ResumeGuest():
                    self._resume_issued = self._resume_issued_before
                    self._resume_pending = False
        if self._dead:
            self._died()
        else:
            self._retry_later()

    def _resumed(self, at_s: float) -> None:
        self._resumed_at_s = at_s
        # The network first: until it knows, packets go to the source.
        self._do(Announce())
        self._send(self._running())
        self.error = None
        if self.post_copy:
            self._begin_post_copy()
            if self._dead:  # Its end was heard first, and is heard only once.
                self._lost("the guest ended right after it was resumed")
            return
        self._do(StopEngine())
        self._finish(_S.COMPLETED)

    def _died(self) -> None:
        """The hypervisor died in the handoff, or is found dead in recovery."""
        self._dead = True
        if self._resume_pending:
            pass  # Its answer says whether it was given at all.
        elif self._resume_issued:
            # It may have run and written: the source's memory is stale, whatever it holds.
            self._do(StopEngine(), DestroyGuest())
            self._send(self._running())
            self._finish(_S.FAILED, "the destination's hypervisor died after it was resumed")
        elif self._won_at_s:
            self._give_up("the destination's hypervisor died before it was resumed")
        else:
            # Our compare-and-set may be under way: only its outcome ends the session.
            self._enter_recovering("the destination's hypervisor died")
            self._retry_later()

    # --- recovery: the record decides ---

    def _recover_guest(self, condition: GuestCondition) -> None:
        match condition:
            case GuestCondition.RUNNING:
                self._resume_issued = True
                self._resumed(self._now)
            case GuestCondition.STOPPED_OTHERWISE:
                # It ran here, and was paused since: by a user, an I/O error. It is ours all right.
                self._resume_issued = True
                self._resumed(self._now)
            case GuestCondition.LOADED:
                self._loaded_at_s = self._loaded_at_s or self._now
                self._do(ReadRecord())
            case GuestCondition.INCOMING if self._restored:
                # Its engine died with the agent: it never will be loaded, so it can't have won.
                self._give_up("the agent restarted before the device state was loaded")
            case GuestCondition.GONE if self._won_at_s:
                self._died()
            case GuestCondition.GONE:
                self._dead = True
                self._do(ReadRecord())
            case _:
                self._do(ReadRecord())

    def _recover_by(self, event: RecordRead) -> None:
        record = event.record
        if not event.known:
            self._retry_later()
        elif self._yielding and record == self._won_record:
            self._give_record_back()
        elif record is not None and self._is_ours(record):
            if self._may_have_run or record.state is not OwnershipState.RUNNING:
                self._resume_issued = True  # Before the restart, for all we know.
            self._won()
        elif record != self.record_before:
            self._swap_open = False  # It can't land any more.
            self._lost_to(record)
        elif self._swap_pending:
            pass  # Its outcome is heard.
        elif self._dead:
            whose = "agent restarted, and its " if self._restored else ""
            self._give_up(f"the destination's {whose}hypervisor is gone")
        elif self._commit and self._loaded_at_s:
            self._swap()
        else:
            # Loaded or not, without a Commit it isn't ours to take. Ask.
            self._send(Inquire())
            self._retry_later()

    def _lost_to(self, record: OwnershipRecord | None) -> None:
        self._note_lost(record)
        before = self.record_before
        won_back = before.passed_to(self.source)
        kept = (won_back, won_back.said_resuming(), before.said_resuming())
        self._taken_back = self._yielded or record in kept
        if self._taken_back and self._loaded_at_s and not self._dead:
            # Perhaps nothing came of it, and this is the only copy. The source knows.
            self._enter_recovering("the source won the record back")
            self._send(Inquire())
            self._retry_later()
        else:
            self._give_up("the source kept the guest")

    def _is_ours(self, record: OwnershipRecord) -> bool:
        return record.owner == self.destination and record.token == self.next_token

    # --- the end without the guest ---

    def _give_up(self, reason: str) -> None:
        self.error = reason
        self._enter(_S.CANCELLING, reason)
        self._do(*(StopTimer(name=name) for name in TimerName), StopEngine(), DestroyGuest())

    def _in_cancelling(self, event: Event) -> None:
        match event:
            case GuestDestroyed():
                self._discarded = True
                self._send(Aborted(reason=self.error or "cancelled"))
                self._pass_back()
            case RecordSwapped(won=True):
                self._finish(_S.CANCELLED)
            case RecordSwapped():  # Lost, perhaps to the source itself, or unknown.
                self._look_after_swap(event)
            case RecordRead(known=True) if event.record is not None and self._is_ours(event.record):
                self._won_at_s = self._won_at_s or self._now  # It landed late.
                self._pass_back()
            case RecordRead(known=True) if event.record == self.record_before:
                self._won_at_s = 0.0  # If it ever was ours, the store went back.
                self._pass_back()
            case RecordRead(known=True):
                self._finish(_S.CANCELLED)
            case RecordRead() | CommandFailed(command="DestroyGuest" | "SwapRecord" | "ReadRecord"):
                self._retry_later()
            case TimerFired(name=TimerName.RETRY) if self._discarded:
                self._send(Aborted(reason=self.error or "cancelled"))
                self._do(ReadRecord())
            case TimerFired(name=TimerName.RETRY):
                self._do(DestroyGuest())
            case _:
                pass

    def _pass_back(self) -> None:
        """The copy is gone. What was won is the source's again, which has the memory.

        What may be won yet is overtaken first: by a write that changes nothing.
        """
        before = self.record_before
        if self._won_at_s:
            self._give_record_back()
        elif self._swap_open:
            self._do(SwapRecord(expected=before, new=before))
        else:
            self._finish(_S.CANCELLED)
