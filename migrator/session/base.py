"""What the sessions of both sides share: the state, the timeline, and how commands are given.

A session is a pure machine: `handle(event, now)` returns the commands to perform. It does no I/O,
and reads no clock: `now` is the runner's (seconds, its host's wall clock, never going back).

A message, timer or report may come late, when the session is past it. A session ignores what its
state has no use for; that isn't an error, it's how networks are. What is an error is a transition
that the table doesn't have (LocalProtocolError), or anything but a late event after the end.
"""

from __future__ import annotations

import abc
from typing import Final

from migrator.model import (
    ENDED,
    MigrationRequest,
    MigrationState,
    NodeName,
    OwnershipRecord,
    OwnershipState,
    Phase,
    Role,
)
from migrator.ports import Struct
from migrator.session.messages import SessionMessage
from migrator.session.vocabulary import (
    Command,
    Event,
    Finish,
    Journal,
    ReadRecord,
    RecordRead,
    RecordSwapped,
    Send,
    StartTimer,
    StopTimer,
    TimerName,
)
from migrator.states import check_transition

_TOLD_MAX: Final = 10
"""Entries of one name, of what may happen again and again."""


class Timing(Struct, frozen=True, kw_only=True):
    """How long a session waits, in seconds. Every wait of a session is one of these.

    The simulation shortens none of them: its clock is free.
    """

    setup_s: float = 30.0
    """For the destination to get ready."""
    resend_s: float = 1.0
    """Before a message that wasn't answered is sent again."""
    peer_s: float = 45.0
    """That pre-copy bears an unreachable peer: half a minute's silence, and what it takes to find
    one another again."""
    inquire_s: float = 15.0
    """Between questions whether the other side has given up: its word may be lost."""
    stands_s: float = 60.0
    """That an iteration may stand still once the request's time is over: longer than a link may be
    away. Its engine hangs then."""
    depart_s: float = 1.5
    """That a switchover's network part may take before the pause: the guest runs on meanwhile."""
    switchover_s: float = 2.0
    """From the pause to the sent device state; then the source takes the guest back. A guest that
    its hypervisor has stopped by itself waits as long for leave."""
    commit_s: float = 1.0
    """That the source waits for Running before it asks the record."""
    retry_s: float = 0.5
    """Between tries in recovery; doubles up to retry_s_max."""
    retry_s_max: float = 5.0
    respawn_s: float = 0.1
    """Before an engine that died in post-copy gets a successor: the guest may wait for it."""
    lasting_s: float = 1.0
    """An engine that lived so long in post-copy has worked: its successor comes as soon."""
    hand_back_s: float = 15.0
    """That a destination which has won the guest tries to run it, while the source could have it
    back: a guest stands still meanwhile. Longer than most storage takes to fail over."""
    settle_s: float = 5.0
    """That a hypervisor whose engine is lost may take to load what it was given, or to end."""
    abandoned_s: float = 60.0
    """That a destination keeps its copy without any word from the source."""
    older_store_s: float = 3600.0
    """That a record is not believed which is older than what is known of it: who has restored the
    wrong copy of a store puts that right by then, or never will."""


_UNKNOWN_AT_ONCE: Final = 3
"""Writes of unknown outcome, one after the other, after which the record is read at once."""


