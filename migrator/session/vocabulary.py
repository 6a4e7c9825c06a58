"""Events that a session hears, and commands that it gives. Both are plain immutable values.

The runner (`migrator.runner`) performs commands against the real drivers and turns what comes of
them into events; the simulation does the same against simulated ones. Commands of one
`handle` call are performed in order; `Journal` is durable before the next one begins.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from migrator.model import MigrationState, OwnershipRecord, PassKind, PassReport
from migrator.ports import AbortOutcome, DomainEventKind, Struct
from migrator.session.messages import SessionMessage

# --- events ----------------------------------------------------------------------------------


class Begin(Struct, frozen=True, kw_only=True):
    """Start a new migration."""


class Recover(Struct, frozen=True, kw_only=True):
    """Go on with a migration from the journal, after the agent's restart."""


class Received(Struct, frozen=True, kw_only=True):
    message: SessionMessage


class PeerLost(Struct, frozen=True, kw_only=True):
    pass


class PeerBack(Struct, frozen=True, kw_only=True):
    pass


class CancelRequested(Struct, frozen=True, kw_only=True):
    reason: str = "cancelled by request"
    by: str = ""
    """Who asked; "": that isn't known, or nobody did."""


class PeerRemoved(Struct, frozen=True, kw_only=True):
    """The other node was removed from the cluster: it is given nothing more."""

    reason: str


class TimerName(enum.StrEnum):
    SETUP = "setup"
    TOTAL = "total"
    PEER = "peer"
    SWITCHOVER = "switchover"
    HANDOFF = "handoff"
    RETRY = "retry"
    CANCELLING = "cancelling"
    ENGINE = "engine"
    FILLED = "filled"


class TimerFired(Struct, frozen=True, kw_only=True):
    name: TimerName


class EngineListening(Struct, frozen=True, kw_only=True):
    host: str
    port: int
    secret: bytes
    no_post_copy: str = ""
    """Why pages can't be filled in while the guest runs; "": they can."""


class EngineConnected(Struct, frozen=True, kw_only=True):
    pages_in_use: int
    round_trip_ms: float


class EngineReported(Struct, frozen=True, kw_only=True):
    bytes_sent: int
    remaining_bytes: int
    throughput_bytes_per_s: float | None
    """None: not known yet, or not any more."""


class EngineStopped(Struct, frozen=True, kw_only=True):
    """Source: the last words of one that was told to stop; heard late, mostly after the end."""

    bytes_sent: int
    """All that it has sent in its life."""


class PassFinished(Struct, frozen=True, kw_only=True):
    report: PassReport


class ChannelNoted(Struct, frozen=True, kw_only=True):
    """The page streams broke (`broken`), or are back."""

    broken: bool
    detail: str


class DisksDeactivated(Struct, frozen=True, kw_only=True):
    """Source: the hypervisor had let go of the guest's disks at `at_s`, in `seconds` at most.

    It may be heard late, also after the device state's end.
    """

    seconds: float
    at_s: float


class PagesMissing(Struct, frozen=True, kw_only=True):
    """Destination: post-copy has begun; from here on an engine must live for the guest to."""


class PagesComplete(Struct, frozen=True, kw_only=True):
    """Destination: post-copy is over, every page is here. Figures of the engine at the end."""

    seconds: float = 0.0
    pages: int = 0
    faults: int = 0
    fault_ms_median: float = 0.0
    fault_ms_max: float = 0.0
    packed_ratio: float = 1.0


class EngineLost(Struct, frozen=True, kw_only=True):
    reason: str


class GuestReported(Struct, frozen=True, kw_only=True):
    """The hypervisor said something of this domain; `at_s` on its host's wall clock."""

    kind: DomainEventKind
    at_s: float
    detail: str = ""


class IncomingReady(Struct, frozen=True, kw_only=True):
    early: bool = False
    """Its memory is there, and the hypervisor isn't up: that is told by another of these."""


