"""What the fabric asks of and tells the kernel by rtnetlink: links, bridge ports, learnt MACs.

Everything here is synchronous and belongs into a thread. What changes something is 1 to 3 ms, most
of it pyroute2's own; links are read by `link_table`. pyroute2's exceptions end here: FabricError
goes up.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import ipaddress
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from migrator.errors import FabricError
from netfabric.exits import Exit
from netfabric.link_table import Link, all_links, link_named
from netfabric.taps import TAP_MTU_BYTES_MAX, TAP_NAME, TUNNEL_NAME
from netfabric.vlan_table import Vlans, port_vlans

_ADDRESS_GENERATION_NONE: Final = 1
_EVERYBODY: Final = "00:00:00:00:00:00"
"""A VXLAN's entry for MACs that it doesn't know, and for broadcasts."""


class Netlink:
    """One rtnetlink conversation. Use `netlink()`, within one thread."""

    def __init__(self, resources: contextlib.ExitStack) -> None:
        self._resources = resources

    @functools.cached_property
    def _route(self) -> Any:
        """pyroute2's, which takes a millisecond to begin with."""
        return self._resources.enter_context(IPRoute())

    def links(self) -> list[Link]:
        return all_links()

    def find(self, name: str) -> Link | None:
        """The link of that name; None if there is none."""
        return link_named(name)

    def vlans(self) -> dict[int, tuple[Vlans, ...]]:
        """The VLANs of every bridge port by the port's index."""
        return port_vlans()

    def attach(self, port: Link, bridge: Link, mac: bytes, *, open_now: bool = True) -> None:
        """Make a tap a port of the bridge, with the bridge's MTU, and bring it up (`open_now`).

        Its MTU is the bridge's and not the NIC's (which is no larger): a bridge that nobody gave
        an MTU takes its ports' smallest, so a small NIC would shrink it for everybody.
        IPv6 generates no address on it: the host has nothing to say to the guest here.
        """
        no_address = {"attrs": [["IFLA_INET6_ADDR_GEN_MODE", _ADDRESS_GENERATION_NONE]]}
        with contextlib.suppress(NetlinkError):  # a kernel without IPv6 refuses
            self._route.link(
                "set", index=port.index, IFLA_AF_SPEC={"attrs": [["AF_INET6", no_address]]}
            )
        self._route.link(
            "set",
            index=port.index,
            address=mac.hex(":"),
            mtu=min(bridge.mtu_bytes, TAP_MTU_BYTES_MAX),
        )
        self._route.link("set", index=port.index, master=bridge.index)
        if open_now:
            self.raise_up(port)

    def raise_up(self, link: Link) -> None:
        self._route.link("set", index=link.index, state="up")

    def add(self, name: str, kind: str, **options: Any) -> Link:
        """Make a link; its kind's options are named as pyroute2 names them."""
        self._route.link("add", ifname=name, kind=kind, **options)
        found = self.find(name)
        if found is None:
            raise FabricError(f"{name} was removed by somebody else")
        return found

    def add_vxlan(
        self,
        name: str,
        identifier: int,
        *,
        local: str,
        port: int,
        learns: bool,
        remote: str | None = None,
    ) -> Link:
        """Make a VXLAN between these addresses, down.

        `remote`: to whom everything goes that no entry is about; None: to nobody yet.
        """
        suffix = "" if ipaddress.ip_address(local).version == 4 else "6"
        ends = {f"vxlan_local{suffix}": local}
        if remote is not None:
            ends[f"vxlan_group{suffix}"] = remote
        return self.add(
            name,
            "vxlan",
            vxlan_id=identifier,
            vxlan_port=port,
            vxlan_learning=int(learns),
            **ends,
        )

    def counters(self, name: str) -> tuple[int, int]:
        """Frames received and sent by the link of that name; zeros if there is none."""
        try:
            messages = list(self._route.link("get", ifname=name))
        except NetlinkError:
            return 0, 0
        statistics = messages[0].get_attr("IFLA_STATS64")
        return statistics["rx_packets"], statistics["tx_packets"]

    def put_into_vlan(self, index: int, vlan_id: int) -> None:
        """Make a port of a VLAN-aware bridge one of this VLAN alone, untagged."""
        for vlans in self.vlans().get(index, ()):
            for other in range(vlans.first, vlans.last + 1):
                self._route.vlan_filter("del", index=index, vlan_info={"vid": other})
        flags = ["pvid", "untagged"]
        self._route.vlan_filter("add", index=index, vlan_info={"vid": vlan_id, "flags": flags})

    def limit(self, index: int, bytes_per_s: int, *, burst_bytes: int, queue_bytes: int) -> None:
        """Shape what leaves by an interface."""
        self._route.tc(
            "replace", "tbf", index=index, rate=bytes_per_s, burst=burst_bytes, limit=queue_bytes
        )

    def set_mac(self, index: int, mac: bytes) -> None:
        self._route.link("set", index=index, address=mac.hex(":"))

    def set_mtu(self, index: int, mtu_bytes: int) -> None:
        self._route.link("set", index=index, mtu=mtu_bytes)

    def vxlan_of(self, name: str) -> tuple[int, str, int, bool] | None:
        """Identifier, own address, UDP port of a VXLAN, and whether it learns; None: no VXLAN."""
        try:
            messages = list(self._route.link("get", ifname=name))
        except NetlinkError:
            return None
        information = messages[0].get_attr("IFLA_LINKINFO")
        data = information.get_attr("IFLA_INFO_DATA") if information is not None else None
        if data is None or information.get_attr("IFLA_INFO_KIND") != "vxlan":
            return None
        local = data.get_attr("IFLA_VXLAN_LOCAL") or data.get_attr("IFLA_VXLAN_LOCAL6")
        return (
            data.get_attr("IFLA_VXLAN_ID"),
            local,
            data.get_attr("IFLA_VXLAN_PORT"),
            bool(data.get_attr("IFLA_VXLAN_LEARNING")),
        )

    def remotes(self, index: int) -> list[str]:
        """To whom the VXLAN of that index sends what is for everybody."""
        return [
            entry.get_attr("NDA_DST")
            for entry in self._route.fdb("dump", ifindex=index)
            if entry["ifindex"] == index
            and entry.get_attr("NDA_LLADDR") == _EVERYBODY
            and entry.get_attr("NDA_DST") is not None
        ]

    def set_remotes(self, name: str, remotes: Sequence[str]) -> None:
        """To whom a VXLAN sends what is for everybody, or for nobody that it knows."""
        (index,) = self._route.link_lookup(ifname=name)
        known = self.remotes(index)
        for remote in remotes:
            if remote not in known:
                self.set_remote(index, _EVERYBODY, remote)
        for remote in known:
            if remote not in remotes:
                self._route.fdb("del", ifindex=index, lladdr=_EVERYBODY, dst=remote)

    def set_remote(self, index: int, mac: str, remote: str) -> None:
        """To whom a VXLAN sends what is for that MAC."""
        self._route.fdb("append", ifindex=index, lladdr=mac, dst=remote)

    def forget_remote(self, vxlan: Link, bridge: Link) -> None:
        """What a VXLAN has of MACs that its bridge has at other ports."""
        entries = [
            (each.get_attr("NDA_LLADDR"), each)
            for each in self._route.fdb("dump")
            if each.get_attr("NDA_VLAN") is None  # Else it's of no bridge without VLANs.
        ]
        here = {
            mac
            for mac, each in entries
            if each.get_attr("NDA_MASTER") == bridge.index and each["ifindex"] != vxlan.index
        }
        for mac, each in entries:
            remote = each.get_attr("NDA_DST")
            if each["ifindex"] == vxlan.index and remote is not None and mac in here:
                with contextlib.suppress(NetlinkError):  # FRR was quicker.
                    self._route.fdb("del", ifindex=vxlan.index, lladdr=mac, dst=remote)

    def set_queue(self, index: int, frames: int) -> None:
        """How many frames may wait in an interface for whoever reads them."""
        self._route.link("set", index=index, txqlen=frames)

    def learnt_at(self, bridge: Link, mac: str, vlan_id: int | None) -> str:
        """The port at which the bridge has the MAC, in its VLAN; "" if it has none."""
        vlan_id = (vlan_id or bridge.vlan_default) if bridge.vlan_filtering else None
        for entry in self._route.fdb("dump"):
            if (
                entry.get_attr("NDA_LLADDR") == mac
                and entry.get_attr("NDA_MASTER") == bridge.index
                and entry.get_attr("NDA_VLAN") == vlan_id
            ):
                with contextlib.suppress(OSError):  # It was removed meanwhile.
                    return socket.if_indextoname(entry["ifindex"])
        return ""

    def delete(self, link: Link) -> None:
        """Remove a link; no error if it is gone already."""
        try:
            self._route.link("del", index=link.index)
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise


