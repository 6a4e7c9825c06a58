"""Code that breaks a rule on purpose. `test_mutants` asserts that the simulation finds each.

A checker that can't fail proves nothing. Each mutant says which rule it breaks; `found_as` are the
first words of the violations that may be its undoing; `first_seed` is where the search begins. Of
the rare ones `among` names the faults of the seeds that it is looked for among, or `mix` those that
every seed is played with. Most are sessions; the rest are `Sessions` (what is restored, written and
performed) and `Node`s (what an agent does with domains).
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from migrator.journal_entry import JournalEntry
from migrator.model import (
    MigrationState,
    OwnershipRecord,
    PassKind,
)
from migrator.session import messages as m
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from migrator.session.source import SourceSession
from tests.simulation.agent_mutants import (
    AdmitsEveryPrepare,
    ForgetsCancels,
    ForgetsWhatItLost,
    LeavesStaleCopies,
    TakesBeforeItLooks,
    TakesOverAsAHandoffWould,
    TakesOverWithoutAFence,
)
from tests.simulation.mutant_runs import Mutant
from tests.simulation.side import NodeSession, Sessions, Side


class CommitsEarly(SourceSession):
    """Commit at the pause, while the source's hypervisor may still resume by itself."""

    found_as: ClassVar = ("1:", "2:", "3:")
    first_seed: ClassVar = 18

    def _switch_over(self, detail: str) -> None:
        super()._switch_over(detail)
        self._send(m.Commit())


class RollsBackWithoutTheRecord(SourceSession):
    """A rollback is a handoff, too: it needs a won compare-and-set."""

    found_as: ClassVar = ("1:", "2:", "3:")

    def _swap(self, record: OwnershipRecord) -> None:
        self._rollback(self.token)


class GuessesFromATimeout(SourceSession):
    """No word from the destination isn't a word."""

    found_as: ClassVar = ("1:", "2:", "3:")

    def _recover(self, reason: str) -> None:
        super()._recover(reason)
        self._rollback(self.next_token)


class SkipsTheFinalPass(SourceSession):
    """The last pages stay behind."""

    found_as: ClassVar = ("2:",)

    def _run_pass(self, kind: PassKind) -> None:
        if kind is PassKind.FINAL:
            self._continued = True
            self._do(v.ContinueSwitchover())
        else:
            super()._run_pass(kind)


class DestroysAtCommit(SourceSession):
    """The source's copy goes before the destination is known to run."""

    found_as: ClassVar = ("4:",)

    def _hand_off(self) -> None:
        super()._hand_off()
        self._do(v.DestroyGuest())


class CommitsWhatMayBeStale(SourceSession):
    """The source's hypervisor is gone, so the destination's copy must be the newest: not so."""

    found_as: ClassVar = ("1:", "2:")
    among: ClassVar = "stalled device states"
    first_seed: ClassVar = 27_459

    def _recover_unpassed(self, record: OwnershipRecord) -> None:
        self.device_state_out = self.device_state_out or self._gone
        super()._recover_unpassed(record)


class NeverAsksAgain(SourceSession):
    """What was lost stays lost."""

    found_as: ClassVar = ("4:", "5:")

    def _retry_later(self) -> None:
        pass


class CancelsSlowly(SourceSession):
    """A cancel that waits for the peer."""

    found_as: ClassVar = ("cancel:",)
    first_seed: ClassVar = 31

    def _give_up(self, reason: str) -> None:
        if self.state is MigrationState.PRECOPY:
            self._do(v.StartTimer(name=v.TimerName.PEER, seconds=1.5))
        else:
            super()._give_up(reason)


class ResumesWithoutTheRecord(DestinationSession):
    """Loaded and committed, but not the owner."""

    found_as: ClassVar = ("1:",)

    def _swap(self) -> None:
        self._do(v.Fence(token=self.next_token))


class ResumesOnAnUnknownOutcome(DestinationSession):
    """The store didn't answer, so it will have worked."""

    found_as: ClassVar = ("1:",)
    first_seed: ClassVar = 176

    def _in_handoff(self, event: v.Event) -> None:
        unknown = isinstance(event, v.RecordSwapped) and event.won is None
        super()._in_handoff(v.RecordSwapped(won=True) if unknown else event)


