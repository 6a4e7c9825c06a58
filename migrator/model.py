"""The words of Ferry as types: what every part of the system talks about.

Everything here is an immutable value. Nothing does I/O, reads a clock or rolls a die.
The structs are msgspec structs, so that the same definition validates the configuration,
the HTTP API and the wire, and yields the OpenAPI schema.

Conventions: units stand last in a name (`memory_bytes`, `downtime_limit_ms`). Times named
`*_at_s` are seconds of the host's wall clock (`time.time()`), unless a docstring says otherwise.
"""

from __future__ import annotations

import enum
from typing import Annotated, NewType

import msgspec

from migrator.cutover import Cutover as Cutover
from migrator.cutover import MovedConnections as MovedConnections
from migrator.cutover import Witness as Witness
from migrator.disks import BlockDeviceSource as BlockDeviceSource
from migrator.disks import BlockSource as BlockSource
from migrator.disks import DiskFormat as DiskFormat
from migrator.disks import Fencing as Fencing
from migrator.disks import FileSource as FileSource
from migrator.disks import IscsiSource as IscsiSource
from migrator.disks import NbdSource as NbdSource
from migrator.disks import NfsSource as NfsSource
from migrator.disks import PoolHealth as PoolHealth
from migrator.disks import PoolOwner as PoolOwner
from migrator.disks import PoolRoom as PoolRoom
from migrator.disks import TlsPsk as TlsPsk
from migrator.disks import VolumeInfo as VolumeInfo
from migrator.figures import Prediction
from migrator.iterations import PassKind as PassKind
from migrator.iterations import PassReport as PassReport
from migrator.names import END as END
from migrator.names import FileName as FileName
from migrator.names import MacAddress as MacAddress
from migrator.names import Name as Name
from migrator.names import Value as Value
from migrator.placement import DomainSelector as DomainSelector
from migrator.placement import LabelKey as LabelKey
from migrator.placement import LabelValue as LabelValue
from migrator.placement import MaintenancePolicy as MaintenancePolicy
from migrator.placement import PlacementRules as PlacementRules

NodeName = NewType("NodeName", str)
DomainName = NewType("DomainName", str)
MigrationId = NewType("MigrationId", str)
VolumeName = NewType("VolumeName", str)
PoolName = NewType("PoolName", str)
FencingToken = NewType("FencingToken", int)
"""A number that only grows, one a handoff. 0 is never valid: it marks "no token yet"."""

PAGE_SIZE_BYTES = 4096
STRIPE_BYTES = 2 * 1024 * 1024
"""A page's stream is its stripe's number modulo the count (ARCHITECTURE: "The page engine")."""

# --- domains ---------------------------------------------------------------------------------


class DiskSpec(Value, frozen=True, kw_only=True):
    """One disk of a domain: a volume of a pool."""

    volume: FileName
    pool: Name = "default"
    read_only: bool = False


class NicDefinition(Value, frozen=True, kw_only=True):
    """One network interface. `addresses` (IPv4 or IPv6, no prefix) are announced after a move."""

    mac: MacAddress | None = None
    """None: one is made, which no other domain has."""
    bridge: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,15}" + END)]
    addresses: tuple[str, ...] = ()
    mtu_bytes: Annotated[int, msgspec.Meta(ge=576, le=65521)] = 1500
    vlan: (
        Annotated[int, msgspec.Meta(ge=1, le=4094, description="a VLAN from 1 to 4094")] | None
    ) = None
    """The VLAN of a VLAN-aware bridge that its frames are in; None: that of its new ports."""
    networks: tuple[str, ...] = ()
    """Where given, each address must be in one of them (like 10.0.0.0/24)."""
    anti_spoofing: bool = False
    """The node drops what the guest sends under another MAC or, if it has addresses, another IP."""
    receive_limit_bytes_per_s: Annotated[int, msgspec.Meta(ge=10_000, le=2**53)] | None = None
    send_limit_bytes_per_s: Annotated[int, msgspec.Meta(ge=10_000, le=2**53)] | None = None
    """As the guest sees it: what it receives is queued at the limit, what it sends is dropped."""


class NicSpec(NicDefinition, frozen=True, kw_only=True):
    """One network interface as it is, wherever its guest runs."""

    mac: MacAddress


class KernelBoot(Value, frozen=True, kw_only=True, tag="kernel", tag_field="kind"):
    """Direct kernel boot. The files must exist under the same path on every node."""

    kernel: str
    initrd: str | None = None
    cmdline: str = ""


class DiskBoot(Value, frozen=True, kw_only=True, tag="disk", tag_field="kind"):
    """Boot by the firmware from the first disk."""


Boot = KernelBoot | DiskBoot


