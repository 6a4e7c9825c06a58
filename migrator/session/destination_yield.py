"""The destination has won the guest and can't run it: the record goes back to who has all of it.

    won, and the fence fails ── for hand_back_s ── Inquire(whole) ──► journal, compare-and-set:
                                                             (here, n+1) -> (source, n+2)
    source: Pending(yielded) ──► fence n+2, resume;  or its copy has died by now: Commit anew

The copy here is kept, as after any rollback, until the source has ended. What was tried may land
late: from the first try on, nothing is resumed here under the token that was won, and the next
agent knows that from the journal.
"""

from __future__ import annotations

from migrator.model import MigrationState, OwnershipRecord
from migrator.session.destination_arrival import DestinationArrival
from migrator.session.vocabulary import Journal, SwapRecord

_S = MigrationState


class DestinationYield(DestinationArrival):
    """See the module."""

    @property
    def _won_record(self) -> OwnershipRecord:
        """What we have won, or try to."""
        return self.record_before.passed_to(self.destination)

    @property
    def _may_yield(self) -> bool:
        """The guest is ours, has never run here, and can't for a while now."""
        mine = self.state in (_S.HANDOFF, _S.RECOVERING) and self._won_at_s and self._stuck
        if not mine or self._dead or self.may_have_run or self._resume_pending or self._yielding:
            return False
        return self._now - self._won_at_s >= self.timing.hand_back_s

    def _yield(self) -> None:
        self._yielding = True
        self._enter_recovering(f"can't be run here: {self._stuck}")
        self._do(Journal(state=self.state))
        self._give_record_back()

    def _give_record_back(self) -> None:
        won = self._won_record
        self._do(SwapRecord(expected=won, new=won.passed_to(self.source)))

    def _note_yielded(self) -> None:
        self._forget_what_was_won()
        self._taken_back = True
        self._send(self._pending())
        self._retry_later()

    def _note_lost(self, record: OwnershipRecord | None) -> None:
        """Was it given back by us? What was tried may have landed late."""
        tried = self._yielding or self._yielded
        given_back = self._won_record.passed_to(self.source)
        if tried and record in (given_back, given_back.said_resuming()):
            self._forget_what_was_won()

    def _forget_what_was_won(self) -> None:
        """If the source's copy dies before it runs, the handoff begins anew."""
        self._won_at_s = 0.0
        self._yielding = self._swap_open = False
        self._yielded = True

    def _enter_recovering(self, detail: str) -> None:
        if self.state is not _S.RECOVERING:
            self._enter(_S.RECOVERING, detail)
