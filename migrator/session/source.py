"""The source's side of a migration, as a pure machine.

The rules that keep the guest alive and single (ARCHITECTURE: "What keeps it to one writer"):
- Until the hypervisor reports that the device state is out (`postmigrate`), every fault ends in
  AbortSwitchover, and the guest resumes here without touching the record.
- From then on it resumes here only after a won compare-and-set from (source, n) to (source, n+1).
- Commit, which lets the destination try its own compare-and-set, is sent only then, never before.
- The source's copy is destroyed only when the destination's vCPUs are known to run, or the record
  has moved on past it.
"""

from __future__ import annotations

from migrator.model import MigrationMode, MigrationState, PassKind
from migrator.policy import tells_again
from migrator.ports import AbortOutcome, DomainEventKind
from migrator.session.messages import (
    Abort,
    Aborted,
    Farewell,
    Filled,
    Inquire,
    Lost,
    Pending,
    Prepare,
    Prepared,
    Refused,
    Running,
    SessionMessage,
)
from migrator.session.source_passes import SourcePasses
from migrator.session.vocabulary import (
    AbortSwitchover,
    Begin,
    BeginSwitchover,
    CancelRequested,
    ChannelNoted,
    CommandFailed,
    ConnectEngine,
    ContinueSwitchover,
    DestroyGuest,
    DisksDeactivated,
    EngineConnected,
    EngineLost,
    EngineReported,
    EngineStopped,
    Event,
    GuestDestroyed,
    GuestReported,
    InspectGuest,
    Journal,
    LeaveRefused,
    PassFinished,
    PeerBack,
    PeerLost,
    PeerRemoved,
    PrepareSwitchover,
    Received,
    Recover,
    StartEngine,
    StartTimer,
    StopEngine,
    StopTimer,
    SwitchoverAborted,
    TimerFired,
    TimerName,
)
from migrator.states import BEFORE_HANDOFF

_S = MigrationState


