"""What a destination's session knows, and what it says of itself."""

from __future__ import annotations

from migrator.model import DomainSpec, MigrationRequest, MigrationState, NodeName, Role
from migrator.session.base import Session, Timing
from migrator.session.messages import Aborted, Filled, Running, SessionMessage
from migrator.session.vocabulary import EngineListening, PagesComplete

_S = MigrationState


class DestinationView(Session):
    """The attributes of a destination's session; `DestinationSession` gives them their meaning."""

    role = Role.DESTINATION

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
        may_have_run: bool = False,
        committed: bool = False,
        post_copy: bool = False,
        complete: bool = False,
        pages_first: bool = False,
        yielding: bool = False,
    ) -> None:
        """`pages_first`: they may come before all is prepared.

        `yielding`: restored from a journal that knows of a record that was to be given back.

        `may_have_run`: restored from a journal that can't rule out an earlier resume.

        `committed`: restored from a journal that knows of a Commit. `post_copy`: of one with
        pages missing; `complete`: none is missing any more.
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
        self.pages_first = pages_first
        self.post_copy = post_copy
        self.complete = PagesComplete() if complete else None
        self._incoming_ready = False
        self._up = False
        """The hypervisor waits for device state, or has some."""
        self._listening: EngineListening | None = None
        self._engine_lost_at_s = 0.0
        self._engine_lost_reason = ""
        """The engine was lost before the device state was known to be loaded, and why."""
        self._loaded_at_s = 0.0
        self._commit = committed
        self._swap_pending = False
        self._swap_open = committed or may_have_run
        """A compare-and-set of ours may land yet: its outcome was unknown, or is forgotten."""
        self._taken_back = False
        """The source won the record back; whether its guest runs, it alone knows."""
        self._won_at_s = 0.0
        self._fenced_at_s = 0.0
        self._fence_detail = ""
        self._stuck = ""
        """The guest is ours, and can't be run yet: why."""
        self._yielding = yielding
        """We are giving the record back, or have tried to: nothing runs here under our token."""
        self._yielded = False
        """It is the source's again, by our doing."""
        self._resume_issued = False
        self._resume_issued_before = False
        self._resume_pending = False
        self._resumed_at_s = 0.0
        self._dead = False
        self._discarded = False
        """The copy is gone, and never ran."""
        self._told_lost_at_s = 0.0
        """Post-copy: when the source first said that its pages are gone."""
        self._lost_reason = ""
        """Post-copy: why pages of the guest are nowhere any more; it is being ended."""
        self._restored = False
        self._may_have_run = may_have_run

    # --- what others see ---

    def last_word(self) -> SessionMessage:
        """What the source is told when it asks after the end."""
        if self._resume_issued and self.post_copy:
            return self._filled_message(lost=self.error or "" if self.state is _S.FAILED else "")
        if self._resume_issued:
            return self._running()
        return Aborted(reason=self.error or self.state.value)

    @property
    def may_have_run(self) -> bool:
        """The vCPUs run here, did, or may have: the journal must not forget it."""
        return self._may_have_run or self._resume_issued

    @property
    def yielding(self) -> bool:
        """A compare-and-set that gives the record back may land yet: the journal must know."""
        return self._yielding

    @property
    def committed(self) -> bool:
        """The source said Commit: its own copy will never resume by itself."""
        return self._commit

    @property
    def _may_discard(self) -> bool:
        """In recovery: no compare-and-set of ours can be under way, none was won."""
        return self.state is _S.RECOVERING and not (
            self._commit or self._won_at_s or self._resume_issued
        )

    def _running(self) -> Running:
        return Running(
            token=self.next_token,
            resumed_at_s=self._resumed_at_s,
            won_at_s=self._won_at_s,
            loaded_at_s=self._loaded_at_s,
            fenced_at_s=self._fenced_at_s,
            fence_detail=self._fence_detail,
        )

    def _filled_message(self, lost: str = "") -> Filled:
        done = self.complete or PagesComplete()
        return Filled(
            token=self.next_token,
            lost=lost,
            seconds=done.seconds,
            pages=done.pages,
            faults=done.faults,
            fault_ms_median=done.fault_ms_median,
            fault_ms_max=done.fault_ms_max,
            packed_ratio=done.packed_ratio,
        )

    @property
    def pages_missing(self) -> bool:
        return self.post_copy and self.complete is None
