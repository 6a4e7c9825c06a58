"""Before the handoff, at the destination: the guest arrives, and the source may take it back.

An engine that is lost may have delivered everything: then the copy here is whole, and it may be the
only one a moment later. So nobody guesses:
- The hypervisor is asked. A copy that is loaded is kept; it needs no engine any more, unless pages
  are missing, and then the engine has a successor.
- One that isn't loaded yet is told to the source, which takes its guest back, or learns from the
  record whose it is. Its word ends the copy here.
- Without an engine a hypervisor loads what it was given, or ends. One that is still waiting for
  the rest after `settle_s` will never be loaded, and is given up without anybody's word.
"""

from __future__ import annotations

import abc

from migrator.model import MigrationState
from migrator.session.destination_post_copy import DestinationPostCopy
from migrator.session.messages import Inquire, Pending, Refused
from migrator.session.vocabulary import (
    Begin,
    CommandFailed,
    EngineListening,
    Event,
    GuestCondition,
    GuestInspected,
    IncomingReady,
    InspectGuest,
    PeerBack,
    PeerLost,
    PrepareIncoming,
    ReadRecord,
    Recover,
    StartEngine,
    StartTimer,
    TimerFired,
    TimerName,
)

_S = MigrationState


class DestinationArrival(DestinationPostCopy):
    """See the module."""

    def _in_created(self, event: Event) -> None:
        match event:
            case Begin():
                self._enter(_S.SETUP)
                self._journal()
                self._do(
                    StartTimer(name=TimerName.PEER, seconds=self.timing.abandoned_s),
                    PrepareIncoming(),
                )
            case Recover():
                self._restored = True
                self._enter(_S.RECOVERING, "the agent restarted")
                self._start_successor()  # First: the hypervisor may wait for a page.
                self._do(InspectGuest())
            case _:
                pass

    def _before_handoff(self, event: Event) -> None:
        match event:
            case IncomingReady():
                self._up = self._up or not event.early
                if not self._incoming_ready:
                    self._incoming_ready = True
                    self._do(StartEngine())
            case EngineListening() if self.state is _S.SETUP:
                self._listening = event
                self._enter(_S.PRECOPY)
                self._do(StartTimer(name=TimerName.RETRY, seconds=self.timing.inquire_s))
                self._answer_ready()
            case PeerBack():
                self._send(Inquire())
            case PeerLost():
                pass  # The PEER timer runs since the last word; the page streams may well live on.
            case GuestInspected():
                self._look_at_arrival(event.condition)
            case TimerFired(name=TimerName.RETRY) if self._cut_off:
                self._do(InspectGuest())
            case TimerFired(name=TimerName.RETRY):
                # The source may have forgotten us, or its Abort may be lost: ask now and then.
                self._send(Inquire())
                self._do(StartTimer(name=TimerName.RETRY, seconds=self.timing.inquire_s))
            case TimerFired(name=TimerName.PEER) if self._loaded_at_s:
                # The source may be dead, and this the only copy: the record decides, no timeout.
                self._enter(_S.RECOVERING, "no word from the source")
                self._do(ReadRecord())
            case TimerFired(name=TimerName.PEER) if not self._commit:
                self._give_up(f"no word from the source for {self.timing.abandoned_s:g} s")
            case CommandFailed(command="PrepareIncoming"):
                self._refuse(event.reasons or (event.error,))
            case CommandFailed(command="InspectGuest"):
                self._tell_cut_off()
            case CommandFailed():
                self._give_up(f"{event.command}: {event.error}")
            case _:
                pass

    def _refuse(self, reasons: tuple[str, ...]) -> None:
        self._send(Refused(reasons=reasons))
        self._give_up("; ".join(reasons))

    # --- without its engine ---

    def _engine_gone(self, reason: str) -> None:
        """See the module."""
        if self.state is _S.SETUP or not self._up:  # Nothing can have been loaded.
            self._give_up(f"the destination's engine: {reason}")
            return
        self._listening = None
        if self.pages_missing:
            self._revive_engine(reason)
        if not self._loaded_at_s:
            self._engine_lost_at_s = self._now
            self._engine_lost_reason = f"the destination's engine: {reason}"
            self._do(InspectGuest())

    def _look_at_arrival(self, condition: GuestCondition) -> None:
        match condition:
            case GuestCondition.LOADED:
                self._loaded()
            case GuestCondition.GONE:
                self._give_up(self._engine_lost_reason or "the destination's hypervisor is gone")
            case _ if not self._cut_off:
                pass
            case _ if self._now - self._engine_lost_at_s >= self.timing.settle_s:
                self._give_up(self._engine_lost_reason)
            case _:
                self._tell_cut_off()

    def _tell_cut_off(self) -> None:
        if self._cut_off:
            self._send(self._pending())
            self._retry_later()

    def _loaded(self) -> None:
        self._loaded_at_s = self._loaded_at_s or self._now
        self._try_commit()

    def _pending(self) -> Pending:
        """Where we are, and whether the source has to take the guest back."""
        reason = self._engine_lost_reason if self._cut_off and not self.pages_missing else ""
        stuck = self._stuck if self._won_at_s or self._yielded else ""
        yielded = self.next_token if self._yielded else 0
        return Pending(state=self.state.value, cut_off=reason, stuck=stuck, yielded=yielded)

    @property
    def _cut_off(self) -> bool:
        """The engine is lost, and what it had delivered isn't loaded, as far as we know."""
        return bool(self._engine_lost_reason) and not self._loaded_at_s

    @abc.abstractmethod
    def _try_commit(self) -> None: ...

    @abc.abstractmethod
    def _give_up(self, reason: str) -> None: ...
