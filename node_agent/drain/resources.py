"""The drain resource, `drains/ID` in the store, and the bodies of its API.

One resource for everything that moves several domains by a plan: a drain, an undrain, a balancing.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final

import msgspec

from migrator.model import END, MaintenancePolicy, Name, Value

DRAINS: Final = "drains/"
Reason = Annotated[
    str,
    msgspec.Meta(
        max_length=200,
        pattern=r"^[^\x00-\x1f\x7f-\x9f]*" + END,
        description="text of at most 200 characters, without control characters",
    ),
]
HISTORY_MAX: Final = 500
TIMEOUT_S: Final = 3600.0
"""By default, where a plan isn't long."""
STOP_S: Final = 60.0
"""Within which a guest powers itself off; then it is ended by force."""


class DrainPolicy(enum.StrEnum):
    """What is done to the domains of a node that is drained."""

    AUTO = "auto"
    """Each as its own policy says."""
    LIVE = "live"
    """All are migrated, but those whose own policy is never."""
    STOP = "stop"
    """All are powered off, but those whose own policy is never."""


class Operation(enum.StrEnum):
    DRAIN = "drain"
    UNDRAIN = "undrain"
    BALANCE = "balance"


class DrainState(enum.StrEnum):
    """Where the whole stands."""

    RUNNING = "running"
    CHECKING = "checking"
    """No move is left; the node is looked at: is it empty?"""
    CANCELLING = "cancelling"
    """No move begins any more; those under way end, or are cancelled."""
    DONE = "done"
    """All is where it should be; after a drain the node is empty, by its record and its processes.
    """
    PARTIAL = "partial"
    """Something was left; each move says why."""
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (DrainState.DONE, DrainState.PARTIAL, DrainState.CANCELLED)


class MoveState(enum.StrEnum):
    """Where one domain's move stands."""

    WAITING = "waiting"
    SEEKING = "seeking"
    """It failed, or was refused; another destination is being looked for."""
    STARTING = "starting"
    """A migration has been asked for."""
    MOVING = "moving"
    STOPPING = "stopping"
    BOOTING = "booting"
    """Powered off; it is being started on its destination."""
    MOVED = "moved"
    STOPPED = "stopped"
    """Powered off, and stays off until the undrain."""
    GONE = "gone"
    """Somebody else stopped, moved or deleted it meanwhile: nothing is left to do."""
    FAILED = "failed"
    LEFT = "left"
    """On purpose; `error` says why."""

    @property
    def ended(self) -> bool:
        return self in _ENDED

    @property
    def active(self) -> bool:
        """Whether something is being done to the domain."""
        return self in _ACTIVE


_ENDED: Final = frozenset(
    {MoveState.MOVED, MoveState.STOPPED, MoveState.GONE, MoveState.FAILED, MoveState.LEFT}
)
_ACTIVE: Final = frozenset(
    {MoveState.STARTING, MoveState.MOVING, MoveState.STOPPING, MoveState.BOOTING}
)


class Move(Value, frozen=True, kw_only=True):
    """One domain of a drain. Planned times are seconds after `Drain.started_at_s`; when it began
    and ended is told by the drain's own time (`Drain.at_s`)."""

    domain: str
    source: str
    destination: str | None
    """None: it is powered off and stays off, or, of a live one, no place is known yet."""
    policy: MaintenancePolicy = MaintenancePolicy.LIVE
    state: MoveState = MoveState.WAITING
    priority: int = 500
    wire_bytes: int = 0
    """What the plan expects it to send."""
    planned_start_s: float = 0.0
    planned_s: float = 0.0
    attempts: int = 0
    failures: int = 0
    tried: tuple[str, ...] = ()
    """Destinations that refused it or where it failed."""
    migration: str | None = None
    bandwidth_bytes_per_s: int | None = None
    """Its share of the links now."""
    started_at_s: float | None = None
    ended_at_s: float | None = None
    bytes_sent: int = 0
    remaining_bytes: int | None = None
    eta_s: float | None = None
    blackout_ms: float | None = None
    error: str | None = None
    powered_off: bool = False
    """By this operation; so it has to be started somewhere, whatever else fails."""
    already: bool = False
    """It was leaving when the drain began, by a migration that isn't the drain's: that is waited
    for, and neither capped, cancelled with the drain, nor undone by an undrain."""

    @property
    def live(self) -> bool:
        """Whether what is done to it is a migration."""
        return self.already or self.policy is MaintenancePolicy.LIVE

    @property
    def is_off(self) -> bool:
        """Whether it has been left without a place to run."""
        return self.state is MoveState.STOPPED or (
            self.state is MoveState.FAILED and self.powered_off
        )


