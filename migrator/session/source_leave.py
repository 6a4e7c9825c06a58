"""Leave to switch over: asked once, while the guest still runs and can stay.

The node says whether the guest may be paused now: load balancers have been told and have agreed,
and the ownership record can be read. That may take its time. The guest runs on and dirties pages
meanwhile, so an answer that came late is followed by another pass before the pause.

A hypervisor that moves the memory itself may stop the guest before that, where next to nothing is
left. So its hooks, which may take minutes, are asked before any memory travels, and the rest when
it is across, as usual; a guest that stands still waits for that, too, but not for long.
"""

from __future__ import annotations

import abc
from typing import Final

from migrator.model import MigrationMode, MigrationState, OnTimeout, PassKind
from migrator.ports import DomainEventKind
from migrator.session.source_post_copy import SourcePostCopy
from migrator.session.vocabulary import (
    AskLeave,
    EndPass,
    Event,
    GuestReported,
    LeaveGiven,
    LeavePart,
    LeaveRefused,
    Leaving,
    StartTimer,
    StopTimer,
    TimerFired,
    TimerName,
)

_FRESH_S: Final = 0.1
"""An answer within so long is as good as none: next to nothing was dirtied."""


class SourceLeave(SourcePostCopy):
    """See the module."""

    def _ask_leave(self, detail: str, *, post_copy: bool = False) -> None:
        """Go on to the switchover, or to post-copy, once that is allowed."""
        if self._leave_given:
            self._take_leave(detail, post_copy)
            return
        part = LeavePart.REST if self._hooks_agreed else LeavePart.ALL
        self._ask(Leaving(part, detail, post_copy))

    def _ask_hooks(self) -> None:
        """Before the first pass."""
        self._ask(Leaving(LeavePart.HOOKS))

    def _ask(self, leaving: Leaving) -> None:
        self._leaving = leaving
        self._leave_asked_at_s = self._now
        self._do(AskLeave(part=leaving.part))

    def _heard_of_leave(self, event: Event) -> None:
        if self._leaving is None or self.state is not MigrationState.PRECOPY:
            return
        leaving, asked_at_s = self._leaving, self._leave_asked_at_s
        late = self._now - asked_at_s >= _FRESH_S
        if isinstance(event, LeaveGiven) and (event.detail or late):
            self._note("leave", asked_at_s, self._now, event.detail)
        match event:
            case LeaveGiven() if leaving.part is LeavePart.HOOKS:
                self._leaving, self._hooks_agreed = None, True
                self._run_pass(PassKind.FIRST)
            case LeaveGiven():
                self._leaving, self._leave_given = None, True
                if leaving.post_copy or self._now - asked_at_s < _FRESH_S:
                    self._take_leave(leaving.detail, leaving.post_copy)
                else:
                    self._run_pass(PassKind.DIRTY)
            case LeaveRefused():
                self._note("leave", asked_at_s, self._now, event.reason)
                self._give_up(event.reason)

    def _heard_of_halt(self, event: Event) -> bool:
        """Of a guest that its hypervisor has stopped by itself. Whether it was about that."""
        most_s = self.timing.switchover_s
        match event:
            case GuestReported(kind=DomainEventKind.PRE_SWITCHOVER):
                self._halted_at_s = event.at_s
                self._do(StartTimer(name=TimerName.SWITCHOVER, seconds=most_s))
            case GuestReported(kind=DomainEventKind.RESUMED) if self._halted_at_s is not None:
                self._halted_at_s = None
                self._do(StopTimer(name=TimerName.SWITCHOVER))
            case TimerFired(name=TimerName.SWITCHOVER) if self._halted_at_s is not None:
                self._give_up(
                    "the hypervisor stopped the guest by itself, as next to nothing was left, and "
                    f"leave to go on (the store, storage) didn't come within {most_s:g} s"
                )
            case _:
                return False
        return True

    def _time_is_over(self) -> None:
        """The request's `timeout_s`, in pre-copy."""
        request = self.request
        if self._leaving is not None and self._leaving.part is LeavePart.HOOKS:
            self._give_up(f"not done within {request.timeout_s:g} s: its hooks took all of it")
            return
        if self.mode is MigrationMode.PRECOPY and request.on_timeout is not OnTimeout.FORCE:
            self._give_up(f"not converged within {request.timeout_s:g} s")
            return
        stands_s = self.timing.stands_s
        if self._forced and self._pass_running and self._now - self._moved_at_s >= stands_s:
            self._give_up(
                f"not done within {request.timeout_s:g} s, and its iteration has stood still for "
                f"{stands_s:g} s: its engine doesn't answer"
            )
            return
        self._forced = True
        self._do(StartTimer(name=TimerName.TOTAL, seconds=stands_s))
        if self.mode is MigrationMode.HYBRID and self._pass_running and not self.post_copy:
            # What it doesn't send follows the guest. A forced pause waits for its end: there each
            # page that was not sent lengthens the blackout.
            self._do(EndPass(number=len(self.passes) + 1))

    def _take_leave(self, detail: str, post_copy: bool) -> None:
        if post_copy:
            self._go_post_copy(detail)
        else:
            self._switch_over(detail)

    @abc.abstractmethod
    def _run_pass(self, kind: PassKind) -> None: ...

    @abc.abstractmethod
    def _go_post_copy(self, reason: str) -> None: ...

    @abc.abstractmethod
    def _switch_over(self, detail: str) -> None: ...

    @abc.abstractmethod
    def _give_up(self, reason: str) -> None: ...