class DomainDefinition(Value, frozen=True, kw_only=True):
    """What a user defines: a virtual machine, independent of where it runs."""

    name: Name
    memory_bytes: Annotated[int, msgspec.Meta(ge=16 * 1024**2, le=16 * 1024**4)]
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=288)] = 1
    machine: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9.-]{1,40}" + END)] = "q35"
    """`q35` or `pc`, or a versioned type. Pinned to a versioned one when the domain is defined."""
    cpu_model: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.,+-]{1,200}" + END)] = "qemu64"
    disks: tuple[DiskSpec, ...] = ()
    nics: tuple[NicDefinition, ...] = ()
    boot: Boot = msgspec.field(default_factory=DiskBoot)
    labels: dict[LabelKey, LabelValue] = msgspec.field(default_factory=dict)
    priority: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 500
    """Of two domains that leave a node, the one with the higher priority leaves first."""
    maintenance: MaintenancePolicy = MaintenancePolicy.LIVE
    maintenance_restart: bool = True
    """With `stop`: whether it is started again on another node, or stays off until the undrain."""
    placement: PlacementRules = PlacementRules()
    hook_deadline_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] | None = None
    """How long each hook of this domain may take; None: as the hook itself says."""


class DomainSpec(DomainDefinition, frozen=True, kw_only=True):
    """A domain's definition with what was made up for its user: what runs, and moves."""

    nics: tuple[NicSpec, ...] = ()


class DomainState(enum.StrEnum):
    """What a domain does, as its hypervisor reports it."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    IO_ERROR = "io-error"
    """Paused by the hypervisor because a disk failed (werror=stop)."""
    CRASHED = "crashed"
    """The guest panicked or the hypervisor reports an internal error."""
    INCOMING = "incoming"
    """A destination that waits for device state."""
    LOADED = "loaded"
    """A destination that has loaded its device state. Its vCPUs have never run."""
    PRE_SWITCHOVER = "pre-switchover"
    """A source that the hypervisor has paused for the last pages; resumes by itself on failure."""
    POSTMIGRATE = "postmigrate"
    """A source whose device state is sent. Only the winner of the ownership record continues it."""
    UNKNOWN = "unknown"


class DomainStatus(Value, frozen=True, kw_only=True):
    """A snapshot of one domain on one node, taken by its hypervisor driver."""

    name: str
    state: DomainState
    pid: int | None = None
    reason: str | None = None
    memory_in_use_bytes: int | None = None
    """Populated guest memory on the host."""
    addresses: tuple[tuple[str, ...], ...] = ()
    """NIC by NIC, what the guest was seen to use; filled in where the fabric watches it."""


# --- ownership -------------------------------------------------------------------------------


class OwnershipState(enum.StrEnum):
    """What the owner intends. STOPPED: nobody runs the domain; the next start takes a new token."""

    STOPPED = "stopped"
    RUNNING = "running"


class OwnershipRecord(Value, frozen=True, kw_only=True):
    """Who may run a domain's vCPUs: the node `owner`, and only while `token` is the newest.

    Changed by compare-and-set alone, also for a rollback
    (ARCHITECTURE: "What keeps it to one writer").
    """

    domain: str
    token: int
    owner: str
    state: OwnershipState

    def passed_to(self, owner: NodeName) -> OwnershipRecord:
        """The record after a handoff (or a rollback, with the same owner): the next token."""
        return OwnershipRecord(
            domain=self.domain, token=self.token + 1, owner=owner, state=OwnershipState.RUNNING
        )

    def said_resuming(self) -> OwnershipRecord:
        """The record of a source that has won it back, and says by it that it resumes the guest.

        In place of its journal, where that can't be written. By three: a handoff raises the token
        by one, a takeover by two, and neither may be taken for this.
        """
        return OwnershipRecord(
            domain=self.domain, token=self.token + 3, owner=self.owner, state=self.state
        )


# --- nodes -----------------------------------------------------------------------------------


class HypervisorCapabilities(Value, frozen=True, kw_only=True):
    """What a node's hypervisor can run; compared between the ends before anything moves."""

    driver: str
    version: str
    accelerator: str
    machine_types: tuple[str, ...]
    cpu_models: tuple[str, ...]
    cpu_features: tuple[str, ...] = ()
    """CPU flags that a guest may see. Only compared where the accelerator exposes the host's."""
    paged_engine: bool = True
    paged_engine_reason: str | None = None
    """Why the page engine can't be used here, e.g. a kernel older than 6.7."""
    native_hazard: str = ""
    """What the hypervisor's own migration does to guests here, where it is known to harm them."""


class NodeState(enum.StrEnum):
    """What a node may be used for. Silence hides the rest: an unreachable node may be cordoned."""

    READY = "ready"
    CORDONED = "cordoned"
    """No domain starts or moves there; those that run there go on."""
    DRAINING = "draining"
    """Cordoned, and its domains are leaving."""
    DRAINED = "drained"
    """Cordoned, and empty."""
    RESTORING = "restoring"
    """Open again; the domains that a drain took away are coming back."""
    GOING_DOWN = "going-down"
    """Its host shuts down, and its domains with it: none starts or moves there."""
    UNREACHABLE = "unreachable"

    @property
    def admits(self) -> bool:
        """Whether domains may start or move there."""
        return self in (NodeState.READY, NodeState.RESTORING)