class CancelMode(enum.StrEnum):
    NO = "no"
    LET_END = "let-end"
    """Moves under way end; no other begins."""
    ABORT = "abort"
    """Moves under way are cancelled."""


class Note(Value, frozen=True, kw_only=True):
    """One entry of a drain's history."""

    at_s: float
    """As `Drain.ended_at_s`."""
    text: str
    domain: str | None = None


class Drain(Value, frozen=True, kw_only=True):
    """The resource. One agent coordinates it; if that falls silent, another takes over."""

    id: str
    operation: Operation
    node: str
    """The node that is emptied or comes back; "" for a balancing."""
    state: DrainState
    created_at_s: float
    started_at_s: float
    ended_at_s: float | None = None
    """With the time in which nobody coordinated it."""
    coordinator: str = ""
    term: int = 0
    """Grows with each coordinator: who writes under an older one has lost it."""
    beat: int = 0
    """Changes with each heartbeat of the coordinator."""
    at_s: float = 0.0
    """The drain's own time at that: its first coordinator's wall clock when it began, which goes on
    by monotonic clocks, whoever coordinates it and whichever clock is set. 0: not known."""
    unattended_s: float = 0.0
    """How long nobody coordinated it: its own time, which its moves are told in, stood still."""
    written_at_s: float = 0.0
    """The wall clock of who coordinates it when that wrote last. 0: not known."""
    cancel: CancelMode = CancelMode.NO
    cancelled_by: str = ""
    """Who asked for that."""
    asked_by: str = ""
    """Who wanted the drain; "": isn't known, or a hint of a reboot did."""
    reason: str = ""
    """In their words."""
    moves: tuple[Move, ...] = ()
    parallel: int = 1
    """Moves from one node at once."""
    lanes: dict[str, int] = msgspec.field(default_factory=dict)
    """How many moves each node takes part in at once, by its processors."""
    links: dict[str, float] = msgspec.field(default_factory=dict)
    """Bytes a second that page streams may use, of each node's link."""
    planned_s: float = 0.0
    lower_bound_s: float = 0.0
    left_s: float | None = None
    """What is left by what its moves have taken so far; None: that can't be said."""
    waits_for: str = ""
    """What it waits for now beside its moves, in words; "": nothing."""
    overhead_s: float = 0.0
    """What its plan assumed a move to take beside its transfer; 0: not known."""
    timeout_s: float = TIMEOUT_S
    """After it no move begins any more."""
    exclude: tuple[str, ...] = ()
    """Domains that stay there."""
    hooked: bool = False
    """Whether the hooks of `node-draining` have been run."""
    reboot_hint: bool = False
    """The node is going to be rebooted: when it comes back, its domains do."""
    boot_id: str = ""
    """Of the node, when it was drained."""
    restores: str | None = None
    """Undrain: the drain that it undoes."""
    restored_by: str | None = None
    """Drain: the undrain that undid it, or began to."""
    continues: str | None = None
    """Drain: an earlier one of the node, whose domains hadn't come back when this one began."""
    error: str | None = None
    errors: int = 0
    """How often its coordination was ended by an error inside an agent (`mishaps`)."""
    history: tuple[Note, ...] = ()

    @property
    def ended(self) -> bool:
        return self.state.ended


class DrainList(Value, frozen=True, kw_only=True):
    drains: tuple[Drain, ...]


