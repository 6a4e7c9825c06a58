"""One drain's decisions, as a pure machine: events in, commands out, `now` an argument.

    machine = DrainMachine(drain)
    commands = machine.handle(event, now_s)     machine.drain is the resource as it must be saved
                                                before any of the commands is performed

`drain` is all that it remembers across a crash; a new coordinator makes a new machine of the saved
resource, says `Took`, and every move that was under way is looked at before anything is done again.

A move:  waiting ─► starting ─► moving ─► moved            stop:  waiting ─► stopping ─► stopped
                       └── seeking ◄──┘ (once)                                  └─► booting ─► moved
The whole: running ─► checking ─► done | partial;  cancelling ─► cancelled
"""

from __future__ import annotations

from typing import Final

from migrator.model import MaintenancePolicy, MigrationState, NodeState
from node_agent.drain import vocabulary as v
from node_agent.drain.ledger import Ledger
from node_agent.drain.resources import (
    CancelMode,
    Drain,
    DrainState,
    Move,
    MoveState,
    Operation,
)
from node_agent.hooks.model import HookPoint

FAILURES_MAX: Final = 2
"""The first attempt, and one elsewhere."""
ATTEMPTS_MAX: Final = 10
"""With refusals, which cost nothing (a destination may fill up between plan and move), and with
requests whose fate was unclear (an agent that is restarted)."""
SILENT_S: Final = 10.0
"""A destination that has been unreachable for so long is given up, before the handoff."""
SOURCE_SILENT_S: Final = 60.0
"""A source likewise: what has become of its domains is unknown then, and stays its own affair."""
CHECK_EVERY_S: Final = 1.0
CHECK_PATIENCE_S: Final = 60.0
"""How long processes may need to go after the last move, or a silent node to answer."""
_CANCELLABLE: Final = frozenset(
    {MigrationState.CREATED, MigrationState.SETUP, MigrationState.PRECOPY}
)