@contextlib.contextmanager
def netlink(what: str) -> Iterator[Netlink]:
    """A conversation with the kernel in this thread's network namespace.

    FabricError, beginning with `what`, for whatever the kernel refuses.
    """
    try:
        with contextlib.ExitStack() as resources:
            yield Netlink(resources)
    except NetlinkError as error:
        raise FabricError(f"{what}: {os.strerror(error.code)}") from error
    except OSError as error:
        raise FabricError(f"{what}: {error.strerror or error}") from error


def index_of(interface: str) -> int | None:
    """Its index; None: there is none of that name here. FabricError."""
    with netlink(f"can't look at {interface}") as kernel:
        link = kernel.find(interface)
    return None if link is None else link.index


@dataclass(frozen=True, slots=True)
class Exits:
    """Where a tap's frames would be flooded to: the uplinks, and other guests' taps."""

    tap_index: int
    uplinks: tuple[Exit, ...]
    guests: tuple[Exit, ...]
    tap_closed: bool = False
    """The bridge floods nothing to the tap: it was made for a guest that was to come."""


@dataclass(frozen=True, slots=True)
class Uplink:
    """A way out of a node's bridge, and the MAC of its port."""

    exit: Exit
    mac: str


def bridge_uplinks(kernel: Netlink, bridge: Link, vlan_id: int | None = None) -> list[Uplink]:
    """The bridge's forwarding ports that are neither guests' taps nor our tunnels.

    Under VLAN filtering those in `vlan_id` (None: in the VLAN that a new port is put into).
    """
    vlans = kernel.vlans() if bridge.vlan_filtering else None
    if vlan_id is None:
        vlan_id = bridge.vlan_default
    found: list[Uplink] = []
    for link in kernel.links():
        ours = TAP_NAME.fullmatch(link.name) or TUNNEL_NAME.fullmatch(link.name)
        if link.master == bridge.index and link.forwarding and not ours:
            way = _exit_in(link, bridge, vlan_id, vlans)
            if way is not None:
                found.append(Uplink(way, link.mac))
    return found


