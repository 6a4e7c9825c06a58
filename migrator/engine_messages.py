"""What an agent and its engine process say to each other over their socketpair.

    agent                                engine (source)            engine (destination)
      │  Configure + descriptors ───────────►│                              │
      │  Configure + descriptors ───────────────────────────────────────────►│
      │◄───────────────────────────────── Listening(host, port) ────────────┤
      │  Attach + descriptor ───────────────────────────────────────────────►│ (if it began early)
      │  Connect(host, port) ───────────────►│═════ page streams ══════════►│
      │◄──────────────────────── Connected ──┤                              │
      │  RunPass(1, first) ─────────────────►│ ══ pages, barrier ══════════►│
      │◄──────────────────────── Report ... ─┤◄═══════════ acknowledged ════│
      │◄──────────────────────── PassDone ───┤                              │
      │  OpenDeviceChannel(path) ───────────►│ listens on path              │ connects to path
      │◄──────────────── DeviceChannelOpen ──┤                              │
      │◄───────────────── DisksDeactivated ──┤ (during the switchover)      │
      │◄────────────────────────────────────────────────── PostCopyArmed ───┤ (if some are missing)
      │◄─────────────────────────────────────────────────── PostCopyDone ───┤
      │  Stop ──────────────────────────────►│ unregisters, exits           │

Without `Connect` a source's engine only watches: SampleDirty(seconds), answered by DirtySampled.

Frames are `migrator.wire` frames. The descriptors of `Configure` come with its first byte
(SCM_RIGHTS), in the order uffd, pagemap, region 0, region 1, ... A destination may be configured
with the regions alone while its hypervisor is still starting: pages can come then, and `Attach`
brings the rest. End of file on the socketpair means that the agent died: the engine unregisters
dirty tracking and exits.

During a pass the source's engine heeds SetBandwidth, EndPass and Stop at once, and keeps other
messages until the pass is done. A final pass ignores the bandwidth cap: the guest stands still
for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from migrator.figures import DirtyPoint
from migrator.model import PassKind, PassReport, Role
from migrator.ports import MemoryRegion, RegionMapping
from migrator.tls import TlsFiles


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=str.lower):
    """Base of the tagged messages; the tag is the class's name in lower case."""


class RegionLayout(msgspec.Struct, frozen=True, kw_only=True):
    """A memory region without its descriptor, which travels beside the message."""

    name: str
    size_bytes: int
    page_size_bytes: int
    mappings: tuple[RegionMapping, ...] = ()


def layout_of(regions: Sequence[MemoryRegion]) -> tuple[RegionLayout, ...]:
    return tuple(
        RegionLayout(
            name=region.name,
            size_bytes=region.size_bytes,
            page_size_bytes=region.page_size_bytes,
            mappings=region.mappings,
        )
        for region in regions
    )


# agent -> engine


class Configure(Message, frozen=True, kw_only=True):
    role: Role
    migration_id: str
    secret: bytes
    """32 random bytes that both engines know; a page stream without them is refused."""
    pid: int
    """Of the hypervisor; 0: it isn't up, see `attached`."""
    regions: tuple[RegionLayout, ...]
    streams: int = 1
    bind_address: str = ""
    """Destination: the address to listen at. Source: the address to connect from; "" for any."""
    bandwidth_bytes_per_s: int | None = None
    reconnect_s: float = 45.0
    """How long a broken page stream is tried again before `EngineFailed`: for as long as the
    sessions bear it that they can't reach one another (`Timing.peer_s`)."""
    silence_s: float = 5.0
    """A page stream on which the other engine does nothing for so long, while it is its turn, is
    broken."""
    device_connect_s: float = 10.0
    """Destination: how long the hypervisor's device channel may take to appear."""
    post_copy: bool = False
    """Take over from an engine that died in post-copy: no passes, no device channel."""
    tls: TlsFiles | None = None
    """Every connection between the engines is TLS, by these files; None: plain."""
    peer: str = ""
    """The node at the other end, whose name its certificate must have."""
    expected_bytes_per_s: float | None = None
    """Source: what the way to the destination carried of late, as far as is known."""

    @property
    def attached(self) -> bool:
        """False: a destination's, with no descriptors but the regions'; `Attach` follows."""
        return self.pid != 0


class Attach(Message, frozen=True, kw_only=True):
    """Destination: the hypervisor has its memory mapped there. Its userfaultfd comes with this."""

    regions: tuple[RegionLayout, ...]


class Connect(Message, frozen=True, kw_only=True):
    """In post-copy also a second time: the destination's engine has a successor, which listens
    there and has a secret of its own.
    """

    host: str
    port: int
    secret: bytes = b""
    """"": that of the configuration."""


