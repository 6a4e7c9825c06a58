"""A NIC's macvtap on this node's uplink: made, opened, filtered, removed.

A macvtap is an interface above the uplink with the guest's MAC, and a character device that the
hypervisor reads and writes frames by. The kernel names the device in a uevent, and nowhere else
that every network namespace can see; /dev/tapN is named after an index that another namespace may
have, too. So the device's node is made here, under a name of its own.

Synchronous; belongs into a thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import stat
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from migrator.errors import FabricError
from migrator.model import NicSpec
from netfabric import filters
from netfabric.bridge.links import Netlink, netlink
from netfabric.checks import nic_reasons
from netfabric.filters import Side
from netfabric.host_routes import take_all_multicast
from netfabric.link_table import Link
from netfabric.taps import TAP_NAME, be_mute

NODES: Final = Path("/dev")
"""Where the devices' nodes are made: what else lies in memory forbids devices."""
_NODE: Final = "ferry-macvtap-"
KIND: Final = "macvtap"
FORWARDER_NAME: Final = re.compile(r"fz[0-9a-f]{10}n[0-9]{1,2}")
_NETLINK_KOBJECT_UEVENT: Final = 15
_UEVENT_S: Final = 5.0
_TUNSETIFF: Final = 0x400454CA
_TAP_NO_PI_VNET_HDR: Final = 0x0002 | 0x1000 | 0x4000


@dataclass(frozen=True, slots=True)
class MacvtapNetwork:
    """`name`: what NICs give as their `bridge`. `uplink`: the interface that they are above."""

    name: str
    uplink: str


def reasons(network: MacvtapNetwork, nic: NicSpec) -> list[str]:
    """Why the NIC can't be plugged here; empty if it can. Changes nothing. FabricError."""
    found = nic_reasons(nic) + filters.filter_reasons(nic)
    if nic.bridge != network.name:
        found.append(
            f"there is no bridge {nic.bridge} here: guests are on {network.uplink} itself, and"
            f" their network is called {network.name}"
        )
        return found
    if nic.vlan is not None:
        found.append(
            f"NIC {nic.mac} is to be in VLAN {nic.vlan}: give it a network whose uplink is that"
            " VLAN's interface"
        )
    with netlink(f"can't look at {network.uplink}") as kernel:
        uplink = kernel.find(network.uplink)
    if uplink is None:
        return [*found, f"there is no interface {network.uplink} here"]
    if not uplink.up:
        found.append(f"{network.uplink} is down")
    if uplink.master is not None:
        found.append(f"{network.uplink} is a bridge's port: nothing can be above it")
    if uplink.mtu_bytes < nic.mtu_bytes:
        found.append(
            f"{network.uplink} has an MTU of {uplink.mtu_bytes} bytes, NIC {nic.mac} needs"
            f" {nic.mtu_bytes}"
        )
    return found


def plug(network: MacvtapNetwork, tap: str, nic: NicSpec) -> int:
    """The device's descriptor (non-blocking, closed on exec). FabricError: nothing is left."""
    found = reasons(network, nic)
    if found:
        raise FabricError("; ".join(found))
    with netlink(f"can't make macvtap {tap}") as kernel:
        uplink = kernel.find(network.uplink)
        if uplink is None:
            raise FabricError(f"{network.uplink} was removed by somebody else")
        earlier = kernel.find(tap)
        if earlier is not None:
            if is_held(earlier):
                raise FabricError(
                    f"can't make macvtap {tap}: another process holds it: is the domain running"
                    " here already?"
                )
            kernel.delete(earlier)
        with _Uevents() as uevents:
            link = kernel.add(tap, KIND, link=uplink.index, macvtap_mode="bridge")
            try:
                node = _make_node(link, uevents.device_of(tap))
                kernel.set_mac(link.index, bytes.fromhex(nic.mac.replace(":", "")))
                kernel.set_mtu(link.index, nic.mtu_bytes)
                be_mute(tap)
                # Nobody tells the macvtap which groups its guest listens to, and without them
                # there is no neighbour discovery.
                take_all_multicast(link.index)
                filters.apply(tap, nic, Side.ABOVE)
                fd = _open(node, tap)
                try:
                    kernel.raise_up(link)
                except BaseException:
                    os.close(fd)
                    raise
            except BaseException:
                kernel.delete(link)
                _remove_node(link)
                if filters.wanted(nic):
                    with contextlib.suppress(FabricError):
                        filters.remove(tap)
                raise
    return fd


def give_up(fd: int, tap: str) -> None:
    """For whoever doesn't want it any more."""
    os.close(fd)
    unplug(tap)


def unplug(tap: str) -> None:
    """Remove the macvtap, its node and its rules. Idempotent."""
    with netlink(f"can't remove macvtap {tap}") as kernel:
        link = kernel.find(tap)
        if link is not None:
            _remove_node(link)
            kernel.delete(link)
    filters.remove(tap)


