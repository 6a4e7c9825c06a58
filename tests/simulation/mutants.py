"""Sessions that break a rule on purpose. `test_mutants` asserts that the simulation finds each.

A checker that can't fail proves nothing. Each mutant says which rule it breaks; `found_as` are the
first words of the violations that may be its undoing.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from migrator.journal_entry import JournalEntry
from migrator.model import MigrationRequest, MigrationState, OwnershipRecord, PassKind
from migrator.session import messages as m
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from migrator.session.source import SourceSession
from tests.simulation.node import Node, NodeSession


class CommitsEarly(SourceSession):
    """Commit at the pause, while the source's hypervisor may still resume by itself."""

    found_as: ClassVar = ("1:", "2:", "3:")

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
    first_seed: ClassVar = 2_500
    """It takes an agent, an engine and a hypervisor within a second, in that order."""

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

    def _in_handoff(self, event: v.Event) -> None:
        if isinstance(event, v.RecordRead) and not event.known:
            self._give_up("the store is down")
        else:
            super()._in_handoff(event)


class ForgetsThatItRan(Node):
    """A journal that loses `resuming`: after a restart the destination says that it never ran."""

    found_as: ClassVar = ("1:", "2:", "3:", "4:")

    def restored(self, entry: JournalEntry) -> NodeSession:
        boot_id = f"boot-{self.boot}"
        return super().restored(msgspec.structs.replace(entry, resuming=False, boot_id=boot_id))


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


class ForgetsThatItIsFull(Node):
    """Post-copy: a restarted destination believes that the gone source has what it needs."""

    found_as: ClassVar = ("4:", "5:")

    def restored(self, entry: JournalEntry) -> NodeSession:
        return super().restored(msgspec.structs.replace(entry, complete=False))


SOURCES: tuple[type[SourceSession], ...] = (
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
)
DESTINATIONS: tuple[type[DestinationSession], ...] = (
    ResumesWithoutTheRecord,
    ResumesOnAnUnknownOutcome,
    ResumesWithoutAFence,
    TakesWithoutCommit,
    DeniesThatItRan,
    GivesUpALoadedCopy,
    TakesEveryFailedResumeForOne,
    LeavesTheGuestWaiting,
    FilledTooEarly,
)


def node_with(mutant: type[SourceSession | DestinationSession | Node]) -> type[Node]:
    """A node whose sessions are `mutant`s where that is their role, also after a restart."""
    if issubclass(mutant, Node):
        return mutant

    class MutantNode(Node):
        def _mutate(self, session: NodeSession) -> None:
            if isinstance(session, mutant.__mro__[1]):
                session.__class__ = mutant  # type: ignore[assignment]

        def new_source(
            self, migration_id: str, token: int, request: MigrationRequest
        ) -> SourceSession:
            session = super().new_source(migration_id, token, request)
            self._mutate(session)
            return session

        def new_destination(self, migration_id: str, prepare: m.Prepare) -> DestinationSession:
            session = super().new_destination(migration_id, prepare)
            self._mutate(session)
            return session

        def restored(self, entry: JournalEntry) -> NodeSession:
            session = super().restored(entry)
            self._mutate(session)
            return session

    return MutantNode


Mutant = SourceSession | DestinationSession | Node
MUTANTS: tuple[type[Mutant], ...] = (
    *SOURCES,
    *DESTINATIONS,
    ForgetsThatItRan,
    ForgetsThatItIsFull,
)