class NodeInfo(Value, frozen=True, kw_only=True):
    """A node as it last described itself in the state store."""

    name: str
    api_address: str
    """host:port of the HTTP API."""
    peer_address: str
    """host:port of the agents' own protocol."""
    migration_address: str
    """Address (no port) that page streams arrive at."""
    memory_bytes: int
    """Memory that the node offers to domains."""
    cpus: int
    capabilities: HypervisorCapabilities
    heartbeat_at_s: float
    agent_version: str
    boot_id: str = ""
    """Of the host: another one after a reboot."""
    pools: tuple[str, ...] = ()
    link_bytes_per_s: float | None = None
    """Of the interface of `migration_address`, where it says so; each way."""
    round_trips_ms: dict[str, float] = msgspec.field(default_factory=dict)
    """The last measured round trip to each node that it keeps a connection to."""
    certificate_until_s: float | None = None
    """Until when its certificate holds; None: it has none, or an older agent."""
    going_down: bool = False
    """Its host shuts down: see `NodeState.GOING_DOWN`."""


# --- migrations ------------------------------------------------------------------------------


class OnTimeout(enum.StrEnum):
    """What to do with a pre-copy that doesn't converge, or is over its time."""

    CANCEL = "cancel"
    FORCE = "force"
    """Pause the guest anyway, whatever the blackout."""


class MigrationMode(enum.StrEnum):
    """When the guest's memory travels."""

    PRECOPY = "precopy"
    """All of it while the guest runs at the source."""
    POSTCOPY = "postcopy"
    """All of it after the guest was resumed at the destination."""
    HYBRID = "hybrid"
    """Pre-copy while it pays; then post-copy, instead of giving up."""


class EngineKind(enum.StrEnum):
    """Who moves the guest's memory."""

    AUTO = "auto"
    """Paged where the kernels and the domain allow it, else native; the migration says which."""
    PAGED = "paged"
    """Ferry's page engine."""
    NATIVE = "native"
    """The hypervisor's own migration, under Ferry's handoff. It has no post-copy."""

    @property
    def may_stop_guest(self) -> bool:
        """Whether it may do so before it is told to: as soon as next to nothing is left."""
        return self is EngineKind.NATIVE


class MigrationRequest(Value, frozen=True, kw_only=True):
    """What a user asks for."""

    destination: Name
    mode: MigrationMode = MigrationMode.HYBRID
    downtime_limit_ms: Annotated[int, msgspec.Meta(ge=1, le=60_000)] = 50
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 600.0
    on_timeout: OnTimeout = OnTimeout.CANCEL
    bandwidth_bytes_per_s: Annotated[int, msgspec.Meta(ge=65_536, le=2**53)] | None = None
    engine: EngineKind = EngineKind.AUTO
    """A migration that has begun says here which it was: paged or native."""


class MigrationState(enum.StrEnum):
    """The states of a migration (ARCHITECTURE: "The states"). Tables: `migrator.states`."""

    CREATED = "created"
    SETUP = "setup"
    PRECOPY = "precopy"
    SWITCHOVER = "switchover"
    HANDOFF = "handoff"
    POSTCOPY = "postcopy"
    COMPLETED = "completed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    FAILED = "failed"
    RECOVERING = "recovering"


class Role(enum.StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"


class Phase(Value, frozen=True, kw_only=True):
    """One entry of a migration's timeline."""

    name: str
    started_at_s: float
    seconds: float
    detail: str = ""


class MigrationProgress(Value, frozen=True, kw_only=True):
    """How far a migration is. Rates are of the last iteration; None means not known yet."""

    state: MigrationState
    iteration: int = 0
    bytes_sent: int = 0
    remaining_bytes: int = 0
    throughput_bytes_per_s: float | None = None
    dirty_rate_bytes_per_s: float | None = None
    predicted_blackout_ms: float | None = None
    """Of a switchover after that iteration. None also where none like it will follow: in hybrid
    mode what the downtime limit doesn't allow is sent before it, or follows the guest."""
    eta_s: float | None = None
    unheard_s: float | None = None
    """For how long the engine, which tells all this, has said nothing, or in a post-copy has sent
    nothing; None: it speaks, or needn't. No record has it, and no rate is told then."""


class Migration(Value, frozen=True, kw_only=True):
    """The migration resource: what was asked, where it stands, what was done and why."""

    id: str
    domain: str
    source: str
    destination: str
    request: MigrationRequest
    state: MigrationState
    progress: MigrationProgress
    created_at_s: float
    ended_at_s: float | None = None
    token: int = 0
    """The source's fencing token at the start; the handoff makes it one more."""
    error: str | None = None
    blackout_ms: float | None = None
    """Host clocks: pause on the source to running on the destination, handoff included."""
    total_s: float | None = None
    timeline: tuple[Phase, ...] = ()
    iterations: tuple[PassReport, ...] = ()
    prediction: Prediction | None = None
    """Made when the migration began, or after its first iteration where too little was known."""
    cutover: Cutover | None = None
    """How the network followed. Known some ms after the end, its last figure some seconds after."""
    cancelled_by: str = ""
    """Who asked for its cancel: a user with role and token, a node's root, or a drain."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


ENDED = frozenset({MigrationState.COMPLETED, MigrationState.CANCELLED, MigrationState.FAILED})
