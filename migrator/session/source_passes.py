"""Pre-copy at the source: pass after pass, and what is decided after each.

Whether it converges is the policy's word (`migrator.policy`), from the passes' figures. What was
asked for stands beside it: a mode, a time, and what is to be done when that is over (`_forced`).
"""

from __future__ import annotations

from migrator.model import (
    PAGE_SIZE_BYTES,
    MigrationMode,
    MigrationProgress,
    OnTimeout,
    PassKind,
    PassReport,
)
from migrator.policy import DecisionKind, decide
from migrator.prediction import after_first_pass
from migrator.session.source_leave import SourceLeave
from migrator.session.vocabulary import RunPass


class SourcePasses(SourceLeave):
    """See the module."""

    def _run_pass(self, kind: PassKind) -> None:
        self._pass_running, self._moved_at_s = True, self._now
        self._do(RunPass(number=len(self.passes) + 1, kind=kind))

    def _note_pass(self, report: PassReport) -> None:
        self._pass_running = False
        self.passes.append(report)
        if self.prediction is None and report.kind is PassKind.FIRST and not report.cut_pages:
            self.prediction = after_first_pass(report, self.request)
        self._live = MigrationProgress(
            state=self.state,
            bytes_sent=sum(each.bytes_sent for each in self.passes),
            remaining_bytes=self._left_pages() * PAGE_SIZE_BYTES,
            throughput_bytes_per_s=self._measured_bytes_per_s(),
        )

    def _decide(self) -> None:
        mode = self.mode
        limit_ms = self.request.downtime_limit_ms
        decision = decide(self.passes, limit_ms, mode, self.uncapped_bytes_per_s)
        self.decisions.append(decision)
        self._note(f"decision: {decision.kind.name.lower()}", self._now, self._now, decision.reason)
        match decision.kind:
            case DecisionKind.ITERATE if not self._forced:
                self._run_pass(PassKind.DIRTY)
            case DecisionKind.POST_COPY if not self.passes[-1].cut_pages:
                self._ask_leave(decision.reason, post_copy=True)
            case DecisionKind.ITERATE | DecisionKind.POST_COPY if mode is MigrationMode.HYBRID:
                self._ask_leave("its time for pre-copy is over", post_copy=True)
            case DecisionKind.GIVE_UP if not self._forced:
                if self.request.on_timeout is OnTimeout.FORCE:
                    self._ask_leave(f"forced: {decision.reason}")
                else:
                    self._give_up(f"doesn't converge: {decision.reason}")
            case _:
                self._ask_leave("forced by timeout" if self._forced else decision.reason)

    def _go_post_copy(self, reason: str) -> None:
        """What is pending is dropped at the destination while the guest still runs."""
        self.post_copy = True
        self._note("post-copy", self._now, self._now, reason)
        self._run_pass(PassKind.STALE)