class RecordSwapped(Struct, frozen=True, kw_only=True):
    """`won` None: the outcome is unknown."""

    won: bool | None


class RecordRead(Struct, frozen=True, kw_only=True):
    """`known` False: the store couldn't be read."""

    known: bool
    record: OwnershipRecord | None = None


class Fenced(Struct, frozen=True, kw_only=True):
    token: int
    detail: str = ""
    """What it took, volume by volume."""


class GuestResumed(Struct, frozen=True, kw_only=True):
    at_s: float


class GuestDestroyed(Struct, frozen=True, kw_only=True):
    pass


class SwitchoverAborted(Struct, frozen=True, kw_only=True):
    outcome: AbortOutcome


class GuestCondition(enum.Enum):
    """What the hypervisor says of this session's guest, as far as recovery needs to know."""

    INVALID = 0
    RUNNING = 1
    SWITCHING = 2
    """In switchover: resumes by itself, or on abort."""
    SENT = 3
    """`postmigrate`."""
    LOADED = 4
    """A destination with its device state loaded; its vCPUs have never run."""
    GONE = 5
    STOPPED_OTHERWISE = 6
    """Paused by a user, an I/O error or a panic."""
    INCOMING = 7
    """A destination whose device state isn't loaded."""


class GuestInspected(Struct, frozen=True, kw_only=True):
    condition: GuestCondition


class CommandFailed(Struct, frozen=True, kw_only=True):
    """The command of that class name raised. Its effect may or may not have happened."""

    command: str
    error: str
    reasons: tuple[str, ...] = ()
    without_effect: bool = False
    """Of ResumeGuest: it is certain that no vCPU ran by it."""
    dropped: tuple[Command, ...] = ()
    """Of Journal: what stood behind it in its list, and is not performed."""


class LeaveGiven(Struct, frozen=True, kw_only=True):
    """The guest may be paused. `detail` says what was done for it, if anything."""

    detail: str = ""


class LeaveRefused(Struct, frozen=True, kw_only=True):
    """The guest must not be paused, or not even begin to move: a hook forbids it."""

    reason: str


Event = (
    Begin
    | Recover
    | Received
    | PeerLost
    | PeerBack
    | CancelRequested
    | PeerRemoved
    | TimerFired
    | EngineListening
    | EngineConnected
    | EngineReported
    | EngineStopped
    | PassFinished
    | ChannelNoted
    | DisksDeactivated
    | PagesMissing
    | PagesComplete
    | EngineLost
    | GuestReported
    | IncomingReady
    | RecordSwapped
    | RecordRead
    | Fenced
    | GuestResumed
    | GuestDestroyed
    | SwitchoverAborted
    | GuestInspected
    | LeaveGiven
    | LeaveRefused
    | CommandFailed
)

# --- commands --------------------------------------------------------------------------------


class Journal(Struct, frozen=True, kw_only=True):
    """Note, before the next command is performed, where the session stands.

    If it can't be written, or takes too long, nothing that stands behind it in the same list is
    performed, and CommandFailed("Journal") follows, which names that. Other notes may be waiting by
    then. What took too long may be written all the same, later, before what is journalled next.

    `durable`: on the disk. Otherwise it outlives the agent but not the host, which is enough
    for what only matters while the hypervisor's process lives, and costs no fsync in a blackout.
    """

    state: MigrationState
    resuming: bool = False
    """From here on the vCPUs may run on this destination."""
    durable: bool = True
    standing: bool = False
    """The guest stands still until it is written, or has failed, which it does soon."""


class Send(Struct, frozen=True, kw_only=True):
    """Best effort, at most once; the answer, if any, is a Received."""

    message: SessionMessage


class StartTimer(Struct, frozen=True, kw_only=True):
    """Replaces a timer of the same name."""

    name: TimerName
    seconds: float


class StopTimer(Struct, frozen=True, kw_only=True):
    name: TimerName