class SourceSession(SourcePasses):
    """See the module. Public attributes are for reading; `handle` alone changes them."""

    # --- dispatch ---

    def _handle(self, event: Event) -> None:
        match event:
            case CancelRequested() if self.cancellable:
                self._cancel(event)
            case PeerRemoved():
                self._peer_removed(event.reason)
            case GuestReported(kind=DomainEventKind.EXITED | DomainEventKind.PANICKED) if (
                self.state in BEFORE_HANDOFF
            ):
                self._give_up(f"the guest ended by itself ({event.kind})")
            case EngineLost() if self.state in BEFORE_HANDOFF:
                self._give_up(f"the source's engine: {event.reason}")
            case EngineLost() if self._must_serve:
                self._engine_lost(event.reason)
            case CommandFailed(command="StartEngine" | "ConnectEngine") if self._must_serve:
                self._engine_lost(event.error)
            case EngineLost():
                self._engine_up = False  # If a rollback fails, its pages are asked for again.
            case TimerFired(name=TimerName.ENGINE) if self._must_serve:
                self._respawn()
            case ChannelNoted() | EngineConnected() if self._must_serve:
                self._heard_of_streams(event)
            case Received(message=message):
                self._hear(message)
            case DisksDeactivated():
                self._note_disks(event)
            case EngineStopped():
                self._note_last_sent(event)
            case GuestReported(kind=DomainEventKind.DEVICE_STATE_SENT):
                # Also when it's too late to act on it: then the destination's copy is whole.
                self.device_state_out = True
                self._handle_in_state(event)
            case _:
                self._handle_in_state(event)

    def _handle_in_state(self, event: Event) -> None:
        match self.state:
            case _S.CREATED:
                self._in_created(event)
            case _S.SETUP:
                self._in_setup(event)
            case _S.PRECOPY:
                self._in_precopy(event)
            case _S.SWITCHOVER:
                self._in_switchover(event)
            case _S.HANDOFF:
                self._in_handoff(event)
            case _S.POSTCOPY:
                self._in_post_copy(event)
            case _S.CANCELLING:
                self._in_cancelling(event)
            case _S.RECOVERING:
                self._in_recovering(event)

    def _handle_after_end(self, event: Event) -> None:
        if isinstance(event, EngineStopped):
            self._note_last_sent(event)
        elif isinstance(event, Received) and isinstance(
            event.message, Inquire | Prepared | Pending
        ):
            self._send(self.last_word())

    def last_word(self) -> SessionMessage:
        """What the destination is told when it asks after the end."""
        if self.state is _S.COMPLETED:
            return Farewell()
        if self.post_copy and self._copy_gone:
            return Lost(reason=self.error or self.state.value)
        return Abort(reason=self.error or self.state.value, over=True)

    def _hear(self, message: SessionMessage) -> None:
        match message:
            case Prepared() if self.state is _S.SETUP and not self._connecting:
                self._connecting = True
                self._prepared = message
                self._engine_up = True
                self._do(
                    StopTimer(name=TimerName.RETRY),
                    ConnectEngine(host=message.host, port=message.port, secret=message.secret),
                )
            case Prepared() if self._must_serve:
                self._hear_prepared(message)
            case Filled() if self.post_copy:
                self._filled(message)
            case Refused() if self.state in (_S.SETUP, _S.PRECOPY):
                self._give_up("the destination refused: " + "; ".join(message.reasons))
            case Running():
                self._destination_runs_now(message)
            case Aborted():
                self._destination_gave_up(message.reason, unknown=message.unknown)
            case Pending() if message.cut_off:
                self._destination_cut_off(message.cut_off)
            case Pending() if message.state == _S.POSTCOPY:
                self._hear_of_its_engines(message)
            case Pending():
                self._destination_stuck(message)
            case Inquire():
                if self.state is _S.HANDOFF:
                    self._commit()
                else:
                    self._send(Pending(state=self.state.value))
            case _:
                pass

    # --- the states ---

    def _in_created(self, event: Event) -> None:
        match event:
            case Begin():
                self._enter(_S.SETUP)
                self._journal()
                self._send(self._prepare())
                self._do(
                    StartEngine(),
                    PrepareSwitchover(),
                    StartTimer(name=TimerName.SETUP, seconds=self.timing.setup_s),
                    StartTimer(name=TimerName.RETRY, seconds=self.timing.resend_s),
                    StartTimer(name=TimerName.TOTAL, seconds=self.request.timeout_s),
                )
            case Recover():
                self._enter(_S.RECOVERING, "the agent restarted")
                if self._handed_over_at_s is None:
                    self._do(InspectGuest())
                else:
                    self._discard("")
            case LeaveRefused():
                self._give_up(event.reason)

    def _prepare(self) -> Prepare:
        return Prepare(
            spec=self.spec,
            source=self.source,
            token=self.token,
            request=self.request,
            asks_whether_arrived=True,
        )

    def _in_setup(self, event: Event) -> None:
        match event:
            case EngineConnected():
                self._enter(
                    _S.PRECOPY,
                    f"{event.pages_in_use} pages in use, round trip {event.round_trip_ms:.2f} ms",
                )
                self._do(
                    StopTimer(name=TimerName.SETUP),
                    StartTimer(name=TimerName.RETRY, seconds=self.timing.inquire_s),
                )
                self._note_mode()
                if self.request.engine.may_stop_guest:
                    self._ask_hooks()
                elif self.mode is not MigrationMode.POSTCOPY:
                    self._run_pass(PassKind.FIRST)
                elif self.no_post_copy:
                    self._give_up(f"post-copy isn't possible: {self.no_post_copy}")
                else:
                    self._ask_leave("asked for", post_copy=True)
            case TimerFired(name=TimerName.RETRY):
                self._send(self._prepare())
                self._do(StartTimer(name=TimerName.RETRY, seconds=self.timing.resend_s))
            case TimerFired(name=TimerName.SETUP):
                self._give_up(f"the destination was not ready within {self.timing.setup_s:g} s")
            case TimerFired(name=TimerName.TOTAL):
                self._give_up(f"not done within {self.request.timeout_s:g} s")
            case CommandFailed():
                self._give_up(f"{event.command}: {event.error}")
            case _:
                pass

    def _in_precopy(self, event: Event) -> None:
        match event:
            case EngineReported():
                self._note_progress(event)
            case PassFinished() if self.post_copy:
                self._note_pass(event.report)
                if tells_again(self.passes):
                    self._run_pass(PassKind.STALE)
                else:
                    self._switch_over("post-copy")
            case PassFinished():
                self._note_pass(event.report)
                self._decide()
            case ChannelNoted():
                self._note_channel(event)
            case PeerLost():
                self._do(StartTimer(name=TimerName.PEER, seconds=self.timing.peer_s))
            case PeerBack():
                self._do(StopTimer(name=TimerName.PEER))
                self._send(Inquire())
            case TimerFired(name=TimerName.RETRY):
                # The destination may have given up, and its Aborted be lost: ask now and then.
                self._send(Inquire())
                self._do(StartTimer(name=TimerName.RETRY, seconds=self.timing.inquire_s))
            case TimerFired(name=TimerName.PEER):
                self._give_up(f"the destination was unreachable for {self.timing.peer_s:g} s")
            case TimerFired(name=TimerName.TOTAL):
                self._time_is_over()
            case CommandFailed():
                self._give_up(f"{event.command}: {event.error}")
            case _ if self._heard_of_halt(event):
                pass
            case _:
                self._heard_of_leave(event)

    def _switch_over(self, detail: str) -> None:
        self._enter(_S.SWITCHOVER, detail)
        self._switchover_begun = True
        before_pause_s = self.timing.depart_s + self._switchover_s()
        self._do(
            Journal(state=self.state, standing=self._halted_at_s is not None),
            StopTimer(name=TimerName.TOTAL),
            StopTimer(name=TimerName.PEER),
            StopTimer(name=TimerName.RETRY),
            StartTimer(name=TimerName.SWITCHOVER, seconds=before_pause_s),
            BeginSwitchover(),
        )

    def _switchover_s(self) -> float:
        """From the pause: a stalled switchover ends here. A forced one is given the time that it
        was predicted.
        """
        if self.post_copy or not self.decisions:
            return self.timing.switchover_s
        predicted_s = self.decisions[-1].predicted_blackout_ms / 1000.0
        return self.timing.switchover_s + 3.0 * predicted_s

    @property
    def _stalled_at(self) -> str:
        """What a switchover waits for."""
        if not self._pre_switchover and self._halted_at_s is not None:
            return "the guest stands still, and the journal, or the network's part, isn't done"
        if not self._pre_switchover:
            return "the hypervisor hasn't paused the guest"
        if not self._continued:
            return "the last pages aren't acknowledged"
        return "the device state doesn't get through"

    def _in_switchover(self, event: Event) -> None:
        match event:
            case GuestReported(kind=DomainEventKind.PAUSED) if self._paused_at_s is None:
                self._paused_at_s = event.at_s
                self._note("stop", self._entered_at_s, event.at_s)
                self._do(StartTimer(name=TimerName.SWITCHOVER, seconds=self._switchover_s()))
            case GuestReported(kind=DomainEventKind.PRE_SWITCHOVER) if not self._pre_switchover:
                self._pre_switchover = True
                self._final_started_at_s = self._now
                self._run_pass(PassKind.MISSING if self.post_copy else PassKind.FINAL)
            case PassFinished() if event.report.kind in (PassKind.FINAL, PassKind.MISSING):
                self._note_pass(event.report)
                self._note(
                    "final pass",
                    self._final_started_at_s,
                    self._now,
                    f"{event.report.pages} pages, scan {event.report.scan_seconds * 1e3:.2f} ms",
                )
                self._continued_at_s = self._now
                self._continued = True
                self._do(ContinueSwitchover())
            case GuestReported(kind=DomainEventKind.DEVICE_STATE_SENT) if not self._continued:
                self._give_up("the hypervisor sent the device state before the last pages")
            case GuestReported(kind=DomainEventKind.DEVICE_STATE_SENT):
                self._note("device state", self._continued_at_s, self._now)
                self._hand_off()
            case GuestReported(kind=DomainEventKind.MIGRATION_FAILED):
                self._give_up(f"device state: {event.detail or 'the hypervisor gave up'}")
            case ChannelNoted(broken=True) if not self._forced:
                # The engine would connect again, but the guest stands still meanwhile.
                where = self.destination
                self._give_up(f"the stream to {where} broke in the switchover: {event.detail}")
            case TimerFired(name=TimerName.SWITCHOVER):
                self._give_up(f"the switchover stalled: {self._stalled_at}")
            case PeerLost():
                self._give_up("the destination was lost during the switchover")
            case CommandFailed():
                self._give_up(f"{event.command}: {event.error}")
            case _:
                pass

    def _hand_off(self) -> None:
        self._sent_at_s = self._now
        # Commit goes first: the guest stands still, and every later step can be repeated.
        self._commit()
        self._enter(_S.HANDOFF)
        self._do(
            StopTimer(name=TimerName.SWITCHOVER),
            StartTimer(name=TimerName.HANDOFF, seconds=self.timing.commit_s),
            # Last: a journal that can't be written must not cost the timer.
            Journal(state=self.state, durable=False),
        )

    def _in_handoff(self, event: Event) -> None:
        match event:
            case TimerFired(name=TimerName.HANDOFF):
                self._recover(f"no word from the destination within {self.timing.commit_s:g} s")
            case EngineReported():
                self._note_progress(event)  # A native engine's last pages.
            case PeerLost():
                pass  # It may have won all the same: the timer asks the record.
            case GuestDestroyed() if self._destination_runs:
                self._complete()
            case TimerFired(name=TimerName.RETRY) if self._destination_runs:
                self._do(DestroyGuest())
            case CommandFailed(command="DestroyGuest"):
                self._retry_later()
            case GuestReported(kind=DomainEventKind.EXITED):
                self._gone = True  # The destination has all of it: no reason not to hand over.
            case _:
                pass

    # --- the ends ---

    def _give_up(self, reason: str) -> None:
        """Before the handoff: whatever happened, bring the guest back here."""
        self.error = reason
        if self.state is _S.CREATED:
            self._finish(_S.CANCELLED if self._cancelled else _S.FAILED, reason)
            return
        self._enter(_S.CANCELLING, reason)
        self._engine_up = False
        self._paused_at_s = self._paused_at_s or self._halted_at_s
        self._do(
            *(StopTimer(name=name) for name in TimerName),
            StopEngine(),
            AbortSwitchover(),
        )
        if not self._continued:
            # Otherwise the destination may have the only copy, until the outcome is known.
            self._send(Abort(reason=reason))

    def _in_cancelling(self, event: Event) -> None:
        match event:
            case SwitchoverAborted(outcome=AbortOutcome.RESUMED):
                self._finish_stopped()
            case GuestReported(kind=DomainEventKind.RESUMED):
                self._note_blackout(event.at_s)
            case SwitchoverAborted(outcome=AbortOutcome.SENT):
                self.device_state_out = True
                self._recover(self.error or "cancelled")
            case SwitchoverAborted(outcome=AbortOutcome.GONE) if self._continued:
                self._gone = True
                self._recover(f"{self.error}; the guest's hypervisor is gone")
            case SwitchoverAborted(outcome=AbortOutcome.GONE):
                self._finish_gone()
            case CommandFailed(command="AbortSwitchover"):
                self._not_back = event.error
                # No growing gap: the guest may stand still, and a try takes its time itself.
                self._do(StartTimer(name=TimerName.RETRY, seconds=self.timing.retry_s))
            case TimerFired(name=TimerName.RETRY):
                self._do(AbortSwitchover())
            case _:
                pass