class DrainMachine(Ledger):
    """See the module."""

    def __init__(self, drain: Drain) -> None:
        super().__init__(drain)
        self._silent_since: dict[str, float] = {}
        self._given_up: set[str] = set()
        """Migrations that were cancelled because their destination fell silent."""
        self._looking: set[str] = set()
        self._seeking: str | None = None
        """One at a time: two that are sought for at once could break a rule together."""
        self._check_at: float | None = None
        self._checking_since: float | None = None
        self._hooking: HookPoint | None = None

    def handle(self, event: v.Event, now: float) -> list[v.Command]:
        """What has to be done now. Nothing in a drain that has ended."""
        if self._base.ended:
            return []
        self._out = []
        self._react(event, now)
        if not self._base.ended:
            self._go_on(now)
        return self._out

    def _react(self, event: v.Event, now: float) -> None:
        match event:
            case v.Took():
                self._took(now)
            case v.Tick():
                self._watch_destinations(event.unreachable, now)
            case v.HookDone():
                self._hook_done(event, now)
            case v.CancelAsked():
                self._cancel(event.mode, now, event.by)
            case v.Checked():
                self._checked(event, now)
            case v.CheckFailed():
                self._not_checked(event.reason, now)
            case _:
                move = self._moves.get(getattr(event, "domain", ""))
                if move is not None and not move.state.ended:
                    self._about(move, event, now)

    def _about(self, move: Move, event: v.Event, now: float) -> None:
        if move.domain == self._seeking and isinstance(event, _SOUGHT):
            self._seeking = None
        match event:
            case v.Looked():
                self._looked(move, event, now)
            case v.Accepted(migration=migration):
                self._put(move, state=MoveState.MOVING, migration=migration.id)
                self._cancel_if_asked(migration.id)
            case v.Refused():
                self._refused(move, event, now)
            case v.Unclear(reason=reason):
                self._put(move, error=reason)
                self._looking.discard(move.domain)
                self._look(move)
            case v.Seen():
                self._moves.progress(move, event.migration)
                if event.migration.ended:
                    self._migration_ended(move, event, now)
            case v.PoweredOff():
                self._powered_off(move, now)
            case v.Booted(node=node):
                self._end(move, MoveState.MOVED, now, destination=node)
                self._note(f"{move.domain} was started on {node}", now, move.domain)
            case v.Failed(error=error):
                self._failed(move, error, now)
            case v.Found() if move.state is MoveState.SEEKING:
                self._put(
                    move,
                    state=MoveState.WAITING,
                    destination=event.destination,
                    wire_bytes=event.wire_bytes,
                )
            case v.NoPlace() if move.state is MoveState.SEEKING:
                reason = f"{move.error}; {event.reason}" if move.error else event.reason
                self._end(move, MoveState.FAILED, now, error=reason)
                self._note(f"{move.domain} was left: {reason}", now, move.domain)
            case _:
                pass

    # --- the beginning, and after a crash ----------------------------------------------------

    def _took(self, now: float) -> None:
        if self._base.operation is Operation.DRAIN and not self._base.hooked:
            self._hook(HookPoint.NODE_DRAINING)
        for move in self._moves.all():
            if move.state.active:
                self._look(move)
        base, step = self._base, "has begun" if self._base.term <= 1 else "goes on"
        self._note(
            f"{base.operation}{self._of_node} {step}, coordinated by {base.coordinator}", now
        )

    def _look(self, move: Move) -> None:
        if move.domain not in self._looking:
            self._looking.add(move.domain)
            self._out.append(v.Look(domain=move.domain, migration=move.migration))

    def _looked(self, move: Move, event: v.Looked, now: float) -> None:
        """What is true decides, whatever this drain has asked for before."""
        self._looking.discard(move.domain)
        migration = event.migration
        if migration is not None and not migration.ended:
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
            if migration is not None and migration.id == move.migration:
                self._failed(move, migration.error or f"migration {migration.state}", now)
            elif move.attempts >= ATTEMPTS_MAX:
                self._end(move, MoveState.FAILED, now)
            else:  # It was asked for, and never began.
                self._put(move, state=MoveState.WAITING, migration=None)
        elif event.owner == move.destination:
            self._end(move, MoveState.MOVED, now)
        else:
            self._end(move, MoveState.GONE, now, error=f"it runs on {event.owner} now")

    def _not_running(self, move: Move, now: float) -> None:
        if move.state in (MoveState.STOPPING, MoveState.BOOTING):
            self._powered_off(move, now)
        else:
            self._end(move, MoveState.GONE, now, error="it doesn't run any more")

    # --- one move ----------------------------------------------------------------------------

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
            self._end(move, MoveState.MOVED, now, error=None)
            dark = migration.blackout_ms
            took = f", blackout {dark:.1f} ms" if dark is not None else ""
            self._note(f"{move.domain} is on {migration.destination}{took}", now, move.domain)
        elif migration.state is MigrationState.CANCELLED and migration.id not in self._given_up:
            whose = f" by {migration.cancelled_by}" if migration.cancelled_by else ""
            self._end(move, MoveState.LEFT, now, error=f"its migration was cancelled{whose}")
            self._note(f"the migration of {move.domain} was cancelled{whose}", now, move.domain)
        else:
            if migration.id in self._given_up:
                reason = f"node {move.destination} fell silent"
            else:
                reason = migration.error or f"its migration {migration.state}"
            self._failed(move, reason, now)

    def _failed(self, move: Move, error: str, now: float) -> None:
        failures = move.failures + 1
        self._put(move, failures=failures)
        if move.state is MoveState.STOPPING or self._base.cancel is not CancelMode.NO:
            self._end(move, MoveState.FAILED, now, error=error)
        elif failures < FAILURES_MAX and move.attempts < ATTEMPTS_MAX:
            self._seek(move, error, now)
            return
        else:
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
            return
        self._put(move, state=MoveState.BOOTING)
        self._out.append(v.Boot(domain=move.domain, node=move.destination))

    def _watch_destinations(self, unreachable: frozenset[str], now: float) -> None:
        for name in list(self._silent_since):
            if name not in unreachable:
                del self._silent_since[name]
        for name in unreachable:
            self._silent_since.setdefault(name, now)
        for move in self._moves.all():
            if move.state is not MoveState.MOVING or move.migration is None:
                continue
            since = self._silent_since.get(move.source)
            if since is not None and now - since >= SOURCE_SILENT_S:
                reason = f"node {move.source} is silent; what has become of it is unknown"
                self._end(move, MoveState.FAILED, now, error=reason)
                continue
            since = self._silent_since.get(move.destination or "")
            silent = since is not None and now - since >= SILENT_S
            phase = self._moves.phase(move.domain)
            if silent and phase in _CANCELLABLE and move.migration not in self._given_up:
                self._given_up.add(move.migration)
                because = f"because {move.destination} fell silent"
                self._out.append(v.CancelMigration(migration=move.migration, because=because))

    # --- the whole ---------------------------------------------------------------------------

    def _cancel(self, mode: CancelMode, now: float, by: str = "") -> None:
        already = self._base.state is DrainState.CANCELLING
        stronger = mode is CancelMode.ABORT and self._base.cancel is CancelMode.LET_END
        if mode is CancelMode.NO or (already and not stronger):
            return
        self._set(state=DrainState.CANCELLING, cancel=mode, cancelled_by=by)
        whose = f"cancelled by {by}" if by else "cancelled"
        self._note(f"{whose}; moves under way {_CANCEL_TOLD[mode]}", now)
        for move in self._moves.all():
            if move.state is MoveState.MOVING and move.migration:
                self._cancel_if_asked(move.migration)

    def _seek_next(self) -> None:
        for move in self._moves.all():
            if self._seeking is None and move.state is MoveState.SEEKING:
                self._seeking = move.domain
                self._out.append(v.Seek(domain=move.domain, tried=move.tried))

    def _leave_waiting(self, reason: str, now: float) -> None:
        for move in self._moves.all():
            if move.state in (MoveState.WAITING, MoveState.SEEKING):
                self._end(move, MoveState.LEFT, now, error=reason)

    def _cancel_if_asked(self, migration: str) -> None:
        if self._base.cancel is CancelMode.ABORT:
            because = f"which {self._base.cancelled_by or 'somebody'} cancelled"
            self._out.append(v.CancelMigration(migration=migration, because=because))

    def _go_on(self, now: float) -> None:
        """Begin what may begin, share the links anew, see whether this is the end."""
        if self._hooking is not None:
            return
        if self._base.state is DrainState.RUNNING:
            self._start_moves(now)
            self._seek_next()
        elif self._base.state is DrainState.CANCELLING:
            self._leave_waiting("the drain was cancelled", now)
        self._share()
        if any(not move.state.ended for move in self._moves.all()):
            return
        if self._base.state is DrainState.CANCELLING:
            self._finish(DrainState.CANCELLED, NodeState.READY, now)
        elif self._base.operation is not Operation.DRAIN:
            moved = all(each.state in _AS_PLANNED for each in self._moves.all())
            self._finish(DrainState.DONE if moved else DrainState.PARTIAL, NodeState.READY, now)
        elif self._base.state is DrainState.RUNNING:
            self._set(state=DrainState.CHECKING)
            self._checking_since = now
            self._out.append(v.Check())
        elif self._check_at is not None and now >= self._check_at:
            self._check_at = None
            self._out.append(v.Check())
        elif self._checking_since is None:  # Taken over in the midst of it.
            self._checking_since = now
            self._out.append(v.Check())

    def _start_moves(self, now: float) -> None:
        if now - self._base.started_at_s > self._base.timeout_s:
            self._leave_waiting(f"the time of {self._base.timeout_s:g} s was over", now)
            return
        while True:
            move = self._moves.next_to_start(self._base.parallel, self._base.lanes)
            if move is None:
                return
            stop = move.policy is not MaintenancePolicy.LIVE
            self._put(
                move,
                state=MoveState.STOPPING if stop else MoveState.STARTING,
                attempts=move.attempts + 1,
                started_at_s=now,
                migration=None,
            )
            if stop:
                self._out.append(v.PowerOff(domain=move.domain))
                continue
            share = self._moves.shares(self._base.links).get(move.domain)
            self._put(self._moves.now(move), bandwidth_bytes_per_s=share)
            self._out.append(
                v.Begin(
                    domain=move.domain,
                    destination=move.destination or "",
                    bandwidth_bytes_per_s=share,
                )
            )

    def _share(self) -> None:
        """Tell each migration its share of the links, where that has changed."""
        for domain, share in self._moves.shares(self._base.links).items():
            move = self._moves.get(domain)
            if move is None or move.state is not MoveState.MOVING or move.migration is None:
                continue
            before = move.bandwidth_bytes_per_s
            if before is not None and abs(share - before) <= _SHARE_CHANGE * before:
                continue
            self._put(move, bandwidth_bytes_per_s=share)
            self._out.append(v.Limit(migration=move.migration, bandwidth_bytes_per_s=share))

    def _checked(self, event: v.Checked, now: float) -> None:
        if self._base.state is not DrainState.CHECKING:
            return
        self._set(boot_id=event.boot_id)
        expected = {
            move.domain
            for move in self._moves.all()
            if move.state in (MoveState.FAILED, MoveState.LEFT)
        } | set(self._base.exclude)
        new = [name for name in event.owned if name not in expected]
        if new:
            self._set(state=DrainState.RUNNING)
            for name in new:
                self._moves.add(Move(domain=name, source=self._base.node, destination=None))
                self._put(self._moves.must(name), state=MoveState.SEEKING)
                self._note(f"{name} has come in the meantime; it moves, too", now, name)
            return
        left = sorted({*event.owned, *event.processes})
        if event.incoming:
            self._not_checked(f"on their way there: {', '.join(event.incoming)}", now)
        elif not left:
            self._hook(HookPoint.NODE_DRAINED)
        elif set(left) <= set(event.owned):
            self._partial(f"left on {self._base.node}: {', '.join(left)}", now)
        else:
            extra = sorted(set(event.processes) - set(event.owned))
            self._not_checked(f"processes are still there: {', '.join(extra)}", now)

    def _not_checked(self, reason: str, now: float) -> None:
        if self._base.state is not DrainState.CHECKING:
            return
        since = now if self._checking_since is None else self._checking_since
        if now - since > CHECK_PATIENCE_S:
            self._partial(f"{self._base.node} can't be called empty: {reason}", now)
        else:
            self._check_at = now + CHECK_EVERY_S

    def _partial(self, error: str, now: float) -> None:
        self._set(error=error)
        self._finish(DrainState.PARTIAL, NodeState.CORDONED, now)

    def _hook(self, point: HookPoint) -> None:
        self._hooking = point
        self._out.append(v.RunHook(point=point))

    def _hook_done(self, event: v.HookDone, now: float) -> None:
        if self._hooking is not event.point:
            return
        self._hooking = None
        if event.point is HookPoint.NODE_DRAINED:
            if event.error is not None:
                self._note(f"hook {event.point}: {event.error}", now)
            self._finish(DrainState.DONE, NodeState.DRAINED, now)
            return
        self._set(hooked=True)
        if event.error is not None:
            self._note(f"hook {event.point}: {event.error}", now)
            self._set(error=event.error)
            self._cancel(CancelMode.LET_END, now)

    def _finish(self, state: DrainState, node_state: NodeState, now: float) -> None:
        self._set(state=state, ended_at_s=now)
        if self._base.node:
            self._out.append(v.SetCordon(state=node_state))
        took = f"{now - self._base.started_at_s:.1f} s"
        why = f": {self._base.error}" if self._base.error else ""
        self._note(f"{self._base.operation}{self._of_node} is {state} after {took}{why}", now)

    @property
    def _of_node(self) -> str:
        return f" of {self._base.node}" if self._base.node else ""  # A balancing has none.


_SOUGHT: Final = (v.Found, v.NoPlace, v.Looked, v.Unclear)
_SHARE_CHANGE: Final = 0.05
_AS_PLANNED: Final = frozenset({MoveState.MOVED, MoveState.STOPPED, MoveState.GONE})
_CANCEL_TOLD: Final = {CancelMode.LET_END: "go on to their end", CancelMode.ABORT: "are cancelled"}
