"""Post-copy at the source: the guest runs at the destination, and lacks pages that are only here.

- The copy is kept, paused, until the destination says Filled; nothing else destroys it but a record
  that has moved on past the destination: then nobody needs the pages any more.
- The engine is kept alive. One that dies has a successor, which the destination asks again for what
  it lacks; if the destination's engine has a successor, its Prepared says where.
- A hypervisor that dies leaves its memory to the engine that has it open. Only when that dies, too,
  the pages are lost, and the destination is told.
- A destination that was removed from the cluster is given no page more. The agent is told so again
  after a restart; as nothing is heard of that node any more, its record stands for its word then.
"""

from __future__ import annotations

from typing import Final

from migrator.model import MigrationState, OwnershipState
from migrator.ports import DomainEventKind
from migrator.session.messages import Filled, Inquire, Lost, Pending, Prepared
from migrator.session.source_recovery import PAGES_GONE, SourceRecovery
from migrator.session.vocabulary import (
    ChannelNoted,
    CommandFailed,
    ConnectEngine,
    DestroyGuest,
    EngineConnected,
    EngineReported,
    Event,
    GuestCondition,
    GuestDestroyed,
    GuestInspected,
    GuestReported,
    InspectGuest,
    Journal,
    ReadRecord,
    RecordRead,
    StartEngine,
    StartTimer,
    StopEngine,
    StopTimer,
    TimerFired,
    TimerName,
)

_S = MigrationState
_SERVING = (_S.HANDOFF, _S.RECOVERING, _S.POSTCOPY)
_TOLD_AFTER_S: Final = 1.0


