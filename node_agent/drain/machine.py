"""One drain's decisions, as a pure machine: events in, commands out, `now` an argument.

    machine = DrainMachine(drain)
    commands = machine.handle(event, now_s)     machine.drain is the resource as it must be saved
                                                before any of the commands is performed

`drain` is all that it remembers across a crash; a new coordinator makes a new machine of the saved
resource, says `Took`, and every move that was under way is looked at before anything is done again.

What is heard of a domain, and what that makes of its move, is in `move_course.py`. The whole:

    running ─► checking ─► done | partial;  cancelling ─► cancelled
"""

from __future__ import annotations

from typing import Final

from migrator.model import MaintenancePolicy, NodeState
from node_agent.drain import vocabulary as v
from node_agent.drain.cordons import told_by
from node_agent.drain.move_course import MoveCourse
from node_agent.drain.resources import (
    CancelMode,
    Drain,
    DrainState,
    Move,
    MoveState,
    Operation,
    took_text,
)
from node_agent.hooks.model import HookPoint

CHECK_EVERY_S: Final = 0.3
CHECK_PATIENCE_S: Final = 60.0
"""How long processes may need to go after the last move, or a silent node to answer."""


class DrainMachine(MoveCourse):
    """See the module."""

    def __init__(self, drain: Drain) -> None:
        super().__init__(drain)
        self._check_at: float | None = None
        self._checking_since: float | None = None
        self._check_said = ""
        self._coming = False
        self._hooking: HookPoint | None = None
        self._hooking_since = 0.0

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
            case v.Took(unheard=unheard):
                self._unheard = unheard
                self._took(now)
            case v.Tick():
                self._unheard = event.unheard
                self._boot_held()
                self._moves.others = event.others
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
                self._sought(event)
                move = self._moves.get(getattr(event, "domain", ""))
                if move is not None and not move.state.ended:
                    self._about(move, event, now)

    def waits_for(self, now: float) -> str:
        """What it waits for beside its moves, for whoever looks at it; "": nothing."""
        base, found = self._base, []
        if base.ended:
            return ""
        if self._hooking is not None:
            found.append(f"the hooks of {self._hooking}, for {now - self._hooking_since:.0f} s now")
        if base.state is DrainState.CHECKING and self._hooking is None:
            since = now if self._checking_since is None else self._checking_since
            still_s = max(CHECK_PATIENCE_S - (now - since), 0.0)
            said = f": {self._check_said}"
            if not self._coming:
                said += f", for at most {still_s:.0f} s more"
            found.append(f"{base.node} to be empty{said if self._check_said else ''}")
        if self._seeking is not None:
            found.append(f"another place for {self._seeking}")
        already = [m for m in self._moves.all() if m.already and m.state.active]
        found += [_on_its_way(move) for move in already[:_ALREADY_TOLD_MAX]]
        if len(already) > _ALREADY_TOLD_MAX:
            found.append(f"{len(already) - _ALREADY_TOLD_MAX} more that were leaving already")
        found += self._moves.unheard()
        found += self._silences(now)
        found += self._to_be_heard()
        if base.cancel is CancelMode.LET_END and any(m.state.active for m in self._moves.all()):
            found.append(f"moves under way (`ferry drains cancel {base.id} --abort-moves` ends it)")
        return "; ".join(found)

    # --- the beginning, and after a crash ----------------------------------------------------

    def _took(self, now: float) -> None:
        drain = self._base.operation is Operation.DRAIN
        if drain and self._base.state is not DrainState.CANCELLING:
            self._out.append(v.SetCordon(state=NodeState.DRAINING))
        if drain and not self._base.hooked:
            self._hook(HookPoint.NODE_DRAINING, now)
        for move in self._moves.all():
            if move.state.active:
                self._look(move)
        base, step, asked = self._base, "goes on", ""
        if base.term <= 1:
            step = "has begun"
            asked = f", asked for{told_by(base.asked_by, base.reason)}" if base.asked_by else ""
        text = f"{base.operation}{self._of_node} {step}, coordinated by {base.coordinator}{asked}"
        self._note(text, now)
        for move in self._moves.all():
            if move.already and move.state.active and base.term <= 1:
                self._note(f"{_on_its_way(move)}: that is waited for", now, move.domain)

    # --- the whole ---------------------------------------------------------------------------

    def _cancel(self, mode: CancelMode, now: float, by: str = "") -> None:
        already = self._base.state is DrainState.CANCELLING
        stronger = mode is CancelMode.ABORT and self._base.cancel is CancelMode.LET_END
        over = self._hooking in (HookPoint.NODE_DRAINED, HookPoint.NODE_OPENED)
        if mode is CancelMode.NO or (already and not stronger) or over:
            return
        self._set(state=DrainState.CANCELLING, cancel=mode, cancelled_by=by)
        if self._hooking is HookPoint.NODE_DRAINING:
            self._hooking = None  # Its answer, whether anything may begin, matters no more.
        whose = f"cancelled by {by}" if by else "cancelled"
        self._note(f"{whose}; moves under way {_CANCEL_TOLD[mode]}", now)
        for move in self._moves.all():
            if move.already and move.state.active:
                error = f"{whose}; its migration {move.migration}, which isn't the drain's, goes on"
                self._end(move, MoveState.LEFT, now, error=error)
            elif move.state is MoveState.MOVING and move.migration:
                self._cancel_if_asked(move.migration)

    def _seek_next(self) -> None:
        if self._unheard:  # That no node can take it might be said too soon.
            return
        for move in self._moves.all():
            if self._seeking is None and move.state is MoveState.SEEKING:
                self._seeking = move.domain
                self._out.append(v.Seek(domain=move.domain, tried=move.tried))

    def _leave_waiting(self, reason: str, now: float) -> None:
        for move in self._moves.all():
            open_end = move.state is MoveState.SEEKING and not move.powered_off
            if move.state is MoveState.WAITING or open_end:
                self._end(move, MoveState.LEFT, now, error=reason)

    def _go_on(self, now: float) -> None:
        """Begin what may begin, share the links anew, see whether this is the end."""
        if self._hooking is not None:
            return
        if self._base.state is DrainState.RUNNING:
            self._start_moves(now)
            self._seek_next()
        elif self._base.state is DrainState.CANCELLING:
            self._leave_waiting(f"the {self._base.operation} was cancelled", now)
            self._seek_next()  # For what is powered off by now.
        self._share()
        if any(not move.state.ended for move in self._moves.all()):
            return
        if self._base.state is DrainState.CANCELLING or self._base.operation is not Operation.DRAIN:
            self._open_node(now)
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
            move = self._moves.next_to_start(
                self._base.parallel, self._base.lanes, self._silent_since, self._unheard
            )
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
            if move.already:  # Its cap is the affair of whoever asked for it.
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
        self._coming = bool(event.incoming)
        if event.incoming:
            if now - self._base.started_at_s <= self._base.timeout_s:
                self._checking_since = now  # They have a time of their own, and move on then.
            self._not_checked(f"on their way there: {', '.join(event.incoming)}", now)
        elif not left:
            self._hook(HookPoint.NODE_DRAINED, now)
        elif set(left) <= set(event.owned):
            self._partial(f"left on {self._base.node}: {', '.join(left)}", now)
        else:
            extra = sorted(set(event.processes) - set(event.owned))
            self._not_checked(f"processes are still there: {', '.join(extra)}", now)

    def _not_checked(self, reason: str, now: float) -> None:
        if self._base.state is not DrainState.CHECKING:
            return
        self._check_said = reason
        since = now if self._checking_since is None else self._checking_since
        if now - since > CHECK_PATIENCE_S:
            self._partial(f"{self._base.node} can't be called empty: {reason}", now)
        else:
            self._check_at = now + CHECK_EVERY_S

    def _open_node(self, now: float) -> None:
        """It takes domains again, and whoever was told of the drain hears of that, too."""
        if not self._base.node:
            self._finish(self._outcome, NodeState.READY, now)
            return
        self._out.append(v.SetCordon(state=NodeState.READY))
        self._hook(HookPoint.NODE_OPENED, now)

    @property
    def _outcome(self) -> DrainState:
        """Of what ends with an open node."""
        if self._base.state is DrainState.CANCELLING:
            return DrainState.CANCELLED
        moved = all(each.state in _AS_PLANNED for each in self._moves.all())
        return DrainState.DONE if moved else DrainState.PARTIAL

    def _partial(self, error: str, now: float) -> None:
        self._set(error=error)
        self._finish(DrainState.PARTIAL, NodeState.CORDONED, now)

    def _hook(self, point: HookPoint, now: float) -> None:
        self._hooking, self._hooking_since = point, now
        self._out.append(v.RunHook(point=point))

    def _hook_done(self, event: v.HookDone, now: float) -> None:
        if self._hooking is not event.point:
            return
        self._hooking = None
        if event.error is not None:
            self._note(f"hook {event.point}: {event.error}", now)
        if event.point is HookPoint.NODE_DRAINED:
            self._finish(DrainState.DONE, NodeState.DRAINED, now)
            return
        if event.point is HookPoint.NODE_OPENED:
            self._finish(self._outcome, NodeState.READY, now)
            return
        self._set(hooked=True)
        if event.error is not None:
            self._set(error=event.error)
            self._cancel(CancelMode.LET_END, now)

    def _finish(self, state: DrainState, node_state: NodeState, now: float) -> None:
        self._set(state=state, ended_at_s=now + self._base.unattended_s)
        if self._base.node:
            self._out.append(v.SetCordon(state=node_state))
        took = took_text(self._base)
        why = f": {self._base.error}" if self._base.error else ""
        self._note(f"{self._base.operation}{self._of_node} is {state} after {took}{why}", now)

    @property
    def _of_node(self) -> str:
        return f" of {self._base.node}" if self._base.node else ""  # A balancing has none.


def _on_its_way(move: Move) -> str:
    return f"{move.domain}, on its way to {move.destination} already (migration {move.migration})"


_ALREADY_TOLD_MAX: Final = 3
_SHARE_CHANGE: Final = 0.05
_AS_PLANNED: Final = frozenset({MoveState.MOVED, MoveState.STOPPED, MoveState.GONE})
_CANCEL_TOLD: Final = {CancelMode.LET_END: "go on to their end", CancelMode.ABORT: "are cancelled"}