def node_of(tap: str) -> tuple[int, Path] | None:
    """The macvtap's interface index and its device's node, as long as it exists."""
    with netlink(f"can't look at macvtap {tap}") as kernel:
        link = kernel.find(tap)
    return None if link is None else (link.index, _node(link))


def remove_if_unheld(tap: str, index: int) -> None:
    """Remove the macvtap unless a process has its device open, or it is another one by now."""
    with netlink(f"can't look at macvtap {tap}") as kernel:
        link = kernel.find(tap)
    if link is not None and (link.kind, link.index) == (KIND, index) and not is_held(link):
        unplug(tap)


def macvtaps() -> list[Link]:
    """Ours, in this network namespace."""
    with netlink("can't list the macvtaps") as kernel:
        return [
            link for link in kernel.links() if link.kind == KIND and TAP_NAME.fullmatch(link.name)
        ]


def sweep() -> None:
    """Remove what hypervisors, and network namespaces, that are no more have left."""
    for link in macvtaps():
        remove_if_unheld(link.name, link.index)
    own = {_node(link) for link in macvtaps()}
    prefix, living = f"{_NODE}{_namespace(Path('/proc/thread-self'))}-", _living_namespaces()
    for node in NODES.glob(f"{_NODE}*-*"):
        namespace = node.name.removeprefix(_NODE).partition("-")[0]
        if node not in own and (node.name.startswith(prefix) or namespace not in living):
            with contextlib.suppress(OSError):
                node.unlink()


def remove_nodes(namespace: int) -> None:
    """Remove the devices' nodes of the network namespace with this inode, which is going away."""
    for node in NODES.glob(f"{_NODE}{namespace}-*"):
        node.unlink(missing_ok=True)


def _living_namespaces() -> set[str]:
    found: set[str] = set()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with contextlib.suppress(OSError):
                found.add(_namespace(process))
    return found


def _namespace(process: Path) -> str:
    return str((process / "ns/net").stat().st_ino)


def is_held(link: Link) -> bool:
    """Whether some process has the macvtap's device open: looks at them all."""
    try:
        device = _node(link).stat().st_rdev
    except OSError:
        return False
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and _holds(process / "fd", device):
            return True
    return False


def _holds(folder: Path, device: int) -> bool:
    try:
        for each in folder.iterdir():
            with contextlib.suppress(OSError):
                found = each.stat()
                if stat.S_ISCHR(found.st_mode) and found.st_rdev == device:
                    return True
    except OSError:  # It has ended.
        pass
    return False


def _node(link: Link) -> Path:
    """Named after the interface and its network namespace, of which /dev has all."""
    return NODES / f"{_NODE}{_namespace(Path('/proc/thread-self'))}-{link.index}"


def _make_node(link: Link, device: int) -> Path:
    node = _node(link)
    try:
        node.unlink(missing_ok=True)
        os.mknod(node, stat.S_IFCHR | 0o600, device)
    except OSError as error:
        raise FabricError(f"can't make {node}: {error.strerror}") from error
    return node


def _remove_node(link: Link) -> None:
    with contextlib.suppress(OSError):
        _node(link).unlink(missing_ok=True)


def _open(node: Path, tap: str) -> int:
    try:
        fd = os.open(node, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise FabricError(f"can't open {node}: {error.strerror}") from error
    try:
        request = struct.pack("16sH22x", tap.encode(), _TAP_NO_PI_VNET_HDR)
        fcntl.ioctl(fd, _TUNSETIFF, request)
    except OSError as error:
        os.close(fd)
        raise FabricError(f"can't set macvtap {tap} up: {error.strerror}") from error
    return fd


class _Uevents:
    """What the kernel says of new devices in this network namespace, from `with` on."""

    def __enter__(self) -> _Uevents:
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_KOBJECT_UEVENT
            )
            self._socket.bind((0, 1))
        except OSError as error:
            raise FabricError(f"can't hear of new devices: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def device_of(self, interface: str) -> int:
        """The number of the macvtap device of that interface. FabricError: not told in time."""
        deadline = time.monotonic() + _UEVENT_S
        while (left_s := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left_s)
            try:
                device = device_in(self._socket.recv(8192), interface)
            except OSError as error:
                raise FabricError(f"no device of {interface} was told: {error}") from error
            if device is not None:
                return device
        raise FabricError(f"no device of {interface} was told within {_UEVENT_S:g} s")


def device_in(uevent: bytes, interface: str) -> int | None:
    """The device's number, if the uevent says that the interface has one now. Pure."""
    fields = dict(part.split(b"=", 1) for part in uevent.split(b"\0") if b"=" in part)
    path = fields.get(b"DEVPATH", b"").decode(errors="replace")
    if fields.get(b"ACTION") != b"add" or f"/{interface}/macvtap/" not in path:
        return None
    return os.makedev(int(fields[b"MAJOR"]), int(fields[b"MINOR"]))


def uplink_of(kernel: Netlink, network: MacvtapNetwork) -> Link:
    """FabricError: it isn't there."""
    uplink = kernel.find(network.uplink)
    if uplink is None:
        raise FabricError(f"there is no interface {network.uplink} here")
    return uplink
