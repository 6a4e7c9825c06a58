"""A simulated guest, and the hypervisor process that it lives in.

The memory is an array of page versions that the guest goes on rewriting while it runs, with a log
of what it dirtied; the device state is the epoch that it was taken in. So a destination that was
given a page too few, or a copy that was left behind, is seen when its vCPUs are set going.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from migrator.model import DomainSpec, DomainState, NodeName
from migrator.session.vocabulary import GuestCondition

PAGES = 16


class G(enum.Enum):
    """What a hypervisor process does."""

    RUNNING = "running"
    IO_ERROR = "io-error"
    """It stands still: the storage refused a write."""
    PRE_SWITCHOVER = "pre-switchover"
    SENDING = "sending"
    """Between pre-switchover and postmigrate: it may still fail, and resume by itself."""
    POSTMIGRATE = "postmigrate"
    INCOMING = "incoming"
    LOADED = "loaded"


CONDITIONS = {
    G.RUNNING: GuestCondition.RUNNING,
    G.IO_ERROR: GuestCondition.STOPPED_OTHERWISE,
    G.PRE_SWITCHOVER: GuestCondition.SWITCHING,
    G.SENDING: GuestCondition.SWITCHING,
    G.POSTMIGRATE: GuestCondition.SENT,
    G.INCOMING: GuestCondition.INCOMING,
    G.LOADED: GuestCondition.LOADED,
}
STATES = {
    G.RUNNING: DomainState.RUNNING,
    G.IO_ERROR: DomainState.IO_ERROR,
    G.PRE_SWITCHOVER: DomainState.PRE_SWITCHOVER,
    G.SENDING: DomainState.PRE_SWITCHOVER,
    G.POSTMIGRATE: DomainState.POSTMIGRATE,
    G.INCOMING: DomainState.INCOMING,
    G.LOADED: DomainState.LOADED,
}


@dataclass(slots=True, eq=False)
class Guest:
    """One hypervisor process."""

    node: NodeName
    token: int
    """Under which its vCPUs run, or ran last."""
    state: G
    memory: list[int]
    epoch: int
    """Of the device state; -1: none yet."""
    spec: DomainSpec
    opened_token: int = 0
    """Under which its volume was opened: who it is at the storage."""
    begun: bool = False
    """A switchover was accepted, the guest isn't paused yet."""
    dirty: set[int] = field(default_factory=set)
    missing: set[int] = field(default_factory=set)
    """Post-copy: what the destination doesn't have yet. Nobody can touch it."""
    armed: bool = False
    doomed: bool = False
    """What is missing is nowhere any more, or its domain is being stopped: it may be destroyed."""
    fed: bool = False
    """Incoming: all of the device state was given to it, and it loads that without its engine."""
    deposed: bool = False
    """Its domain was taken over: it may compute until its node notices, and can't write."""
    monitor_due_s: float = 0.0
    events_due_s: float = 0.0
    """The monitor takes commands, and gives events, in their order."""

    def write(self, page: int) -> None:
        if self.memory and page not in self.missing:
            self.memory[page] += 1
            self.dirty.add(page)
