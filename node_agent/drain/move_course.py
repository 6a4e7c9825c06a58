"""The course of each move in a drain: what is heard of a domain, and what that makes of its move.

    waiting ─► starting ─► moving ─► moved            stop:  waiting ─► stopping ─► stopped
                  └── seeking ◄──┘ (once)                       seeking ◄──► booting ─► moved

What the drain has powered off to start it elsewhere is started on whichever node takes it; where
none does it is failed, and off, which the move says (`Move.powered_off`).

A part of the drain's machine (`machine.py`), which says when moves begin, and what they come to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from migrator.model import MigrationState
from node_agent.drain import vocabulary as v
from node_agent.drain.ledger import Ledger
from node_agent.drain.resources import CancelMode, Drain, Move, MoveState, Operation

FAILURES_MAX: Final = 2
"""The first attempt, and one elsewhere."""
ATTEMPTS_MAX: Final = 10
"""With refusals, which cost nothing (a destination may fill up between plan and move), and with
requests whose fate was unclear (an agent that is restarted)."""
BOOTS_MAX: Final = 3
"""On one node that gives no answer, a second between them; then another one is looked for. Should
the first have started it all the same, the ownership record lets nobody else."""
SILENT_S: Final = 10.0
"""A destination that has been unreachable for so long is given up, before the handoff."""
SOURCE_SILENT_S: Final = 60.0
"""A source likewise: what has become of its domains is unknown then, and stays its own affair."""
_CANCELLABLE: Final = frozenset(
    {MigrationState.CREATED, MigrationState.SETUP, MigrationState.PRECOPY}
)
_SOUGHT: Final = (v.Found, v.NoPlace, v.Looked, v.Unclear)


class MoveCourse(Ledger):
    """See the module."""

    def __init__(self, drain: Drain) -> None:
        super().__init__(drain)
        self._silent_since: dict[str, float] = {}
        self._unheard: Mapping[str, float] = {}
        """As in `vocabulary.Tick`: nothing is concluded from their silence."""
        self._given_up: set[str] = set()
        """Migrations that were cancelled because their destination fell silent."""
        self._looking: set[str] = set()
        self._held: set[str] = set()
        """Starts that wait for their destination to be heard."""
        self._boots: Counter[str] = Counter()
        """On the destination that each has now."""
        self._seeking: str | None = None
        """One at a time: two that are sought for at once could break a rule together."""

    def _sought(self, event: v.Event) -> None:
        """The search that it answers is over, also where its move has ended meanwhile."""
        if isinstance(event, _SOUGHT) and event.domain == self._seeking:
            self._seeking = None

    def _about(self, move: Move, event: v.Event, now: float) -> None:
        match event:
            case v.Looked():
                self._looked(move, event, now)
            case v.Accepted(migration=migration):
                self._put(move, state=MoveState.MOVING, migration=migration.id)
                self._cancel_if_asked(migration.id)
            case v.Refused():
                self._refused(move, event, now)
            case v.NotYet(reason=reason) if move.state is MoveState.STARTING:
                attempts = move.attempts - 1  # A node is listened for; that costs none.
                self._put(move, state=MoveState.WAITING, attempts=attempts, error=reason)
            case v.Unclear(reason=reason):
                self._put(move, error=reason)
                self._looking.discard(move.domain)
                self._look(move)
            case v.Seen():
                self._moves.progress(move, event.migration)
                if event.migration.ended:
                    self._migration_ended(move, event, now)
            case v.PoweredOff():
                if event.forced:
                    text = f"{move.domain} was ended by force: it didn't power itself off in time"
                    self._note(text, now, move.domain)
                self._powered_off(move, now)
            case v.Booted(node=node):
                self._end(move, MoveState.MOVED, now, destination=node)
                self._note(f"{move.domain} was started on {node}", now, move.domain)
            case v.Failed(error=error):
                booting = move.state is MoveState.BOOTING and event.node == move.destination
                if booting or event.node is None:  # Else the node has been given up before.
                    self._failed(move, error, now)
            case v.Found() if move.state is MoveState.SEEKING:
                self._put(
                    move,
                    state=MoveState.WAITING,
                    destination=event.destination,
                    wire_bytes=event.wire_bytes,
                )
                if move.powered_off:
                    self._boots[move.domain] = 0
                    self._boot(self._moves.now(move))
            case v.NoPlace() if move.state is MoveState.SEEKING:
                reason = f"{move.error}; {event.reason}" if move.error else event.reason
                self._fail(move, reason, now)
            case _:
                pass

    def _look(self, move: Move) -> None:
        if move.domain not in self._looking:
            self._looking.add(move.domain)
            self._out.append(v.Look(domain=move.domain, migration=move.migration))

    def _looked(self, move: Move, event: v.Looked, now: float) -> None:
        """What is true decides, whatever this drain has asked for before."""
        self._looking.discard(move.domain)
        migration = event.migration
        if migration is not None and not migration.ended:
            if self._is_astray(move, migration.destination):
                reason = f"migration {migration.id} takes it to {migration.destination} meanwhile"
                self._end(move, MoveState.LEFT, now, error=reason)
                return
            self._put(
                move,
                state=MoveState.MOVING,
                migration=migration.id,
                destination=migration.destination,
            )
            self._out.append(v.Follow(domain=move.domain, migration=migration.id))
            self._cancel_if_asked(migration.id)
        elif event.owner is None:
            self._not_running(move, now)
        elif event.owner == move.source:
            if not move.state.active:
                return
            if move.already:
                why = migration.error if migration is not None and migration.error else "it ended"
                self._plan_again(move, why, now)
            elif migration is not None and migration.id == move.migration:
                self._failed(move, migration.error or f"migration {migration.state}", now)
            elif move.attempts >= ATTEMPTS_MAX:
                self._end(move, MoveState.FAILED, now)
            else:  # It was asked for, and never began.
                self._put(move, state=MoveState.WAITING, migration=None)
        elif event.owner == move.destination:
            self._arrived(move, now)
        elif self._is_astray(move, event.owner):
            reason = f"it was moved on to {event.owner} meanwhile"
            self._end(move, MoveState.LEFT, now, error=reason)
        else:
            self._end(move, MoveState.GONE, now, error=f"it runs on {event.owner} now")

    def _is_astray(self, move: Move, node: str) -> bool:
        """Whether a domain that was to go to one node, for a reason, goes or is elsewhere. One that
        only was to leave its node has left it."""
        return self._base.operation is not Operation.DRAIN and node != move.destination

    def _not_running(self, move: Move, now: float) -> None:
        if move.state in (MoveState.STOPPING, MoveState.BOOTING):
            self._powered_off(move, now)
        elif not move.powered_off:
            self._end(move, MoveState.GONE, now, error="it doesn't run any more")

    def _refused(self, move: Move, event: v.Refused, now: float) -> None:
        self._looking.discard(move.domain)
        if event.elsewhere and move.attempts < ATTEMPTS_MAX:
            self._seek(move, event.reason, now)
        else:
            self._end(move, MoveState.FAILED, now, error=event.reason)
            self._note(f"{move.domain} was left: {event.reason}", now, move.domain)

    def _migration_ended(self, move: Move, event: v.Seen, now: float) -> None:
        migration = event.migration
        if migration.id != move.migration:
            return
        if migration.state is MigrationState.COMPLETED:
            self._arrived(move, now, error=None)
            dark = migration.blackout_ms
            took = f", blackout {dark:.1f} ms" if dark is not None else ""
            self._note(f"{move.domain} is on {migration.destination}{took}", now, move.domain)
        elif migration.state is MigrationState.CANCELLED and migration.id not in self._given_up:
            whose = f" by {migration.cancelled_by}" if migration.cancelled_by else ""
            if move.already:
                self._plan_again(move, f"it was cancelled{whose}", now)
                return
            self._end(move, MoveState.LEFT, now, error=f"its migration was cancelled{whose}")
            self._note(f"the migration of {move.domain} was cancelled{whose}", now, move.domain)
        else:
            if migration.id in self._given_up:
                reason = f"node {move.destination} fell silent"
            else:
                reason = migration.error or f"its migration {migration.state}"
            if move.already:
                self._plan_again(move, reason, now)
            else:
                self._failed(move, reason, now)

    def _arrived(self, move: Move, now: float, **changes: object) -> None:
        """What was leaving already isn't this operation's to undo."""
        if move.already:
            self._end(move, MoveState.GONE, now, error=f"it was on its way to {move.destination}")
        else:
            self._end(move, MoveState.MOVED, now, **changes)

    def _plan_again(self, move: Move, why: str, now: float) -> None:
        """The migration that was under way before has come to nothing: now it is the drain's.

        Its destination may be the right one all the same: that migration had its own terms.
        """
        changes: dict[str, object] = {"already": False, "migration": None, "planned_s": 0.0}
        self._put(move, state=MoveState.SEEKING, error=why, **changes)
        text = f"migration {move.migration} of {move.domain} to {move.destination} came to nothing"
        self._note(f"{text} ({why}): a place is looked for", now, move.domain)

    def _failed(self, move: Move, error: str, now: float) -> None:
        failures = move.failures + 1
        self._put(move, failures=failures)
        may = (
            failures < FAILURES_MAX
            and move.attempts < ATTEMPTS_MAX
            and move.state is not MoveState.STOPPING
            and self._base.cancel is CancelMode.NO
        )
        if may or move.powered_off:  # Which ends where all nodes have been tried.
            self._seek(self._moves.now(move), error, now)
        else:
            self._fail(move, error, now)

    def _fail(self, move: Move, error: str, now: float) -> None:
        if move.powered_off:
            error = f"it is powered off, and was started nowhere else: {error}"
        self._end(move, MoveState.FAILED, now, error=error)
        self._note(f"{move.domain} was left: {error}", now, move.domain)

    def _seek(self, move: Move, error: str, now: float) -> None:
        tried = (*move.tried, move.destination) if move.destination else move.tried
        if self._base.operation is not Operation.DRAIN:
            # It was to go to one node, for a reason; any other would be a move without one.
            self._end(move, MoveState.LEFT, now, error=error)
            self._note(f"{move.domain} was left: {error}", now, move.domain)
            return
        self._put(move, state=MoveState.SEEKING, tried=tried, error=error, migration=None)
        self._note(
            f"{move.domain} didn't get to {move.destination}: {error}; looking elsewhere",
            now,
            move.domain,
        )

    def _powered_off(self, move: Move, now: float) -> None:
        if move.destination is None:
            self._end(move, MoveState.STOPPED, now)
            self._note(f"{move.domain} is powered off until the undrain", now, move.domain)
        elif self._boots[move.domain] >= BOOTS_MAX:
            self._failed(move, move.error or f"{move.destination} gave no answer", now)
        else:
            self._put(move, powered_off=True)
            self._boot(self._moves.now(move))

    def _boot(self, move: Move) -> None:
        self._put(move, state=MoveState.BOOTING)
        if move.destination in self._unheard:
            self._held.add(move.domain)
            return
        self._boots[move.domain] += 1
        self._out.append(v.Boot(domain=move.domain, node=move.destination or ""))

    def _boot_held(self) -> None:
        """What waited for its destination to be heard, or called silent."""
        for move in [self._moves.must(each) for each in sorted(self._held)]:
            if move.state is MoveState.BOOTING and move.destination in self._unheard:
                continue
            self._held.discard(move.domain)
            if move.state is MoveState.BOOTING:
                self._boot(move)

    def _watch_destinations(self, unreachable: frozenset[str], now: float) -> None:
        for name in list(self._silent_since):
            if name not in unreachable:
                del self._silent_since[name]
        for name in unreachable:
            self._silent_since.setdefault(name, now)
        for move in self._moves.all():
            silent = self._silent_for(move.destination or "", now) >= SILENT_S
            if silent and move.state is MoveState.BOOTING:
                self._failed(move, f"node {move.destination} fell silent", now)
            source_silent = self._silent_for(move.source, now) >= SOURCE_SILENT_S
            if source_silent and move.state is MoveState.WAITING:
                reason = f"node {move.source} is silent; its move was not begun"
                self._end(move, MoveState.FAILED, now, error=reason)
            if move.state is not MoveState.MOVING or move.migration is None:
                continue
            if source_silent:
                reason = f"node {move.source} is silent; what has become of it is unknown"
                self._end(move, MoveState.FAILED, now, error=reason)
                continue
            phase = self._moves.phase(move.domain)
            if silent and phase in _CANCELLABLE and move.migration not in self._given_up:
                self._given_up.add(move.migration)
                because = f"because {move.destination} fell silent"
                self._out.append(v.CancelMigration(migration=move.migration, because=because))

    def _silent_for(self, node: str, now: float) -> float:
        """Seconds, at least; -1: it isn't known to be silent."""
        since = self._silent_since.get(node)
        return -1.0 if since is None else now - since

    def _silences(self, now: float) -> list[str]:
        """Of the nodes that moves wait for, in words."""
        rest = [move for move in self._moves.all() if not move.state.ended]
        found: dict[str, str] = {}
        for move in rest:
            for node, given_s in (
                (move.source, SOURCE_SILENT_S),
                (move.destination or "", SILENT_S),
            ):
                silent_s = self._silent_for(node, now)
                if silent_s >= 0.0:
                    still_s = max(given_s - silent_s, 0.0)
                    found[node] = f"{node}, which is silent (given up in {still_s:.0f} s)"
        return list(found.values())

    def _to_be_heard(self) -> list[str]:
        """The same, of those whose silence says nothing yet."""
        if not self._unheard:
            return []
        names, still_s = ", ".join(sorted(self._unheard)), max(self._unheard.values())
        return [f"{names} to be heard after an outage (for at most {still_s:.0f} s more)"]

    def _cancel_if_asked(self, migration: str) -> None:
        if self._base.cancel is CancelMode.ABORT:
            because = f"which {self._base.cancelled_by or 'somebody'} cancelled"
            self._out.append(v.CancelMigration(migration=migration, because=because))
