"""Volumes, and how a hypervisor opens one. Values only; part of the words of `migrator.model`.

Each storage client that a hypervisor speaks has one struct here, told apart by `kind`. None holds
a secret: a secret is a file on the node, and only its path travels.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec


class DiskValue(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the values of this module."""


class DiskFormat(enum.StrEnum):
    """How a volume's bytes are laid out. Always explicit: probing a format is a security hole."""

    RAW = "raw"
    QCOW2 = "qcow2"


class VolumeInfo(DiskValue, frozen=True, kw_only=True):
    """One volume of a pool, as its driver reports it."""

    pool: str
    name: str
    format: DiskFormat
    capacity_bytes: int
    allocated_bytes: int
    backing: str | None = None
    """The volume of the same pool that it leans on; None: it stands alone."""


class PoolRoom(enum.StrEnum):
    """How much a pool still takes."""

    UNKNOWN = "unknown"
    """It doesn't tell, or can't be reached."""
    ENOUGH = "enough"
    LITTLE = "little"
    NONE = "none"
    """It is full: a guest that writes where its volume has no space yet stands still."""


POOL_FULL_BYTES: Final = 2**20
"""Less is full: a qcow2 volume grows by 64 KiB, and those of some guests at once."""
POOL_LITTLE_BYTES: Final = 20 * 2**30
POOL_LITTLE_SHARE: Final = 0.05
"""Little is less than both: 5 % of a large pool are weeks, and 20 GiB may be all of a small one."""


class PoolHealth(DiskValue, frozen=True, kw_only=True):
    """What a pool's driver finds when it tries the storage. None: the storage doesn't tell."""

    reachable: bool
    reason: str | None = None
    """Why it can't be reached."""
    capacity_bytes: int | None = None
    free_bytes: int | None = None

    @property
    def room(self) -> PoolRoom:
        """By what is free of it."""
        if not self.reachable or self.free_bytes is None:
            return PoolRoom.UNKNOWN
        if self.free_bytes < POOL_FULL_BYTES:
            return PoolRoom.NONE
        share_bytes = POOL_LITTLE_SHARE * (self.capacity_bytes or 0)
        if self.free_bytes < min(POOL_LITTLE_BYTES, share_bytes):
            return PoolRoom.LITTLE
        return PoolRoom.ENOUGH


class PoolOwner(msgspec.Struct, frozen=True, kw_only=True):
    """Which cluster a pool is, as it is written beside the volumes, for every cluster to read."""

    identity: str
    """What names the cluster (`cluster/identity` in its store); no other has it."""
    name: str = ""
    """The cluster's, for people: others may have the same."""
    node: str = ""
    """The node that wrote it."""

    def __str__(self) -> str:
        name = self.name or "without a name"
        return f"{name}, identity {self.identity}, written by its node {self.node or 'unknown'}"


class Fencing(DiskValue, frozen=True, kw_only=True):
    """What a pool's fence is worth."""

    remote_writers: bool
    """Whether it stops a writer on another, silent node. Takeover from a dead node needs it."""
    method: str
    """How it fences and what it can't, in a sentence for an operator."""


# --- what a hypervisor opens -----------------------------------------------------------------


class Source(DiskValue, frozen=True, kw_only=True):
    """Base of every way to open a disk."""

    format: DiskFormat
    read_only: bool = False


class FileSource(Source, frozen=True, kw_only=True, tag="file", tag_field="kind"):
    """A local or host-mounted file."""

    path: str
    backing: FileSource | None = None
    """What a qcow2 file leans on: opened read-only, and nothing else that its header may name."""


class BlockDeviceSource(Source, frozen=True, kw_only=True, tag="block", tag_field="kind"):
    """A block device of the host: Fibre Channel, multipath, clustered LVM, loop."""

    path: str


class NfsSource(Source, frozen=True, kw_only=True, tag="nfs", tag_field="kind"):
    """A file that the hypervisor's own NFSv3 client reads and writes, under its own identity."""

    server: str
    path: str
    """Export and file: `/export/web/disk.raw`."""
    user: int
    group: int
    """AUTH_SYS uid and gid: the fence takes the file away from them."""


class TlsPsk(DiskValue, frozen=True, kw_only=True):
    """A pre-shared key, in the file `keys.psk` of a folder on the node (`username:hexkey`)."""

    directory: str
    username: str


class NbdSource(Source, frozen=True, kw_only=True, tag="nbd", tag_field="kind"):
    """An export of an NBD server."""

    host: str
    port: int
    export: str
    tls: TlsPsk | None = None
    reconnect_delay_s: int = 30
    """For so long requests wait for a server that went away; then they fail."""


class IscsiSource(Source, frozen=True, kw_only=True, tag="iscsi", tag_field="kind"):
    """A logical unit that the hypervisor's own iSCSI client uses."""

    portal: str
    """HOST:PORT."""
    target: str
    """The target's IQN."""
    lun: int
    initiator_name: str
    chap_user: str | None = None
    chap_secret_file: str | None = None
    """A file on the node that holds the CHAP secret and nothing else."""
    reservation_key: int | None = None
    """The key that this hypervisor's session registers for persistent reservations."""


BlockSource = FileSource | BlockDeviceSource | NfsSource | NbdSource | IscsiSource
"""How a hypervisor opens a disk."""