def shut_in(bridge_name: str, vlan_id: int | None = None) -> str:
    """Why nothing leaves the node by its bridge, though it has a way out; "" if something does.

    Also "" where it has none at all: it may be meant so. FabricError.
    """
    with netlink(f"can't look at {bridge_name}") as kernel:
        bridge = kernel.find(bridge_name)
        if bridge is None or bridge_uplinks(kernel, bridge, vlan_id):
            return ""
        ports = [
            link
            for link in kernel.links()
            if link.master == bridge.index
            and not TAP_NAME.fullmatch(link.name)
            and not TUNNEL_NAME.fullmatch(link.name)
        ]
    return why_shut(ports, vlan_id)


def why_shut(ports: Sequence[Link], vlan_id: int | None) -> str:
    """Of a bridge's ways out, none of which leads out in the VLAN. Pure."""
    if not ports:
        return ""
    open_now = [link.name for link in ports if link.forwarding]
    if open_now:
        vlan = f"VLAN {vlan_id}" if vlan_id is not None else "the VLAN of untagged frames"
        return f"its uplink {', '.join(open_now)} isn't in {vlan} (bridge vlan show)"
    return f"its uplink {', '.join(link.name for link in ports)} is down or blocked"


def find_exits(kernel: Netlink, tap: str) -> Exits | None:
    """Where the bridge would flood a broadcast that came in by this tap; None: no tap, no bridge.

    Every other forwarding port of the bridge, on the VLAN that the tap's untagged frames are in.
    """
    links = kernel.links()
    own = next((link for link in links if link.name == tap), None)
    bridge = next((link for link in links if own is not None and link.index == own.master), None)
    if own is None or bridge is None:
        return None
    others = [
        link
        for link in links
        if link.master == bridge.index
        and link.index != own.index
        and link.forwarding
        and not TUNNEL_NAME.fullmatch(link.name)
    ]
    vlans = kernel.vlans() if bridge.vlan_filtering else None
    uplinks: list[Exit] = []
    guests: list[Exit] = []
    for link in others:
        way = _exit(link, own, bridge, vlans)
        if way is not None:
            (guests if TAP_NAME.fullmatch(link.name) else uplinks).append(way)
    return Exits(own.index, tuple(uplinks), tuple(guests), tap_closed=not own.floods)


def _exit(
    link: Link, own: Link, bridge: Link, vlans: dict[int, tuple[Vlans, ...]] | None
) -> Exit | None:
    if vlans is None:
        return Exit(link.name)
    vlan_id = next((vlan.first for vlan in vlans.get(own.index, ()) if vlan.pvid), None)
    return _exit_in(link, bridge, vlan_id, vlans)


def _exit_in(
    link: Link, bridge: Link, vlan_id: int | None, vlans: dict[int, tuple[Vlans, ...]] | None
) -> Exit | None:
    """The way out by `link` for frames of a VLAN; None if it isn't in it."""
    if vlans is None:
        return Exit(link.name)
    member = next((each for each in vlans.get(link.index, ()) if vlan_id in each), None)
    if member is None:
        return None
    if member.untagged:
        return Exit(link.name, vlan_aware=True)
    return Exit(link.name, vlan_id, bridge.vlan_ethertype, vlan_aware=True)
