"""Post-copy at the destination: the guest runs here, and lacks pages that only the source has.

- From the moment that pages are missing an engine has to live: it answers whoever touches one. One
  that dies has a successor, and the source is told where that listens.
- Whether pages are missing after a restart only an engine can tell, which looks before it listens.
- A source that is gone for good says nothing, and its pages don't come. Only an operator knows it:
  who stops the domain ends the guest here (CancelRequested). So it does where the hypervisor, which
  may wait for a page itself, never said that it had resumed it, or says nothing to the next agent.
  A source that is there, and has lost them, is asked and heard in that state, too.
- That nothing is missing any more is journalled before it is said: the source destroys its copy
  when it hears it, and a restarted agent mustn't look for missing pages again.
"""

from __future__ import annotations

from migrator.model import MigrationState
from migrator.ports import DomainEventKind
from migrator.session.destination_view import DestinationView
from migrator.session.messages import (
    Commit,
    Farewell,
    Inquire,
    Lost,
    Pending,
    Prepared,
    SessionMessage,
)
from migrator.session.vocabulary import (
    CancelRequested,
    CommandFailed,
    DestroyGuest,
    EngineListening,
    EngineLost,
    Event,
    GuestDestroyed,
    GuestReported,
    Journal,
    PagesComplete,
    PagesMissing,
    PullPages,
    StartEngine,
    StartTimer,
    StopEngine,
    TimerFired,
    TimerName,
)

_S = MigrationState
_WITH_PAGES_MISSING = (_S.PRECOPY, _S.SWITCHOVER, _S.HANDOFF, _S.RECOVERING, _S.POSTCOPY)
_RESUMING = (_S.HANDOFF, _S.RECOVERING)


class DestinationPostCopy(DestinationView):
    """See the module. `DestinationSession` sets the attributes."""

    # --- the engine ---

    def _heard_of_pages(self, event: Event) -> bool:
        """What is about missing pages and their engine, in whatever state. Whether that was all."""
        alive = self.state in _WITH_PAGES_MISSING
        alive = alive and not self._lost_reason
        match event:
            case EngineLost() if self.pages_missing and alive:
                self._revive_engine(event.reason)
            case CommandFailed(command="StartEngine") if self.pages_missing and alive:
                self._revive_engine(event.error)
            case TimerFired(name=TimerName.ENGINE):
                self._start_successor()
            case EngineListening() if self.pages_missing:
                self._listening = event
                self._engine_works()
                self._answer_ready()
            case PagesMissing():
                self._note_post_copy()
            case PagesComplete():
                self.complete = event
                return False
            case CancelRequested() if self._waits_silently:
                self._lost(event.reason)
            case TimerFired(name=TimerName.RETRY) if self._waits_silently:
                self._answer_ready()  # A source whose pages are gone says so.
                return False
            case _ if self._lost_reason and self.state in _RESUMING:
                self._end_lost(event)
            case _:
                return False
        return True

    @property
    def _waits_silently(self) -> bool:
        """The guest was resumed, by the last agent perhaps, and its hypervisor doesn't say so: its
        main loop may wait for a page, too.
        """
        silent = bool(self._stuck) and self.state in _RESUMING
        ending = self._dead or bool(self._lost_reason)
        return silent and not ending and self.pages_missing and self.may_have_run

    def _revive_engine(self, reason: str) -> None:
        self._listening = None
        self._note_again("engine lost", reason)
        self._respawn_later()
        if self._respawns > 1 and self.state is _S.POSTCOPY:  # The source shows it to users.
            self._send(Pending(state=self.state.value, stuck=reason))

    def _note_post_copy(self) -> None:
        """Pages are missing, or will be. If that is news, the engine may be lost already."""
        known, self.post_copy = self.post_copy, True
        if not known and self.state in _WITH_PAGES_MISSING:
            self._start_successor()

    def _start_successor(self) -> None:
        if self.pages_missing and self._listening is None and not self._lost_reason:
            self._do(StartEngine(post_copy=True))

    def _answer_ready(self) -> None:
        if self._listening is not None:
            ready = self._listening
            self._send(
                Prepared(
                    host=ready.host,
                    port=ready.port,
                    secret=ready.secret,
                    no_post_copy=ready.no_post_copy,
                )
            )

    # --- the state ---

    def _begin_post_copy(self) -> None:
        """The vCPUs run."""
        self._enter(_S.POSTCOPY)
        self._do(PullPages())
        self._answer_ready()
        self._retry_later()
        self._journal_how_far()

    def _in_post_copy(self, event: Event) -> None:
        match event:
            case _ if self._lost_reason:
                self._end_lost(event)
            case PagesComplete() | TimerFired(name=TimerName.RETRY) if self.complete is not None:
                self._journal_how_far()
            case TimerFired(name=TimerName.FILLED):
                self._send(self._filled_message())
                self._do(StopEngine())
                self.error = None
                self._finish(_S.COMPLETED)
            case TimerFired(name=TimerName.RETRY):
                # The source may have restarted, and know neither us nor our engine.
                self._send(self._running())
                self._answer_ready()
                self._retry_later()
            case CommandFailed(command="Journal"):
                if self.complete is not None:  # The source shows it to users.
                    word = Pending(state=self.state.value, stuck=event.error, filled=True)
                    self._send(word)
                self._retry_later()
            case CancelRequested():
                self._lost(event.reason)
            case GuestReported(kind=DomainEventKind.EXITED):
                self._lost(f"the guest ended during post-copy: {event.detail or event.kind}")
            case _:
                pass

    def _journal_how_far(self) -> None:
        """Behind a Journal that fails nothing is done: FILLED fires only once it is written."""
        self._do(Journal(state=self.state, durable=False))
        if self.complete is not None:
            self._do(StartTimer(name=TimerName.FILLED, seconds=0.0))

    def _hear_in_post_copy(self, message: SessionMessage) -> None:
        match message:
            case Commit() | Inquire():
                self._send(self._running())
                self._answer_ready()
            case Lost() | Farewell() if self._listening is None:
                pass  # Until an engine has looked, nobody knows what is missing. We ask again.
            case Lost() if self.pages_missing:
                self._hear_lost(message.reason)
            case Farewell() if self.pages_missing:
                self._hear_lost("the source's copy is gone, and pages are missing here")
            case _:
                pass

    def _hear_lost(self, reason: str) -> None:
        """The engine may have every page, and its word be on its way: it counts when said again."""
        self._told_lost_at_s = self._told_lost_at_s or self._now
        if self._now - self._told_lost_at_s >= self.timing.retry_s:
            self._lost(reason)

    def _lost(self, reason: str) -> None:
        """The guest can't go on: pages of it are nowhere. It ends before anybody is told."""
        if not self._lost_reason:
            self._lost_reason = reason
            self._resume_issued = True  # Or was about to be: whatever the source has is older.
            self._do(StopEngine(), DestroyGuest())

    def _end_lost(self, event: Event) -> None:
        match event:
            case GuestDestroyed():
                self._send(self._filled_message(lost=self._lost_reason))
                self._finish(_S.FAILED, self._lost_reason)
            case CommandFailed(command="DestroyGuest"):
                self._retry_later()
            case TimerFired(name=TimerName.RETRY):
                self._do(DestroyGuest())
            case _:
                pass
