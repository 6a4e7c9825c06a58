"""What a source's session knows, and how it looks from outside: the migration resource."""

from __future__ import annotations

from typing import Final

import msgspec

from migrator.figures import Prediction
from migrator.model import (
    ENDED,
    PAGE_SIZE_BYTES,
    DomainSpec,
    Migration,
    MigrationMode,
    MigrationProgress,
    MigrationRequest,
    MigrationState,
    NodeName,
    PassReport,
    Role,
)
from migrator.policy import (
    TOLD,
    Decision,
    dirty_rate,
    final_rate,
    predicted_blackout_ms,
    throughput,
    within_limit,
)
from migrator.session.base import Session, Timing
from migrator.session.messages import Prepared
from migrator.session.vocabulary import (
    CancelRequested,
    DisksDeactivated,
    EngineReported,
    EngineStopped,
    Leaving,
)

_S = MigrationState
_WAY: Final = (_S.CREATED, _S.SETUP, _S.PRECOPY, _S.SWITCHOVER, _S.HANDOFF, _S.POSTCOPY)
_TRAVELLING: Final = frozenset({_S.PRECOPY, _S.SWITCHOVER, _S.POSTCOPY})
_STANDS_S: Final = 2.0
"""An engine that has sent nothing of a pass for so long is at a standstill."""
_CLEAN_UP: Final = "clean-up"
_RESTART: Final = "agent restart"
"""From the last heartbeat of the agent that ended to the next one's beginning, in the timeline."""
_STATES_TOLD: Final = frozenset({*(state.value for state in _S), _CLEAN_UP, _RESTART})
"""The timeline's entries that follow each other without a gap; the others lie within them."""