class StartEngine(Struct, frozen=True, kw_only=True):
    """Spawn this side's engine. Destination: EngineListening follows. Source: nothing yet.

    `post_copy`: the successor of one that died in post-copy.
    """

    post_copy: bool = False


class ConnectEngine(Struct, frozen=True, kw_only=True):
    """Source: connect to the other engine and arm the dirty log; EngineConnected follows.

    `post_copy`: only serve the pages that it asks for; EngineConnected follows all the same.
    """

    host: str
    port: int
    secret: bytes
    post_copy: bool = False


class PullPages(Struct, frozen=True, kw_only=True):
    """Destination in post-copy: the guest runs, the engine may get all that is missing."""


class StopEngine(Struct, frozen=True, kw_only=True):
    """Idempotent. Dirty tracking is unregistered afterwards."""


class RunPass(Struct, frozen=True, kw_only=True):
    number: int
    kind: PassKind


class EndPass(Struct, frozen=True, kw_only=True):
    """Source: that pass has taken long enough. It is over as soon as what is on its way has
    arrived; the rest is pending. Nothing where it is over already.
    """

    number: int


class LeavePart(enum.Enum):
    """What is asked."""

    ALL = 0
    HOOKS = 1
    """Alone: what may take minutes, ahead of the rest."""
    REST = 2


class Leaving(NamedTuple):
    """Leave that is asked for, and what follows once it is given."""

    part: LeavePart
    detail: str = ""
    post_copy: bool = False
    """Else a switchover; but for HOOKS, which the first pass follows."""


class AskLeave(Struct, frozen=True, kw_only=True):
    """Source: may the guest be paused now? LeaveGiven or LeaveRefused follows, in its own time."""

    part: LeavePart = LeavePart.ALL


class PrepareSwitchover(Struct, frozen=True, kw_only=True):
    """Source: what can be set up beforehand, device channel included."""


class BeginSwitchover(Struct, frozen=True, kw_only=True):
    pass


class ContinueSwitchover(Struct, frozen=True, kw_only=True):
    pass


class AbortSwitchover(Struct, frozen=True, kw_only=True):
    """SwitchoverAborted follows. Also right where none was begun."""


class PrepareIncoming(Struct, frozen=True, kw_only=True):
    """Destination: volumes, taps, hypervisor, device channel. IncomingReady follows."""


class SwapRecord(Struct, frozen=True, kw_only=True):
    """RecordSwapped follows."""

    expected: OwnershipRecord
    new: OwnershipRecord


class ReadRecord(Struct, frozen=True, kw_only=True):
    """RecordRead follows."""


class Fence(Struct, frozen=True, kw_only=True):
    """Shut every older token out of every volume. Fenced follows."""

    token: int


class ResumeGuest(Struct, frozen=True, kw_only=True):
    """GuestResumed follows. Given only to the holder of the newest token."""


class DestroyGuest(Struct, frozen=True, kw_only=True):
    """End this node's copy and release what it holds. GuestDestroyed follows. Idempotent."""


class InspectGuest(Struct, frozen=True, kw_only=True):
    """GuestInspected follows."""


class Announce(Struct, frozen=True, kw_only=True):
    """Tell the network that the guest is here."""


class Finish(Struct, frozen=True, kw_only=True):
    """The session is over; its last command."""

    state: MigrationState
    error: str | None = None


EngineCommand = StartEngine | ConnectEngine | RunPass | EndPass | PullPages | StopEngine
"""What a side's engine performs."""
Command = (
    Journal
    | Send
    | StartTimer
    | StopTimer
    | StartEngine
    | ConnectEngine
    | PullPages
    | StopEngine
    | RunPass
    | EndPass
    | AskLeave
    | PrepareSwitchover
    | BeginSwitchover
    | ContinueSwitchover
    | AbortSwitchover
    | PrepareIncoming
    | SwapRecord
    | ReadRecord
    | Fence
    | ResumeGuest
    | DestroyGuest
    | InspectGuest
    | Announce
    | Finish
)
