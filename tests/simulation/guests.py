"""A simulated guest, and the hypervisor process that it lives in.

The memory is an array of page versions that the guest goes on rewriting while it runs, with a log
of what it dirtied; the device state is the epoch that it was taken in. So a destination that was
given a page too few, or a copy that was left behind, is seen when its vCPUs are set going.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from migrator.model import NodeName
from migrator.session.vocabulary import GuestCondition

PAGES = 16


class G(enum.Enum):
    """What a hypervisor process does."""

    RUNNING = "running"
    PRE_SWITCHOVER = "pre-switchover"
    SENDING = "sending"
    """Between pre-switchover and postmigrate: it may still fail, and resume by itself."""
    POSTMIGRATE = "postmigrate"
    INCOMING = "incoming"
    LOADED = "loaded"


CONDITIONS = {
    G.RUNNING: GuestCondition.RUNNING,
    G.PRE_SWITCHOVER: GuestCondition.SWITCHING,
    G.SENDING: GuestCondition.SWITCHING,
    G.POSTMIGRATE: GuestCondition.SENT,
    G.INCOMING: GuestCondition.INCOMING,
    G.LOADED: GuestCondition.LOADED,
}


@dataclass(slots=True, eq=False)
class Guest:
    """One hypervisor process."""

    node: NodeName
    token: int
    state: G
    memory: list[int]
    epoch: int
    """Of the device state; -1: none yet."""
    begun: bool = False
    """A switchover was accepted, the guest isn't paused yet."""
    dirty: set[int] = field(default_factory=set)
    missing: set[int] = field(default_factory=set)
    """Post-copy: what the destination doesn't have yet. Nobody can touch it."""
    armed: bool = False
    doomed: bool = False
    """What is missing is nowhere any more."""

    def write(self, page: int) -> None:
        if self.memory and page not in self.missing:
            self.memory[page] += 1
            self.dirty.add(page)

    @classmethod
    def born_running(cls, node: NodeName) -> Guest:
        return cls(node=node, token=1, state=G.RUNNING, memory=[0] * PAGES, epoch=0)

    @classmethod
    def waiting(cls, node: NodeName, token: int) -> Guest:
        return cls(node=node, token=token, state=G.INCOMING, memory=[-1] * PAGES, epoch=-1)
