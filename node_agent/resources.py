"""What the agent stores, and what its HTTP API and CLI speak, beyond the words of `migrator.model`.

Immutable values, validated by msgspec. The OpenAPI schema is generated from these structs, so that
what they refuse and what the documentation says can't differ.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final

import msgspec

from migrator.figures import Prediction
from migrator.model import (
    DiskFormat,
    DomainSpec,
    DomainState,
    EngineKind,
    Fencing,
    FileName,
    HypervisorCapabilities,
    Migration,
    MigrationMode,
    MigrationRequest,
    Name,
    NodeState,
    OnTimeout,
    PoolHealth,
    PoolRoom,
    Value,
    VolumeInfo,
)
from storage.settings import PoolSettings

DOMAINS: Final = "domains/"
NODES: Final = "nodes/"
BEATS: Final = "beats/"
MIGRATIONS: Final = "migrations/"
EVENTS: Final = "events/"
POOLS: Final = "pools/"

CapacityBytes = Annotated[int, msgspec.Meta(ge=512, le=1 << 50)]


class DomainNote(Value, frozen=True, kw_only=True):
    """What was done to a domain, and by whom, that must be known later."""

    at_s: float
    text: str
    user: str = ""


class DomainRecord(Value, frozen=True, kw_only=True):
    """`domains/NAME` in the store: the definition, as validated and pinned."""

    spec: DomainSpec
    defined_at_s: float
    history: tuple[DomainNote, ...] = ()


class Domain(Value, frozen=True, kw_only=True):
    """The domain resource: its definition, who owns it, and what it does there now."""

    name: str
    spec: DomainSpec
    state: DomainState
    """`unknown` when the owning node can't be asked; then `reason` says why."""
    node: str | None = None
    """The node that owns it, or owned it last; None if it never ran."""
    token: int = 0
    """The newest fencing token; 0 if it never ran."""
    pid: int | None = None
    reason: str | None = None
    memory_in_use_bytes: int | None = None
    addresses: tuple[tuple[str, ...], ...] = ()
    """NIC by NIC, the addresses that the guest was seen to use, the newest last."""
    migration: str | None = None
    """The migration that has hold of it now."""
    defined_at_s: float = 0.0
    history: tuple[DomainNote, ...] = ()
    """Takeovers, oldest first."""
    warnings: tuple[str, ...] = ()
    """In the answer to its definition: what the node that was asked lacks to start it now."""
    forced: bool = False
    """In the answer to a stop: it was ended by force. An older agent doesn't say so."""


class Node(Value, frozen=True, kw_only=True):
    """The node resource: what the node said of itself, and whether it still speaks."""

    name: str
    state: NodeState
    heartbeat_age_s: float
    api_address: str
    peer_address: str
    migration_address: str
    cpus: int
    memory_bytes: int
    memory_committed_bytes: int
    """The memory of the domains that run on it."""
    domains: tuple[str, ...]
    """The domains that run on it."""
    capabilities: HypervisorCapabilities
    agent_version: str
    round_trip_ms: float | None = None
    """Between the agent that was asked and this node; None: they have no connection."""
    round_trips_ms: dict[str, float] = msgspec.field(default_factory=dict)
    """What this node last measured to its neighbours."""
    trouble: str = ""
    """Of the node that was asked: why its own heartbeat couldn't be written. Others know less."""
    clock_offset_s: float | None = None
    """Its wall clock less that of the node that was asked, to about a second; None: not known."""
    certificate_until_s: float | None = None
    """Until when its certificate holds; None: it has none, or isn't known."""
    kept_free: str = ""
    """That it is cordoned or drained, who wanted that, and why; "": it is open."""
    judged_in_s: float = 0.0
    """Unreachable, but for so long it may be heard yet: the agent that was asked, or the store, was
    away itself."""


class StartRequest(Value, frozen=True, kw_only=True):
    """Body of a start; may be left out."""

    node: Name | None = None
    """Where; by default the node that last owned it, or one where it fits, if that is silent or
    kept free."""


class TakeoverRequest(Value, frozen=True, kw_only=True):
    """Body of a takeover."""

    node: Name
    """Where the domain is to be started, from disk."""
    powered_off: Name | None = None
    """The domain's silent node, if you have seen that it is powered off: your word stands for the
    fence that its storage doesn't have, and is kept with your name in the domain's history."""


class StopRequest(Value, frozen=True, kw_only=True):
    """Body of a stop; may be left out."""

    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 30.0
    """How long the guest may take to power off by itself; then it is ended by force."""


class MigrationCreate(Value, frozen=True, kw_only=True):
    """Body of a new migration: `MigrationRequest`, whose destination may be left open."""

    destination: Name | None = None
    """By default the node that a drain would choose, by the domain's rules, and memory; where it
    refuses, the next."""
    downtime_limit_ms: Annotated[int, msgspec.Meta(ge=1, le=60_000)] = 50
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 600.0
    mode: MigrationMode = MigrationMode.HYBRID
    on_timeout: OnTimeout = OnTimeout.CANCEL
    bandwidth_bytes_per_s: Annotated[int, msgspec.Meta(ge=65_536, le=2**53)] | None = None
    engine: EngineKind = EngineKind.AUTO

    def towards(self, destination: str) -> MigrationRequest:
        """The request with its destination decided."""
        return MigrationRequest(
            destination=destination,
            downtime_limit_ms=self.downtime_limit_ms,
            timeout_s=self.timeout_s,
            mode=self.mode,
            on_timeout=self.on_timeout,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            engine=self.engine,
        )