class ResumesWithoutAFence(DestinationSession):
    """Somebody with the old token may still write."""

    found_as: ClassVar = ("3:",)

    def _won(self) -> None:
        self._resume_issued = True
        self._do(v.ResumeGuest())


class TakesWithoutCommit(DestinationSession):
    """Loaded is enough: but the source may resume by itself."""

    found_as: ClassVar = ("1:", "2:")

    def _try_commit(self) -> None:
        self._commit = True
        super()._try_commit()


class DeniesThatItRan(DestinationSession):
    """Says Aborted whatever happened: the source takes an old copy back."""

    found_as: ClassVar = ("1:", "2:", "4:")

    def last_word(self) -> m.SessionMessage:
        return m.Aborted(reason="nothing happened")

    def _resumed(self, at_s: float) -> None:
        super()._resumed(at_s)
        self._commands = [each for each in self._commands if not isinstance(each, v.Send)]


class TakesEveryFailedResumeForOne(DestinationSession):
    """Its hypervisor died before `cont`, and yet it tells the source that the guest ran."""

    found_as: ClassVar = ("4:",)

    def _in_handoff(self, event: v.Event) -> None:
        if isinstance(event, v.CommandFailed):
            event = msgspec.structs.replace(event, without_effect=False)
        super()._in_handoff(event)


class GivesUpALoadedCopy(DestinationSession):
    """Discards the only copy because nobody called for a while."""

    found_as: ClassVar = ("4:",)
    first_seed: ClassVar = 515

    def _in_handoff(self, event: v.Event) -> None:
        if isinstance(event, v.RecordRead) and not event.known:
            self._give_up("the store is down")
        else:
            super()._in_handoff(event)


class EndsBeforeItsWriteHasLanded(DestinationSession):
    """Gives up while its compare-and-set is under way, and is gone when that lands."""

    found_as: ClassVar = ("4:",)
    among: ClassVar = "late writes"
    first_seed: ClassVar = 16_804

    def _pass_back(self) -> None:
        self._swap_open = False
        super()._pass_back()


class YieldsToARollback(DestinationSession):
    """The source won the record back, so its guest will run: but it may have died."""

    found_as: ClassVar = ("4:",)
    first_seed: ClassVar = 88

    def _lost_to(self, record: OwnershipRecord | None) -> None:
        self._dead = True
        super()._lost_to(record)


class HandsOverWhatItMayHaveRun(SourceSession):
    """A rollback that failed has run nothing: but its `cont` may have been given."""

    found_as: ClassVar = ("1:", "2:", "3:")
    mix: ClassVar = "failing resumes"
    first_seed: ClassVar = 54

    def _gone_after_rollback(self, token: int) -> None:
        self._may_have_resumed = False
        super()._gone_after_rollback(token)


class GivesUpWithItsEngine(DestinationSession):
    """Without its engine it can't go on, so it needs its copy no more: but that may be whole."""

    found_as: ClassVar = ("4:",)
    first_seed: ClassVar = 165

    def _engine_gone(self, reason: str) -> None:
        self._give_up(reason)


class DoubtsThatItIsFull(DestinationSession):
    """Post-copy: an engine's successor finds that no page is missing, and isn't believed."""

    found_as: ClassVar = ("4:", "5:")
    first_seed: ClassVar = 1_589

    def _heard_of_pages(self, event: v.Event) -> bool:
        if isinstance(event, v.PagesComplete) and self._listening is None:
            return True
        return super()._heard_of_pages(event)


class ForgetsThatItRan(Sessions):
    """A journal that loses `resuming`: after a restart the destination says that it never ran."""

    found_as: ClassVar = ("1:", "2:", "3:", "4:")
    first_seed: ClassVar = 709

    def restored(self, side: Side, entry: JournalEntry) -> NodeSession:
        forgetful = msgspec.structs.replace(entry, resuming=False, boot_id=side.node.boot_id)
        return super().restored(side, forgetful)