class SourcePostCopy(SourceRecovery):
    """See the module."""

    @property
    def _must_serve(self) -> bool:
        return (
            self.post_copy
            and self.state in _SERVING
            and not self._destination_runs
            and self._rollback_token is None
        )

    # --- the engine ---

    def _engine_lost(self, reason: str) -> None:
        self._engine_up = False
        self._sent_before_bytes = self._live.bytes_sent  # Its successor counts anew.
        self._note_again("engine lost", reason)
        self._pages_stop(reason)
        self._pages_gone = self._gone
        if self._gone and self.state is _S.POSTCOPY:
            self._pages_lost()
        else:
            self._respawn_later()
            if self.state is _S.POSTCOPY:
                # Now: each Prepared may start the next engine, and stop the timer that would ask.
                self._do(InspectGuest())

    def _heard_of_streams(self, event: ChannelNoted | EngineConnected) -> None:
        """Of the pages that the destination asks for."""
        match event:
            case ChannelNoted():
                self._note_channel(event)
                if not (event.broken and self._its_engines_end):
                    self._pages_stop((event.detail or "the link broke") if event.broken else "")
            case EngineConnected():
                self._pages_gone = self._its_engines_end = False
                self._engine_works()
                self._note_again("engine connected again", "")
                self._pages_stop("")

    def _note_channel(self, event: ChannelNoted) -> None:
        self._note_again("channel broken" if event.broken else "channel restored", event.detail)

    def _pages_stop(self, why: str) -> None:
        """Why none comes now; "": they go on. Told once it lasts: so it looks for a moment, too,
        when the destination has them all, and ends its streams.
        """
        if not why or not self._no_pages:
            self._no_pages_since_s = self._now
        self._no_pages = why
        if not why and self.state is _S.POSTCOPY:
            self.error = None

    def _tell_of_pages(self) -> None:
        """The operator has to know: a guest that waits looks well from outside."""
        if self._no_pages and self._now - self._no_pages_since_s >= _TOLD_AFTER_S:
            self.error = f"the guest waits for pages that don't come: {self._no_pages}"

    def _hear_of_its_engines(self, message: Pending) -> None:
        """They end again and again, says the destination, or have done all, and it can't write
        that down. Users see what is said on this side.
        """
        if self.state is _S.POSTCOPY and message.filled:
            self._no_pages = ""
            self.error = (
                f"the guest has all its pages; {self.destination} can't end the migration: "
                f"{message.stuck}"
            )
        elif self._must_serve and self.state is _S.POSTCOPY:
            self._its_engines_end = True
            self._pages_stop(
                f"the engine of {self.destination} ends again and again: {message.stuck}"
            )

    def _hear_prepared(self, message: Prepared) -> None:
        """The destination's engine may be another one than ours talks to."""
        known, self._prepared = self._prepared, message
        self._its_engines_end = False
        if not self._engine_up:
            self._serve()
        elif message != known:
            # The living one goes there: it may be all that holds the pages.
            self._connect(message)

    def _connect(self, ready: Prepared) -> None:
        self._do(
            ConnectEngine(host=ready.host, port=ready.port, secret=ready.secret, post_copy=True)
        )

    def _serve(self) -> None:
        ready = self._prepared
        if ready is None or self._engine_up:
            return
        self._engine_up = True
        self._do(StopTimer(name=TimerName.ENGINE), StartEngine(post_copy=True))
        self._connect(ready)

    # --- the state ---

    def _begin_post_copy(self) -> None:
        self._enter(_S.POSTCOPY)
        self.error = None
        self._newest_token = max(self._newest_token, self.next_token)  # It runs under that.
        self._tell_of_pages()
        self._do(
            StopTimer(name=TimerName.HANDOFF),
            StartTimer(name=TimerName.RETRY, seconds=self.timing.retry_s),
            Journal(state=self.state, durable=False),
        )
        if self._removed:
            self._give_no_more()

    def _peer_removed(self, reason: str) -> None:
        self._removed = reason
        if self.state is _S.POSTCOPY and not self._destination_runs:
            self._give_no_more()

    def _give_no_more(self) -> None:
        """The guest's newest state is there, so the copy here is of no use to anybody else."""
        self._do(StopEngine())
        self._discard(f"{self._removed} before it had every page of the guest that runs there")

    def _in_post_copy(self, event: Event) -> None:
        match event:
            case EngineReported():
                self._note_progress(event)
            case TimerFired(name=TimerName.RETRY) if self._destination_runs:
                self._do(DestroyGuest())
            case TimerFired(name=TimerName.RETRY):
                self._tell_of_pages()
                # A Filled may be lost, an engine be new, or the record have moved on.
                self._send(Inquire())
                self._do(ReadRecord())
                if not self._engine_up:
                    self._do(InspectGuest())  # What nobody serves may be gone.
                self._retry_later()
            case RecordRead() if not self._destination_runs:
                self._look_at(event)
            case GuestReported(kind=DomainEventKind.EXITED):
                self._gone = True
                if not self._engine_up and not self._destination_runs:
                    self._pages_lost()
            case GuestInspected(condition=GuestCondition.GONE) if not (
                self._engine_up or self._destination_runs
            ):
                self._gone = True
                self._pages_lost()
            case GuestDestroyed() if self._destination_runs:
                self._complete()
            case CommandFailed(command="DestroyGuest"):
                self._retry_later()
            case _:
                pass

    def _respawn(self) -> None:
        """The ENGINE timer. A hypervisor that is gone as well leaves nothing to be served."""
        if self._prepared is None:
            self._send(Inquire())
            self._do(StartTimer(name=TimerName.ENGINE, seconds=self.timing.resend_s))
        else:
            self._serve()
        if self.state is _S.POSTCOPY:
            self._do(InspectGuest())

    def _look_at(self, event: RecordRead) -> None:
        record = event.record
        if not event.known or (
            record is not None
            and record.owner == self.destination
            and record.token == self.next_token
            and record.state is OwnershipState.RUNNING
        ):
            return
        if record is None or record.state is not OwnershipState.RUNNING:
            self._discard("the domain was stopped or removed during post-copy")
        else:
            self._discard(f"{record.owner} took the domain over, with token {record.token}")

    def _filled(self, message: Filled) -> None:
        """The destination holds every page, or its guest has ended."""
        if message.token != self.next_token or self._destination_runs:
            return
        if self.state not in _SERVING or self._rollback_token is not None:
            return
        if self.state is not _S.POSTCOPY:
            self._begin_post_copy()
        if not message.lost:
            self._note(
                "pages complete",
                self._entered_at_s,
                self._now,
                f"{message.pages} pages in {message.seconds:.2f} s, "
                f"packed {message.packed_ratio:.2f} : 1, {message.faults} faults: "
                f"median {message.fault_ms_median:.2f} ms, longest {message.fault_ms_max:.1f} ms",
            )
        self._discard(message.lost)

    def _pages_lost(self) -> None:
        self.error = PAGES_GONE
        self._copy_gone = True
        self._send(Lost(reason=PAGES_GONE))
        self._do(StopEngine())
        self._finish(_S.FAILED)