class Session(abc.ABC):
    """One side of one migration. See the module."""

    role: Role

    def __init__(
        self,
        *,
        migration_id: str,
        domain: str,
        source: NodeName,
        destination: NodeName,
        token: int,
        request: MigrationRequest,
        created_at_s: float,
        timing: Timing,
    ) -> None:
        self.migration_id = migration_id
        self.domain = domain
        self.source = source
        self.destination = destination
        self.token = token
        """The source's token at the start. A handoff, or a rollback, wins token + 1."""
        self.request = request
        self.created_at_s = created_at_s
        self.timing = timing
        self.state = MigrationState.CREATED
        self.error: str | None = None
        self.timeline: list[Phase] = []
        self.ended_at_s: float | None = None
        self._commands: list[Command] = []
        self._now = 0.0
        self._entered_at_s = 0.0
        self._retries = 0
        self._newest_token = token
        """That the record is known to have had."""
        self._older_since_s: float | None = None
        """Since when the store has an older one."""
        self._error_before: str | None = None
        self._unknown_swaps = 0
        """Writes whose outcome is unknown, since one was known."""
        self._respawns = 0
        """Engines of a post-copy that died at once, one after the other."""
        self._engine_since_s: float | None = None
        """Since when the one that there is has been at work."""
        self._state_detail = ""
        self._part = ""
        """Of the state that we are in, where the timeline tells its parts."""

    # --- the machine ---

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event; return what to do. `now` never goes back."""
        self._now = max(now, self._now)
        if not self._entered_at_s:
            self._entered_at_s = self._now
        self._commands = []
        if isinstance(event, RecordRead):
            event = self._believed(event)
        if self.state in ENDED:
            self._handle_after_end(event)
        else:
            self._handle(event)
        commands, self._commands = self._commands, []
        return commands

    @abc.abstractmethod
    def _handle(self, event: Event) -> None: ...

    @abc.abstractmethod
    def _handle_after_end(self, event: Event) -> None: ...

    # --- the parts that handlers are made of ---

    def _do(self, *commands: Command) -> None:
        self._commands.extend(commands)

    def _send(self, message: SessionMessage) -> None:
        self._do(Send(message=message))

    def _enter(self, state: MigrationState, detail: str = "") -> None:
        check_transition(self.role, self.state, state)
        self._begin_part("", detail)
        self.state = state
        self._retries = 0

    def _begin_part(self, part: str, detail: str = "") -> None:
        """The timeline's entry of what was until now ends here."""
        name = self._part or self.state.value
        self._note(name, self._entered_at_s, self._now, self._state_detail)
        self._entered_at_s = self._now
        self._part, self._state_detail = part, detail

    def _note(self, name: str, started_at_s: float, ended_at_s: float, detail: str = "") -> None:
        """Add one entry to the timeline."""
        self.timeline.append(
            Phase(
                name=name,
                started_at_s=started_at_s,
                seconds=max(ended_at_s - started_at_s, 0.0),
                detail=detail,
            )
        )

    def _note_again(self, name: str, detail: str) -> None:
        """What may happen again and again: from `_TOLD_MAX` on the last entry is what is told anew.

        A timeline is kept in the store, and a link may be down for days.
        """
        found = [at for at, phase in enumerate(self.timeline) if phase.name == name]
        if len(found) < _TOLD_MAX:
            self._note(name, self._now, self._now, detail)
            return
        last = self.timeline.pop(found[-1])
        self._note(name, last.started_at_s, self._now, f"again and again, the last time: {detail}")

    def _journal(self) -> None:
        self._do(Journal(state=self.state))

    def _retry_later(self) -> None:
        """Start the RETRY timer, with a growing gap."""
        gap = min(self.timing.retry_s * 2.0**self._retries, self.timing.retry_s_max)
        self._retries = min(self._retries + 1, 16)
        self._do(StartTimer(name=TimerName.RETRY, seconds=gap))

    def _engine_works(self) -> None:
        """In post-copy: it listens, or is connected."""
        if self._engine_since_s is None:
            self._engine_since_s = self._now

    def _respawn_later(self) -> None:
        """Start the ENGINE timer: soon after an engine that worked, ever later after others. What
        keeps one from working (no memory is left, say) may show only when it is at work.
        """
        since_s, self._engine_since_s = self._engine_since_s, None
        if since_s is not None and self._now - since_s >= self.timing.lasting_s:
            self._respawns = 0
        gap = min(self.timing.respawn_s * 2.0**self._respawns, self.timing.retry_s_max)
        self._respawns = min(self._respawns + 1, 16)
        self._do(StartTimer(name=TimerName.ENGINE, seconds=gap))

    def _finish(self, state: MigrationState, error: str | None = None) -> None:
        self.error = error if error is not None else self.error
        self._enter(state)
        self.ended_at_s = self._now
        self._do(*(StopTimer(name=name) for name in TimerName))
        self._do(Finish(state=state, error=self.error))

    @property
    def over(self) -> bool:
        """Nothing that is still to be done here changes how it went."""
        return self.state in ENDED

    # --- the record ---

    def _believed(self, event: RecordRead) -> RecordRead:
        """Tokens only grow. So a record with an older one than it is known to have had, or none at
        all, tells of the store, which was restored from an older copy, was begun anew or is another
        cluster's, and not of the guest: it counts as no answer, for `older_store_s`.

        A domain that was deleted has no record either. Then what there is here is stale, and waits.
        """
        record, newest = event.record, max(self._newest_token, self.token)
        older = event.known and (record is None or record.token < newest)
        if not older:
            if record is not None:
                self._newest_token = record.token
            if self._older_since_s is not None:
                self._older_since_s, self.error = None, self._error_before
            return event
        if self._older_since_s is None:
            self._older_since_s, self._error_before = self._now, self.error
        if self._now - self._older_since_s >= self.timing.older_store_s:
            return event
        has = f"no record of domain {self.domain}"
        if record is not None:
            has = f"domain {self.domain} under token {record.token}"
        self.error = (
            f"the store has {has}, and had it under {newest}: it was restored from an older copy, "
            "was begun anew or is another cluster's; what there is of the guest is kept as it is"
        )
        return RecordRead(known=False)

    def _look_after_swap(self, event: RecordSwapped) -> None:
        """It wasn't won, for all that is known: what is true now?

        One that answers reads and refuses writes (it is full) isn't asked without a pause.
        """
        self._unknown_swaps = self._unknown_swaps + 1 if event.won is None else 0
        if self._unknown_swaps > _UNKNOWN_AT_ONCE:
            self._retry_later()
        else:
            self._do(ReadRecord())

    @property
    def record_before(self) -> OwnershipRecord:
        """The ownership record as the source held it when the migration began."""
        return OwnershipRecord(
            domain=self.domain,
            token=self.token,
            owner=self.source,
            state=OwnershipState.RUNNING,
        )

    @property
    def next_token(self) -> int:
        return self.token + 1
