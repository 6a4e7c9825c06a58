"""The way on for frames that arrive at a guest's old node: a VXLAN to its new one, for seconds.

    network ── old node's bridge ── fx...  ═══ UDP ═══  fx... ── bridge ── tap ── guest

Each NIC has a tunnel of its own, with a VXLAN identifier that both ends work out of the
migration's name. Its ends are bridge ports that flood nothing, learn nothing, and are never
announced through: what enters it is only what the old node's bridge is told to send there, frames
for the guest's own MAC. So it makes no loop, and no third table learns anything wrong.

A tunnel's name is `fx`, ten digits of its domain's name, `n` and the NIC's index, as with taps. Its
MTU is the bridge's: a full frame travels in two IP fragments where the underlay is no wider.

Synchronous; belongs into a thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence

from migrator.errors import FabricError
from migrator.model import NicSpec
from migrator.ports import Tunnel
from netfabric.bridge.links import Netlink, netlink
from netfabric.link_table import Link
from netfabric.moves import Arrival, Departure
from netfabric.rtnetlink import set_port
from netfabric.taps import TUNNEL_NAME, be_mute, made_mac
from netfabric.tunnel_tests import GROUP

_log = logging.getLogger(__name__)


def network_identifier(name: str, index: int) -> int:
    """The VXLAN network identifier (24 bits, never 0) of NIC `index` in migration `name`."""
    digest = hashlib.blake2b(f"{name}/{index}".encode(), digest_size=3).digest()
    return int.from_bytes(digest, "big") or 1


@contextlib.contextmanager
def new_end(
    name: str, tunnel: Tunnel, index: int, *, only_for: Sequence[str] = ()
) -> Iterator[tuple[Netlink, Link]]:
    """The VXLAN link of one end, down, for the body to fit out; up when that is through.

    An older one of the name goes. `only_for`: MACs, if it shall take frames for no others.
    FabricError, of the body, too: then none is left.
    """
    with netlink(f"can't make tunnel {name} to {tunnel.remote}") as kernel:
        found = kernel.find(name)
        if found is not None:
            kernel.delete(found)
        link = kernel.add_vxlan(
            name,
            network_identifier(tunnel.name, index),
            local=tunnel.local,
            port=tunnel.port,
            learns=False,
            remote=None if only_for else tunnel.remote,
        )
        try:
            for mac in only_for:
                kernel.set_remote(link.index, mac, tunnel.remote)
            yield kernel, link
            kernel.raise_up(link)
        except BaseException:
            kernel.delete(link)
            raise


def open_end(name: str, tunnel: Tunnel, index: int, nic: NicSpec) -> int:
    """Make one end, a port of the bridge; its interface index. An older one of the name goes.

    FabricError: no such bridge, or the kernel refuses; then none is left.
    """
    # A bridge sends its own node's broadcasts out of every port, also of those that flood
    # nothing (br_flood, net/bridge/br_forward.c).
    macs = (nic.mac, GROUP.hex(":"))
    with new_end(name, tunnel, index, only_for=macs) as (kernel, link):
        bridge = kernel.find(nic.bridge)
        if bridge is None:
            raise FabricError(f"there is no bridge {nic.bridge} here")
        # Up only when it floods nothing and says nothing: a broadcast that came out at the
        # other end would make every switch believe that its sender is there.
        kernel.attach(link, bridge, made_mac(name), open_now=False)
        if nic.vlan is not None:
            kernel.put_into_vlan(link.index, nic.vlan)
        set_port(link.index, floods=False, learns=False)
        be_mute(name)
    return link.index


def close_end(name: str) -> None:
    """Remove one end. Idempotent. FabricError if the kernel refuses."""
    with netlink(f"can't remove tunnel {name}") as kernel:
        link = kernel.find(name)
        if link is not None:
            kernel.delete(link)


def close_ends(
    ends: Sequence[Departure | Arrival], close: Callable[[str], None] = close_end
) -> tuple[int, int]:
    """Remove all of them by `close`; frames that came out of them, and that went in."""
    if not ends:
        return 0, 0
    counted = frames([end.tunnel for end in ends])
    for end in ends:
        try:
            close(end.tunnel)
        except FabricError as error:
            _log.warning("%s", error)
    return counted


def remove_leftovers() -> None:
    """Remove every end of a tunnel of ours that exists in this network namespace."""
    with netlink("can't remove old tunnels") as kernel:
        for link in kernel.links():
            if TUNNEL_NAME.fullmatch(link.name):
                kernel.delete(link)


def frames(names: Sequence[str]) -> tuple[int, int]:
    """Frames that came out of, and went into, the tunnels at these ends; of those there are."""
    with netlink("can't read the tunnels' counters") as kernel:
        counted = [kernel.counters(name) for name in names]
    return sum(received for received, _ in counted), sum(sent for _, sent in counted)