class RunPass(Message, frozen=True, kw_only=True):
    number: int
    kind: PassKind


class EndPass(Message, frozen=True, kw_only=True):
    """Send no more of that pass than is on its way; the rest is pending again. `PassDone` follows.

    Nothing where it is over, or final.
    """

    number: int


class SetBandwidth(Message, frozen=True, kw_only=True):
    bandwidth_bytes_per_s: int | None


class OpenDeviceChannel(Message, frozen=True, kw_only=True):
    """Source: listen on the unix socket `path` for the hypervisor, and relay what it sends.

    Destination: connect to it, and feed it what the source's engine relays.
    """

    path: str


class PullAll(Message, frozen=True, kw_only=True):
    """Destination in post-copy: the guest runs; get what nobody waits for yet, too."""


class SampleDirty(Message, frozen=True, kw_only=True):
    """Source, configured and not connected: watch the dirty log for so long; `DirtySampled`."""

    seconds: float


class Ping(Message, frozen=True, kw_only=True):
    """Is answered by `Pong`, in the midst of a pass, too."""


class Stop(Message, frozen=True, kw_only=True):
    """Unregister dirty tracking, close everything, answer `Stopped` and exit."""


# engine -> agent


class Configured(Message, frozen=True, kw_only=True):
    """Source only: dirty tracking is registered and armed."""

    pages_in_use: int


class Listening(Message, frozen=True, kw_only=True):
    host: str
    port: int
    no_post_copy: str = ""
    """Why this guest's memory can't be filled in while it runs; "": it can."""


class Connected(Message, frozen=True, kw_only=True):
    streams: int
    round_trip_ms: float


class Report(Message, frozen=True, kw_only=True):
    """Sent a few times a second during a pass, and in post-copy."""

    number: int
    """0 in post-copy."""
    bytes_sent: int
    """By this engine so far, over all passes."""
    remaining_bytes: int
    """Of this pass; in post-copy what the destination lacks."""
    throughput_bytes_per_s: float | None
    """None: not known yet."""


class PassDone(Message, frozen=True, kw_only=True):
    """Each page of the pass is in the destination's memory: its engine acknowledged them.

    But for what the report tells as deferred or cut, and as pending.
    """

    report: PassReport
    link_bytes_per_s: float | None = None
    """What the link carries, by all streams; None: not known, or not what held the pass up."""


class PostCopyArmed(Message, frozen=True, kw_only=True):
    """Destination: pages are missing from here on; whoever touches one waits for this engine."""


class PostCopyDone(Message, frozen=True, kw_only=True):
    """Destination: every page is in place, and the guest's memory is rid of the engine."""

    seconds: float
    pages: int
    faults: int
    fault_ms_median: float
    fault_ms_max: float
    packed_ratio: float = 1.0
    """Bytes of pages to one that they took on the link."""


class DeviceChannelOpen(Message, frozen=True, kw_only=True):
    path: str


class DisksDeactivated(Message, frozen=True, kw_only=True):
    """Source: the hypervisor had let go of the guest's disks at `at_s`, by the wall clock.

    It took `seconds` at most.
    """

    seconds: float
    at_s: float


class ChannelBroken(Message, frozen=True, kw_only=True):
    """A page stream broke; the engine is connecting again."""

    reason: str


class ChannelRestored(Message, frozen=True, kw_only=True):
    broken_s: float


class DirtySampled(Message, frozen=True, kw_only=True):
    """What was dirtied in `seconds`. Tracking is still registered, until `Stop`."""

    seconds: float
    fresh_bytes: int
    """Sum over the scans: what is written again after a scan counts again."""
    curve: tuple[DirtyPoint, ...]
    zero_share: float = 0.0
    packed_share: float = 1.0
    dirtied_packed_share: float | None = None
    memory_in_use_bytes: int = 0


class Pong(Message, frozen=True, kw_only=True):
    """To each `Ping`."""


class EngineFailed(Message, frozen=True, kw_only=True):
    """The engine can't go on, and exits."""

    reason: str


class Stopped(Message, frozen=True, kw_only=True):
    bytes_sent: int = 0


ToEngine = (
    Configure
    | Attach
    | Connect
    | RunPass
    | EndPass
    | SetBandwidth
    | OpenDeviceChannel
    | SampleDirty
    | PullAll
    | Ping
    | Stop
)
FromEngine = (
    Configured
    | Listening
    | Connected
    | Report
    | PassDone
    | DeviceChannelOpen
    | DisksDeactivated
    | DirtySampled
    | ChannelBroken
    | ChannelRestored
    | PostCopyArmed
    | PostCopyDone
    | Pong
    | EngineFailed
    | Stopped
)