class MigrationChange(Value, frozen=True, kw_only=True):
    """What can be changed while a migration runs."""

    bandwidth_bytes_per_s: Annotated[int, msgspec.Meta(ge=65_536, le=2**53)] | None
    """The cap on its page streams; null lifts it."""


class DryRun(Value, frozen=True, kw_only=True):
    """What a migration would be refused for (empty: it would be accepted), and how it would go."""

    destination: str
    refused: tuple[str, ...]
    destination_known: bool = True
    """False: there is no such node, and the migration itself would be answered with 404."""
    engine: EngineKind | None = None
    """Which one it would take: paged or native; null where that can't be said."""
    engine_reason: str = ""
    """Why that one, where it isn't the usual one."""
    prediction: Prediction | None = None
    prediction_unknown: str = ""
    """Why there is no prediction, where there is none and nothing else says so."""
    remark: str = ""
    """What isn't against it, and should be known before."""


class PoolRecord(Value, frozen=True, kw_only=True):
    """`pools/NAME` in the store."""

    settings: PoolSettings
    added_at_s: float


class PoolOrigin(enum.StrEnum):
    """Where a pool is written down."""

    CONFIGURATION = "configuration"
    """In the agent's file: changed there, with a restart."""
    CLUSTER = "cluster"
    """In the state store: every agent has it; `pool add` and `pool rm` change it."""


class Pool(Value, frozen=True, kw_only=True):
    """The pool resource, as the agent that answers sees it."""

    name: str
    driver: str
    origin: PoolOrigin
    settings: PoolSettings
    fencing: Fencing
    health: PoolHealth
    room: PoolRoom = PoolRoom.UNKNOWN
    """What `health` means for guests that write to it: none: it is full; little: nearly."""
    refused: str = ""
    """Why nothing is done on it, though it can be reached: it is another cluster's."""
    same_as: str = ""
    """Another pool that has its place, too: by both names one volume is the same."""
    already_own: bool = False
    """In the answer to a takeover: it was this cluster's before, so nothing was done."""


class PoolTakeover(Value, frozen=True, kw_only=True):
    """Body of a pool's takeover."""

    identity: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    """Of the cluster whose pool it was, as the refusal names it: your word that none of its nodes
    uses it any more, kept with your name in the events."""


class VolumeCreate(Value, frozen=True, kw_only=True):
    """Body of a new volume."""

    name: FileName
    capacity_bytes: CapacityBytes
    format: DiskFormat = DiskFormat.RAW
    image: str | None = None
    """Absolute path, on the agent that is asked, of an image in `format` to copy."""


class VolumeResize(Value, frozen=True, kw_only=True):
    """Body of a resize. A volume only grows."""

    capacity_bytes: CapacityBytes


class VolumeClone(Value, frozen=True, kw_only=True):
    """Body of a clone, into the same pool."""

    name: FileName
    linked: bool = False
    """An overlay that leans on the volume, which may only be read from then on."""


class DomainList(Value, frozen=True, kw_only=True):
    domains: tuple[Domain, ...]


class MigrationList(Value, frozen=True, kw_only=True):
    migrations: tuple[Migration, ...]


class NodeRemoved(Value, frozen=True, kw_only=True):
    """A node is out."""

    name: str
    domains: tuple[str, ...]
    """Those that are recorded there still: nobody else may run them before a takeover."""


class GuestsShutdown(Value, frozen=True, kw_only=True):
    """Body of a shutdown of all guests of a node."""

    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=1500)]
    """How long they may take to power off by themselves; then they are ended by force."""


class GuestLeft(Value, frozen=True, kw_only=True):
    """A guest that is still there, or may be."""

    name: str
    why: str


class GuestsEnded(Value, frozen=True, kw_only=True):
    """What came of that. They are started again by the node's next agent."""

    powered_off: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()
    left: tuple[GuestLeft, ...] = ()


class NodeList(Value, frozen=True, kw_only=True):
    nodes: tuple[Node, ...]


class PoolList(Value, frozen=True, kw_only=True):
    pools: tuple[Pool, ...]


class VolumeList(Value, frozen=True, kw_only=True):
    volumes: tuple[VolumeInfo, ...]


class LoopBlock(Value, frozen=True, kw_only=True):
    """A time in which the agent's event loop did one turn's work, and answered nobody."""

    ended_at_s: float
    """Wall clock."""
    milliseconds: float


class Health(Value, frozen=True, kw_only=True):
    """This agent serves, and its state store answers."""

    node: str
    status: str
    agent_version: str
    loop_blocked_ms_max: float = 0.0
    """The longest that the agent's event loop served nobody, since its start."""
    loop_blocks: tuple[LoopBlock, ...] = ()
    """The latest such times that were over 5 ms."""


class Problem(Value, frozen=True, kw_only=True, omit_defaults=True):
    """An error, as of RFC 9457 (application/problem+json)."""

    type: str
    """`urn:ferry:problem:CODE`."""
    title: str
    status: int
    detail: str
    code: str
    """The stable name of the error (`migrator.errors`)."""
    instance: str = ""
    """The path that was asked for."""
    fields: dict[str, str] = msgspec.field(default_factory=dict)
    """Each wrong field, and what would be right."""
    reasons: tuple[str, ...] = ()
    """Every reason of a refusal."""