class DrainRequest(Value, frozen=True, kw_only=True, omit_defaults=True):
    """Body of a drain; may be left out. Of an older agent nothing is asked that it doesn't know,
    unless it is wanted."""

    parallel: Annotated[int, msgspec.Meta(ge=1, le=64)] | None = None
    """Moves at once; by default as many as the links need."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=604_800)] | None = None
    """After it no move begins any more; by default an hour, or twice what is planned."""
    policy: DrainPolicy = DrainPolicy.AUTO
    exclude: tuple[Name, ...] = ()
    """Domains that stay there; the node isn't empty then."""
    reboot_hint: bool = False
    """The node is going to be rebooted: when it comes back, its domains do."""
    reason: Reason = ""
    """For those who ask later why the node is kept free."""


class CordonRequest(Value, frozen=True, kw_only=True, omit_defaults=True):
    """Body of a cordon; may be left out."""

    reason: Reason = ""
    """For those who ask later why the node is kept free."""


class UndrainRequest(Value, frozen=True, kw_only=True):
    """Body of an undrain; may be left out."""

    restore: bool = True
    """Whether the domains that the drain took away are brought back."""


def took_text(drain: Drain) -> str:
    """How long one took that has ended."""
    took_s = (drain.ended_at_s or drain.started_at_s) - drain.started_at_s
    return f"{took_s:.1f} s{unattended_text(drain)}"


def unattended_text(drain: Drain) -> str:
    """To stand behind how long it took, or has gone on; "": somebody coordinated it all the time.

    Less than a second passes with each change of coordinator, and is nobody's affair.
    """
    if drain.unattended_s < 1.0:
        return ""
    return f", {drain.unattended_s:.0f} s of it without a coordinator"


def timeout_of(planned_s: float, asked_s: float | None = None) -> float:
    """A long plan isn't cut off by a default that nobody chose."""
    return max(TIMEOUT_S, 2.0 * planned_s) if asked_s is None else asked_s


class PlanMove(Value, frozen=True, kw_only=True):
    """A move that would be made. Seconds after the beginning."""

    domain: str
    source: str
    destination: str | None
    policy: MaintenancePolicy
    wire_bytes: int
    bandwidth_bytes_per_s: float
    start_s: float
    seconds: float
    gain: float | None = None
    """Balancing: how much evener it makes the nodes, for each second that it costs."""


class PlanBlocker(Value, frozen=True, kw_only=True):
    """A domain that can't leave, why, and what would help."""

    domain: str
    reason: str
    remedy: str


class NodeLeftOut(Value, frozen=True, kw_only=True):
    """A node that the plan gives nothing to, whoever would fit there, and why."""

    node: str
    reason: str


class LeavingAlready(Value, frozen=True, kw_only=True):
    """A domain that is on its way from the node by a migration that has begun before."""

    domain: str
    destination: str
    migration: str
    eta_s: float | None = None
    """Until its pages are across; None: not known yet."""


class DrainPlan(Value, frozen=True, kw_only=True):
    """What a dry run answers."""

    node: str
    moves: tuple[PlanMove, ...]
    blockers: tuple[PlanBlocker, ...] = ()
    left: tuple[PlanBlocker, ...] = ()
    """Undrain: domains that would stay where they are, and why."""
    left_out: tuple[NodeLeftOut, ...] = ()
    """Drain: nodes that are silent, cordoned or being emptied."""
    leaving: tuple[LeavingAlready, ...] = ()
    """Drain: what is on its way already, and only has to be waited for."""
    parallel: int = 1
    planned_s: float = 0.0
    lower_bound_s: float = 0.0
    link: str = ""
    """How fast the node's link is, and how that is known."""
    timeout_s: float | None = None
    """What begins later is left."""
    remarks: tuple[str, ...] = ()
    """What stands in nobody's way, and should be known before."""


class BalancePlan(Value, frozen=True, kw_only=True):
    """What would even the nodes out. `before` and `after`: how far apart they are, 0 to 1."""

    moves: tuple[PlanMove, ...]
    before: dict[str, float]
    after: dict[str, float]
    reason: str
    """Why there are no more moves than these."""
    left_out: tuple[NodeLeftOut, ...] = ()
    """Nodes that are silent, cordoned or being emptied."""
    planned_s: float = 0.0