class DestroysWhatIsMissing(SourceSession):
    """Post-copy: the guest runs at the destination, so the source's copy can go."""

    found_as: ClassVar = ("4:",)

    def _begin_post_copy(self) -> None:
        super()._begin_post_copy()
        self._discard("")


class TellsNothingMissing(SourceSession):
    """Post-copy: what was dirtied since the stale pages were told stays unsaid."""

    found_as: ClassVar = ("2:",)

    def _run_pass(self, kind: PassKind) -> None:
        if kind is PassKind.MISSING:
            self._continued = True
            self._do(v.ContinueSwitchover())
        else:
            super()._run_pass(kind)


class LeavesTheEngineDead(SourceSession):
    """Post-copy: the source's engine is gone, and nobody makes another one."""

    found_as: ClassVar = ("5:",)

    def _serve(self) -> None:
        pass


class LeavesTheGuestWaiting(DestinationSession):
    """Post-copy: the destination's engine is gone, and nobody makes another one."""

    found_as: ClassVar = ("5:",)

    def _start_successor(self) -> None:
        pass


class FilledTooEarly(DestinationSession):
    """Post-copy: says that it holds every page when it doesn't."""

    found_as: ClassVar = ("4:",)

    def _begin_post_copy(self) -> None:
        self.complete = self.complete or v.PagesComplete()
        super()._begin_post_copy()


class JournalsAfterwards(Sessions):
    """What may not be forgotten is written once it is done, and the next thing is heard of."""

    found_as: ClassVar = ("1:", "2:", "3:", "4:")
    first_seed: ClassVar = 369

    def __init__(self) -> None:
        self._late: dict[object, list[v.Command]] = {}

    def commands(self, side: Side, commands: list[v.Command]) -> list[v.Command]:
        late = self._late.pop(side.session, [])
        self._late[side.session] = [each for each in commands if isinstance(each, v.Journal)]
        return late + [each for each in commands if not isinstance(each, v.Journal)]


class KeepsTheToken(DestinationSession):
    """The record changes its owner, and not its token."""

    found_as: ClassVar = ("1:", "2:", "3:", "4:", "5:")

    @property
    def next_token(self) -> int:
        return self.token

    def _swap(self) -> None:
        before = self.record_before
        new = msgspec.structs.replace(before, owner=self.destination)
        self._do(v.Journal(state=self.state, durable=False))
        self._do(v.SwapRecord(expected=before, new=new))


class KeepsWhatItCannotRun(DestinationSession):
    """It won, can't run the guest, and doesn't pass the record back: its node stops the domain."""

    found_as: ClassVar = ("4:",)
    first_seed: ClassVar = 88

    def _pass_back(self) -> None:
        self._finish(MigrationState.CANCELLED)


MUTANTS: tuple[type[Mutant], ...] = (
    CommitsEarly,
    RollsBackWithoutTheRecord,
    GuessesFromATimeout,
    SkipsTheFinalPass,
    DestroysAtCommit,
    CommitsWhatMayBeStale,
    NeverAsksAgain,
    CancelsSlowly,
    DestroysWhatIsMissing,
    TellsNothingMissing,
    LeavesTheEngineDead,
    ResumesWithoutTheRecord,
    ResumesOnAnUnknownOutcome,
    ResumesWithoutAFence,
    TakesWithoutCommit,
    DeniesThatItRan,
    GivesUpALoadedCopy,
    TakesEveryFailedResumeForOne,
    LeavesTheGuestWaiting,
    FilledTooEarly,
    KeepsTheToken,
    KeepsWhatItCannotRun,
    EndsBeforeItsWriteHasLanded,
    YieldsToARollback,
    HandsOverWhatItMayHaveRun,
    GivesUpWithItsEngine,
    DoubtsThatItIsFull,
    ForgetsThatItRan,
    ForgetsCancels,
    JournalsAfterwards,
    AdmitsEveryPrepare,
    LeavesStaleCopies,
    TakesOverWithoutAFence,
    TakesOverAsAHandoffWould,
    TakesBeforeItLooks,
    ForgetsWhatItLost,
)
