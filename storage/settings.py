"""What each kind of pool is told: one struct for agent.toml, the API and the state store.

Told apart by `driver`. Pure, so that all of node_agent/ may use it. No secret stands in here: what
is secret is a file on the nodes, under the same path on each; the pool is told its path.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from migrator.model import END, Name, Value

AbsolutePath = Annotated[
    str,
    msgspec.Meta(description="an absolute path", pattern=r"^/[^\x00-\x1f]*" + END, max_length=1024),
]
Host = Annotated[
    str,
    msgspec.Meta(
        description="an address or host name, IPv6 without brackets",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9.:_-]{0,252}" + END,
    ),
]
Endpoint = Annotated[
    str,
    msgspec.Meta(
        description='"HOST:PORT", IPv6 in brackets',
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,252}|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}" + END,
    ),
]


class PoolBase(Value, frozen=True, kw_only=True):
    """What every pool has."""

    name: Name


class DirectorySettings(PoolBase, frozen=True, kw_only=True, tag_field="driver", tag="directory"):
    """A folder that every node sees under the same path."""

    path: AbsolutePath


class NfsSettings(PoolBase, frozen=True, kw_only=True, tag_field="driver", tag="nfs"):
    """An NFSv3 export, used without mounting it. The server trusts the nodes (no_root_squash)."""

    server: Host
    export: AbsolutePath
    """The exported path; the pool's volumes lie directly below it."""


class NbdSettings(PoolBase, frozen=True, kw_only=True, tag_field="driver", tag="nbd"):
    """Exports of an NBD server, made and ended by a provisioner beside it.

    Exactly one of `provisioner` and `hook`.
    """

    provisioner: Endpoint | None = None
    """Where `python -m storage.nbd` listens on the storage server."""
    hook: AbsolutePath | None = None
    """A program on the nodes that answers the same requests, one a run, on its standard output."""
    tls_directory: AbsolutePath | None = None
    """A folder on the nodes with keys.psk; then every connection is encrypted."""
    tls_username: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,64}" + END)] = "ferry"
    reconnect_delay_s: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 60


class IscsiSettings(PoolBase, frozen=True, kw_only=True, tag_field="driver", tag="iscsi"):
    """LUNs, one a volume, used by QEMU's own iSCSI client.

    Who makes them: `tgt_folder`, `tgt_socket` and `portal` together (tgtd), or `hook`.
    """

    portal: Endpoint | None = None
    """Where the nodes reach tgtd."""
    tgt_folder: AbsolutePath | None = None
    """The folder of tgtd's volumes; tgtd and every agent must see it."""
    tgt_socket: AbsolutePath | None = None
    """tgtd's management socket: its $TGT_IPC_SOCKET, a dot, and its -C number."""
    hook: AbsolutePath | None = None
    """A program on the nodes that makes LUNs; docs/storage-iscsi.md says how it is asked."""
    hook_fences: bool = False
    """The hook also has grant, fence and token."""
    chap_user: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._:@-]{1,63}" + END)] | None = None
    chap_secret_file: AbsolutePath | None = None
    """A file on the nodes, mode 0600, that holds the CHAP secret and nothing else."""
    initiator_prefix: Annotated[
        str, msgspec.Meta(pattern=r"^iqn\.[0-9]{4}-[0-9]{2}\.[a-z0-9.:-]{1,120}" + END)
    ] = "iqn.2026-11.io.ferry:node"
    """A node's initiator name is this, a colon and the node's name."""


class BlockSettings(PoolBase, frozen=True, kw_only=True, tag_field="driver", tag="block"):
    """Block devices that every node sees in a folder, under the same names. A device a volume."""

    path: AbsolutePath
    """Like /dev/disk/by-id, /dev/mapper, or a volume group's folder."""
    hook: AbsolutePath | None = None
    """A program that makes, grows and deletes devices. Without it the devices are the site's."""
    fence_hook: AbsolutePath | None = None
    """A program that fences a device by persistent reservations. Without it nothing fences."""


class SimulatedSettings(PoolBase, frozen=True, kw_only=True, tag_field="driver", tag="simulated"):
    """In the agent's memory, for tests."""


PoolSettings = (
    DirectorySettings
    | NfsSettings
    | NbdSettings
    | IscsiSettings
    | BlockSettings
    | SimulatedSettings
)

BY_DRIVER: Final[dict[str, type[PoolBase]]] = {
    "directory": DirectorySettings,
    "nfs": NfsSettings,
    "nbd": NbdSettings,
    "iscsi": IscsiSettings,
    "block": BlockSettings,
    "simulated": SimulatedSettings,
}
OFFERED: Final = ", ".join(name for name in BY_DRIVER if name != "simulated")
"""For messages. That one is for tests."""
_PLACE: Final = {"path", "server", "export", "provisioner", "portal", "tgt_folder", "tgt_socket"}


def same_place(one: PoolBase, other: PoolBase) -> bool:
    """Whether both lead to the same volumes, as far as settings can tell.

    What only a hook knows is left to it: it may tell pools apart.
    """
    places = [
        {key: value for key, value in msgspec.structs.asdict(each).items() if key in _PLACE}
        for each in (one, other)
    ]
    return type(one) is type(other) and places[0] == places[1] and any(places[0].values())


DEFAULT_DRIVER: Final = "directory"
"""Of a pool in agent.toml that names none."""