class SourceView(Session):
    """The attributes of a source's session; `SourceSession` gives them their meaning."""

    role = Role.SOURCE

    def __init__(
        self,
        *,
        migration_id: str,
        spec: DomainSpec,
        source: NodeName,
        destination: NodeName,
        token: int,
        request: MigrationRequest,
        created_at_s: float,
        timing: Timing | None = None,
        journalled: MigrationState | None = None,
        device_state_out: bool = False,
        post_copy: bool = False,
        may_have_resumed: bool = False,
        cancel: CancelRequested | None = None,
        switchover_begun: bool = True,
        prediction: Prediction | None = None,
    ) -> None:
        """`journalled`: the state that it had in a journal, which knows of `device_state_out`,
        `post_copy`, `may_have_resumed`, `cancel` and `switchover_begun`, too. It learns how far
        it had come only once it is told to Recover.
        """
        super().__init__(
            migration_id=migration_id,
            domain=spec.name,
            source=source,
            destination=destination,
            token=token,
            request=request,
            created_at_s=created_at_s,
            timing=timing or Timing(),
        )
        self.spec = spec
        self.passes: list[PassReport] = []
        self.decisions: list[Decision] = []
        self.blackout_ms: float | None = None
        self.prediction = prediction
        """How it was expected to go; after the first iteration at the latest it is known."""
        self._live = MigrationProgress(state=self.state)
        self._sent_before_bytes = 0
        """By engines that are gone: of the agent that was restarted, and in post-copy."""
        self._forced = False
        self._pass_running = False
        self._moved_at_s = 0.0
        """When a pass began, or its engine last said that it had sent, or found, something."""
        self._leaving: Leaving | None = None
        """Leave to switch over was asked for: why, and whether to post-copy."""
        self._leave_asked_at_s = 0.0
        self._leave_given = False
        self._hooks_agreed = False
        """Ahead of the rest."""
        self._halted_at_s: float | None = None
        """Since when the guest stands still in pre-copy, as its hypervisor has stopped it."""
        self._paused_at_s: float | None = None
        self._pre_switchover = False
        self._final_started_at_s = 0.0
        self._continued_at_s = 0.0
        self._sent_at_s: float | None = None
        self._connecting = False
        self._journalled = journalled
        if journalled is not None:
            self._part = _RESTART
        self._switchover_begun = switchover_begun and journalled not in (None, _S.SETUP)
        self._continued = False
        self.device_state_out = device_state_out
        """Known: the hypervisor won't resume the guest by itself any more (`postmigrate`)."""
        self.post_copy = post_copy
        """The destination lacks pages when the guest is resumed there: it gets them from here."""
        self._engine_up = False
        """It lives, and is connected or about to be."""
        self._no_pages = ""
        """In post-copy: why none reaches the destination now; "": they do."""
        self._no_pages_since_s = 0.0
        self._its_engines_end = False
        """Post-copy: so the destination says. That no stream can be had follows from it."""
        self._pages_gone = False
        """In post-copy: an engine was lost, and there was no hypervisor for a successor."""
        self._copy_gone = False
        self._prepared: Prepared | None = None
        """Where the destination's engine listens, as it last said."""
        self._cancelled = cancel is not None
        self.cancelled_by = ""
        """Who asked for it; "": nobody, or one that isn't known."""
        if cancel is not None:
            self.error, self.cancelled_by = cancel.reason, cancel.by
        self._rollback_token: int | None = None
        self._doubts_rollback = False
        self._resume_pending = False
        """In a rollback `cont` was given, and has not been answered."""
        self._saying = False
        """The record is made to say that the guest is resumed here; it may say so late."""
        self._said_resuming = False
        """It does."""
        self._destination_runs = False
        self._destination_refused = False
        self._destination_is_at_it = False
        """In recovery it has answered that it is."""
        self._destination_forgot = False
        """It refuses since it knows nothing of this migration."""
        self._reads_since = 0
        """Of a record that is the destination's, since then."""
        self._yielded = 0
        """The token that the destination had won, couldn't run the guest under, and passed back."""
        self._gone = False
        self._swap_token = 0
        self._not_back = ""
        """It was given up, and why the guest doesn't run on here yet."""
        self._may_have_resumed = self._may_have_resumed_before = may_have_resumed
        self._discard_error = ""
        self._handed_over_at_s: float | None = None
        """The guest is the destination's, whole: what is left to do here is our copy's end."""
        self._removed = ""
        """The destination was removed from the cluster, and why that ends its post-copy."""

    # --- figures and facts that decisions are made from ---

    @property
    def no_post_copy(self) -> str:
        """Why the destination can't take the guest before all its pages; "": it can."""
        return self._prepared.no_post_copy if self._prepared is not None else ""

    @property
    def mode(self) -> MigrationMode:
        """The request's; pre-copy in place of hybrid where the destination can do nothing else."""
        if self.request.mode is MigrationMode.HYBRID and self.no_post_copy:
            return MigrationMode.PRECOPY
        return self.request.mode

    def _note_disks(self, event: DisksDeactivated) -> None:
        """A part of the device state's time, however late it is heard."""
        device_state = [phase for phase in self.timeline if phase.name == "device state"]
        ends_s = [phase.started_at_s + phase.seconds for phase in device_state]
        ended_s = min(event.at_s, self._now, *ends_s)
        began_s = max(ended_s - event.seconds, self._continued_at_s)
        self._note("deactivate", began_s, ended_s, "at most; a part of device state")

    def _note_blackout(self, resumed_at_s: float) -> None:
        """Pause to resume. Two hosts' clocks disagree, so ours gives the bounds."""
        if self._paused_at_s is None or self.blackout_ms is not None:
            return
        least_s = (self._sent_at_s or self._paused_at_s) - self._paused_at_s
        most_s = max(self._now - self._paused_at_s, 0.0)
        seconds = min(max(resumed_at_s - self._paused_at_s, least_s), most_s)
        self.blackout_ms = seconds * 1000.0

    def _note_mode(self) -> None:
        """Say in the timeline that hybrid isn't."""
        if self.mode is not self.request.mode:
            self._note("pre-copy only", self._now, self._now, self.no_post_copy)

    @property
    def uncapped_bytes_per_s(self) -> float | None:
        """What the link carries without this migration's cap, if that was ever measured."""
        return None if self.prediction is None else self.prediction.link.uncapped_bytes_per_s

    def _note_progress(self, event: EngineReported) -> None:
        sent_bytes = self._sent_before_bytes + event.bytes_sent
        before = (self._live.bytes_sent, self._live.remaining_bytes)
        if (sent_bytes, event.remaining_bytes) != before:
            self._moved_at_s = self._now
        self._live = MigrationProgress(
            state=self.state,
            bytes_sent=sent_bytes,
            remaining_bytes=event.remaining_bytes,
            throughput_bytes_per_s=(
                self._live.throughput_bytes_per_s
                if event.throughput_bytes_per_s is None
                else event.throughput_bytes_per_s
            ),
        )

    def standing_s(self, now: float) -> float | None:
        """In post-copy, for how long nothing has been sent, though the destination hasn't said that
        it lacks no page: its engine may be stopped. None: it goes on.
        """
        if self.shown_state is not _S.POSTCOPY:
            return None
        still_s = now - max(self._moved_at_s, self._entered_at_s)
        return still_s if still_s >= _STANDS_S else None

    def _note_last_sent(self, event: EngineStopped) -> None:
        """What its last report didn't know of yet. A pre-copy's passes have told all of it: nothing
        changes once it is shown as completed.
        """
        if self._handed_over_at_s is not None and not self.post_copy:
            return
        sent = max(self._live.bytes_sent, self._sent_before_bytes + event.bytes_sent)
        self._live = msgspec.structs.replace(self._live, bytes_sent=sent)

    def _hand_over(self) -> None:
        """The guest lives elsewhere, whole: for its users the migration has ended."""
        if self._handed_over_at_s is None:
            self._handed_over_at_s = self._now
            self._begin_part(_CLEAN_UP)

    def take_up(self, published: Migration, alive_at_s: float | None = None) -> None:
        """What was shown before the agent's restart stays part of the migration's history.

        `alive_at_s`: when that agent was last heard of, where that is known.
        """
        self.timeline.extend(published.timeline)
        self.passes.extend(published.iterations)
        self.blackout_ms = published.blackout_ms
        self.prediction = published.prediction
        if published.cancelled_by:  # That may be all there is, where the journal's disk is full.
            self._cancelled, self.cancelled_by = True, published.cancelled_by
        if published.state is _S.COMPLETED:
            self._handed_over_at_s = published.ended_at_s
        before = published.progress
        self._sent_before_bytes = before.bytes_sent
        self._live = MigrationProgress(
            state=self.state,
            iteration=before.iteration,
            bytes_sent=before.bytes_sent,
            remaining_bytes=before.remaining_bytes,
        )
        self._note_cut_off(published, alive_at_s)

    def _note_cut_off(self, published: Migration, alive_at_s: float | None) -> None:
        """The state that the agent's end cut off, up to where that agent is known to have lived."""
        states = [each for each in self.timeline if each.name in _STATES_TOLD]
        began_s = max((each.started_at_s + each.seconds for each in states), default=0.0)
        began_s = began_s or published.created_at_s
        ended_s = max(began_s, alive_at_s or began_s)
        name, later = published.state.value, self._journalled
        if self._handed_over_at_s is not None:
            name, later = _CLEAN_UP, None
        then = ""
        if later is not None and _is_later(later, published.state):
            then = f"; it had come to {later}, which wasn't published"
        self._note(name, began_s, ended_s, f"cut off by the agent's end{then}")
        self._entered_at_s = ended_s

    # --- what others see ---

    @property
    def restored(self) -> bool:
        """An earlier agent began it, whose engine may have been killed as well."""
        return self._journalled is not None

    @property
    def may_have_resumed(self) -> bool:
        """After a rollback the vCPUs ran here, or may have: the destination's copy is stale."""
        return self._may_have_resumed

    @property
    def cancel(self) -> CancelRequested | None:
        """That it ends because somebody asked for it, while the guest can still stay."""
        if not self._cancelled:
            return None
        return CancelRequested(reason=self.error or "", by=self.cancelled_by)

    @property
    def switchover_begun(self) -> bool:
        """The guest may have been paused, or sent."""
        return self._switchover_begun

    @property
    def destination_runs(self) -> bool:
        """The destination has said that the guest runs there."""
        return self._destination_runs

    def view(self, unheard_s: float | None = None) -> Migration:
        """The migration resource as of now. `unheard_s`: for how long the engine, whose word it is
        how pages travel, hasn't been heard though it should be.
        """
        progress = self._progress()
        if unheard_s is not None and self.shown_state in _TRAVELLING:
            progress = msgspec.structs.replace(
                progress, throughput_bytes_per_s=0.0, eta_s=None, unheard_s=unheard_s
            )
        ended_at_s = self.ended_at_s
        if ended_at_s is None and self.over:
            ended_at_s = self._handed_over_at_s
        return Migration(
            id=self.migration_id,
            domain=self.domain,
            source=self.source,
            destination=self.destination,
            request=self.request,
            state=self.shown_state,
            progress=progress,
            created_at_s=self.created_at_s,
            ended_at_s=ended_at_s,
            token=self.token,
            error=self._shown_error,
            blackout_ms=self.blackout_ms,
            total_s=None if ended_at_s is None else ended_at_s - self.created_at_s,
            timeline=tuple(self.timeline),
            iterations=tuple(self.passes),
            prediction=self.prediction,
            cancelled_by=self.cancelled_by,
        )

    @property
    def _shown_error(self) -> str | None:
        if self.shown_state is _S.COMPLETED:
            return None
        if self.state is _S.CANCELLING and self._not_back:
            return f"{self.error}; the guest doesn't run on yet: {self._not_back}"
        return self.error

    def _measured_bytes_per_s(self) -> float | None:
        """The passes' throughput; None: none of them has sent pages."""
        sent = any(each.bytes_sent for each in self.passes if each.kind not in TOLD)
        return throughput(self.passes) if sent else None

    def _left_pages(self) -> int:
        """After the last pass; in post-copy all that the destination was told it lacks."""
        told = [each.pages for each in self.passes if each.kind in TOLD]
        return sum(told) if told else self.passes[-1].pending_pages

    def _blackout_ahead_ms(self) -> float | None:
        """What a switchover after the last pass would cost; None: none like that will follow.

        In hybrid mode what is more than the limit allows is sent before it, or follows the guest.
        """
        leaving_post_copy = self._leaving is not None and self._leaving.post_copy
        if self.post_copy or leaving_post_copy or self.mode is MigrationMode.POSTCOPY:
            return None
        pending_bytes = self.passes[-1].pending_pages * PAGE_SIZE_BYTES
        rate = final_rate(self.passes, self.uncapped_bytes_per_s)
        found_ms = predicted_blackout_ms(pending_bytes, rate)
        if self.mode is MigrationMode.PRECOPY:
            return found_ms
        return found_ms if within_limit(found_ms, self.request.downtime_limit_ms) else None

    def _progress(self) -> MigrationProgress:
        live = self._live
        if not self.passes:
            return MigrationProgress(
                state=self.shown_state,
                iteration=1 if self.state is _S.PRECOPY else live.iteration,
                bytes_sent=live.bytes_sent,
                remaining_bytes=live.remaining_bytes,
                throughput_bytes_per_s=live.throughput_bytes_per_s,
                eta_s=_eta_s(live),
            )
        last = self.passes[-1]
        sending = [each for each in self.passes if each.kind not in TOLD]
        in_post_copy = self.state is _S.POSTCOPY
        rate = live.throughput_bytes_per_s if in_post_copy else self._measured_bytes_per_s()
        if self._pass_running and self._now - self._moved_at_s >= _STANDS_S:
            rate = 0.0
        return MigrationProgress(
            state=self.shown_state,
            iteration=last.number + (1 if self._pass_running else 0),
            bytes_sent=max(live.bytes_sent, sum(each.bytes_sent for each in self.passes)),
            remaining_bytes=0 if self.shown_state is _S.COMPLETED else live.remaining_bytes,
            throughput_bytes_per_s=rate,
            dirty_rate_bytes_per_s=dirty_rate(sending[-1]) if sending else None,
            predicted_blackout_ms=self._blackout_ahead_ms(),
            eta_s=_eta_s(live),
        )

    @property
    def cancellable(self) -> bool:
        """A restored one isn't, even before its Recover: the guest may be sent already."""
        return self.shown_state in (_S.CREATED, _S.SETUP, _S.PRECOPY, _S.SWITCHOVER)

    @property
    def over(self) -> bool:
        return self.shown_state in ENDED

    @property
    def shown_state(self) -> MigrationState:
        """As users see it."""
        if self.state in ENDED:
            return self.state
        if self._handed_over_at_s is not None and not self._discard_error:
            return _S.COMPLETED
        restored = self._journalled is not None and self.state is _S.CREATED
        return _S.RECOVERING if restored else self.state


def _is_later(state: MigrationState, other: MigrationState) -> bool:
    """On the way of a migration that goes well; of others nothing is said."""
    return state in _WAY and other in _WAY and _WAY.index(state) > _WAY.index(other)


def _eta_s(live: MigrationProgress) -> float | None:
    if not live.throughput_bytes_per_s or not live.remaining_bytes:
        return None
    return live.remaining_bytes / live.throughput_bytes_per_s
