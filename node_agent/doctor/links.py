"""The node's own interfaces: bridges that guests use, the migration interface, what the kernel can.

Synchronous; reads by rtnetlink, and makes one link of each kind for a moment to see whether it can
be made, in a network namespace of the calling thread's own that ends with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from node_agent.doctor.findings import Finding, failure, fine, warning

_CLONE_NEWNET: Final = 0x40000000
_FLAG_UP: Final = 0x1
_MTU_USUAL: Final = 1500
"""What a NIC needs whose definition says nothing else."""
_FORWARDING: Final = {4: "ipv4/ip_forward", 6: "ipv6/conf/all/forwarding"}
_CONNECTIONS: Final = Path("/proc/sys/net/netfilter/nf_conntrack_count")
_GROUP: Final = "239.255.77.81"
_EVERYBODY: Final = "00:00:00:00:00:00"
"""A VXLAN's entry for broadcasts: where they go."""
_KERNEL: Final = (
    ("bridges", {"kind": "bridge"}, "every guest with a bridge", "modprobe bridge", True),
    (
        "VLAN-aware bridges",
        {"kind": "bridge", "br_vlan_filtering": 1},
        "NICs with a VLAN",
        "use a kernel with CONFIG_BRIDGE_VLAN_FILTERING",
        False,
    ),
    (
        "VXLAN",
        {"kind": "vxlan", "vxlan_id": 1, "vxlan_port": 1},
        "forwarding what arrives at a guest's old node",
        "modprobe vxlan",
        False,
    ),
    ("veth", {"kind": "veth", "peer": "fydoctor1"}, "the lab", "modprobe veth", False),
)


def check_kernel_links(leading: Callable[[], str] | None = None) -> list[Finding]:
    """Which kinds of links the kernel makes; and whether frames can be led from one to another.

    `leading` tries that, in the namespace of this, and says what is in the way; None: nobody needs
    it on this node.
    """
    found: list[Finding] = []

    def work() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNET) != 0:
            reason = os.strerror(ctypes.get_errno())
            found.append(failure("network rights", reason, "run the agent, and this, as root"))
            return
        found.extend(_try_kinds())
        if leading is not None:
            found.append(_led(leading()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found


def _try_kinds() -> Iterator[Finding]:
    for name, options, what_for, mend, needed in _KERNEL:
        with IPRoute() as route:
            try:
                route.link("add", ifname="fydoctor0", **options)
                route.link("del", index=route.link_lookup(ifname="fydoctor0")[0])
            except NetlinkError as error:
                detail = f"the kernel makes none ({os.strerror(error.code)}): needed for {what_for}"
                yield failure(name, detail, mend) if needed else warning(name, detail, mend)
            else:
                yield fine(name, f"for {what_for}")


def _led(obstacle: str) -> Finding:
    check, what_for = "nftables' fwd", "leading a moving guest's frames into the tunnel"
    if not obstacle:
        return fine(check, f"for {what_for}")
    return warning(
        check,
        f"{obstacle}: needed for {what_for}; without it what arrives at the old node is lost",
        "modprobe nft_fwd_netdev (CONFIG_NFT_FWD_NETDEV), and install libnftables 1.0 or newer",
    )


def check_connection_tracking() -> Finding:
    """Whether a guest's connections can be read here for its next node, and told."""
    check = "connection tracking"
    if not _CONNECTIONS.exists():
        return fine(check, "the kernel tracks no connections: no rule can depend on them")
    try:
        with NFCTSocket() as kernel:
            kernel.count()
        known = _CONNECTIONS.read_text().strip()
    except (NetlinkError, OSError) as error:
        reason = f"the kernel tracks connections, but can't be asked for them ({error})"
        mend = "modprobe nf_conntrack_netlink; else stateful rules cut what a guest brings along"
        return warning(check, reason, mend)
    return fine(check, f"guests' connections can move; {known} known now")


def check_bridges(names: frozenset[str]) -> list[Finding]:
    """The node's bridges, and those of `names` (which domains use) that are missing."""
    with IPRoute() as route:
        links = list(route.get_links())
    kinds = {link.get_attr("IFLA_IFNAME"): _kind(link) for link in links}
    found = [_bridge(link, links) for link in links if _kind(link) == "bridge"]
    for name in sorted(names - {link for link, kind in kinds.items() if kind == "bridge"}):
        mend = f"make bridge {name} here, or don't let these domains come"
        found.append(failure(f"bridge {name}", "domains use it, it isn't here", mend))
    if not found:
        mend = "make the bridge that NICs name, with the uplink to the guests' network as its port"
        found.append(warning("bridges here", "there are none", mend))
    return found


def check_routed(addresses: Sequence[str]) -> list[Finding]:
    """A node that routes for its guests: its own addresses in their network, and forwarding."""
    found: list[Finding] = []
    with IPRoute() as route:
        names = {link["index"]: link for link in route.get_links()}
        held = {entry.get_attr("IFA_ADDRESS"): entry["index"] for entry in route.get_addr()}
    for address in addresses:
        check = f"routed network, {address}"
        link = names.get(held.get(str(ipaddress.ip_address(address)), -1))
        if link is None:
            mend = f"give an interface {address}, or correct fabric.local and fabric.local6"
            found.append(failure(check, "no interface of this node has it", mend))
            continue
        name, mtu = link.get_attr("IFLA_IFNAME"), link.get_attr("IFLA_MTU")
        if link["flags"] & _FLAG_UP:
            found.append(fine(check, f"on {name}, MTU {mtu}"))
        else:
            found.append(failure(check, f"{name} is down", f"ip link set {name} up"))
    versions = {ipaddress.ip_address(address).version for address in addresses}
    for version in sorted(versions):
        setting = _FORWARDING[version]
        if Path("/proc/sys/net", setting).read_text().strip() == "0":
            mend = f"sysctl -w net.{setting.replace('/', '.')}=1; the agent does it when it starts"
            found.append(warning(f"IPv{version} forwarding", "it is off", mend))
    return found


def check_overlay(bridge: str, local: str, needed_bytes: int) -> Finding:
    """Whether a full frame of the overlay leaves by the interface with its end's address."""
    check = f"overlay {bridge}"
    with IPRoute() as route:
        held = {entry.get_attr("IFA_ADDRESS"): entry["index"] for entry in route.get_addr()}
        index = held.get(str(ipaddress.ip_address(local)))
        link = None if index is None else next(iter(route.get_links(index)), None)
    if link is None:
        mend = f"give an interface {local}, or correct fabric.local"
        return failure(check, f"no interface of this node has {local}", mend)
    name, mtu = link.get_attr("IFLA_IFNAME"), link.get_attr("IFLA_MTU")
    if mtu < needed_bytes:
        return failure(
            check,
            f"its full frames have {needed_bytes} bytes with their headers, {name} has an MTU of"
            f" {mtu}",
            f"ip link set {name} mtu {needed_bytes}, on every node and on the way; or a smaller"
            " fabric.mtu_bytes, and guests with that MTU",
        )
    return fine(check, f"leaves by {name}, MTU {mtu}")


def check_uplink(name: str) -> Finding:
    """An interface that guests are above, each by its own macvtap."""
    check = f"uplink {name}"
    with IPRoute() as route:
        found = [link for link in route.get_links() if link.get_attr("IFLA_IFNAME") == name]
    if not found:
        mend = "correct fabric.uplink, or make the interface"
        return failure(check, "there is no such interface", mend)
    link = found[0]
    if link.get_attr("IFLA_MASTER") is not None:
        return failure(check, "it is a bridge's or bond's port", f"ip link set {name} nomaster")
    if not link["flags"] & _FLAG_UP:
        return failure(check, "it is down", f"ip link set {name} up")
    return fine(check, f"MTU {link.get_attr('IFLA_MTU')}")


def _bridge(link: Any, links: list[Any]) -> Finding:
    name = link.get_attr("IFLA_IFNAME")
    check = f"bridge {name}"
    data = link.get_attr("IFLA_LINKINFO").get_attr("IFLA_INFO_DATA")
    ports = [each for each in links if each.get_attr("IFLA_MASTER") == link["index"]]
    uplinks = [port for port in ports if _kind(port) != "tun"]
    mtu = link.get_attr("IFLA_MTU")
    detail = f"MTU {mtu}, {len(ports)} ports"
    if not link["flags"] & _FLAG_UP:
        return failure(check, "it is down", f"ip link set {name} up")
    if not uplinks:
        return warning(
            check, f"{detail}, none leads out of this node", f"ip link set UPLINK master {name}"
        )
    down = [port.get_attr("IFLA_IFNAME") for port in uplinks if not port["flags"] & _FLAG_UP]
    if down:
        return failure(check, f"{', '.join(down)} is down", f"ip link set {down[0]} up")
    narrow = [port.get_attr("IFLA_IFNAME") for port in uplinks if port.get_attr("IFLA_MTU") < mtu]
    if narrow:
        return failure(
            check,
            f"MTU {mtu}, but {', '.join(narrow)} is narrower",
            f"ip link set {narrow[0]} mtu {mtu}",
        )
    if mtu < _MTU_USUAL:
        return warning(
            check,
            f"{detail}: a NIC that isn't defined with less needs {_MTU_USUAL}, and is refused here",
            f"ip link set {name} mtu {_MTU_USUAL}, and its ports as well",
        )
    delay_s = (data.get_attr("IFLA_BR_FORWARD_DELAY") or 0) / 100
    if data.get_attr("IFLA_BR_STP_STATE"):
        return warning(
            check,
            f"{detail}; spanning tree is on: a guest's port forwards after {2 * delay_s:.0f} s",
            f"ip link set {name} type bridge stp_state 0, unless it closes a loop",
        )
    return fine(check, detail)


def check_evpn(bridge: str) -> Finding:
    """Whether the node's FRR has told the VXLAN of this bridge of any other node."""
    check = f"EVPN of bridge {bridge}"
    with IPRoute() as route:
        masters = route.link_lookup(ifname=bridge)
        ports = [
            link["index"]
            for link in route.get_links()
            if _kind(link) == "vxlan" and link.get_attr("IFLA_MASTER") in masters
        ]
        known = {
            entry.get_attr("NDA_DST")
            for entry in route.fdb("dump")
            if entry["ifindex"] in ports and entry.get_attr("NDA_LLADDR") == _EVERYBODY
        } - {None}
    if not ports:
        return failure(check, "it has no VXLAN", "start the agent, which makes it")
    if known:
        return fine(check, f"leads to {', '.join(sorted(known))}")
    return failure(
        check,
        "its VXLAN leads to no other node: guests here are cut off",
        "systemctl status frr; in `vtysh -c 'show bgp l2vpn evpn summary'` its neighbours must be"
        " up; bgpd needs `advertise-all-vni`, and all nodes the same identifier",
    )


def mtu_towards(address: str) -> int:
    """The MTU of the interface that has `address`; 1500 if none has it."""
    with IPRoute() as route:
        for entry in route.get_addr():
            if entry.get_attr("IFA_ADDRESS") == address:
                links = list(route.get_links(entry["index"]))
                return int(links[0].get_attr("IFLA_MTU"))
    return 1500


def check_multicast(address: str) -> Finding:
    """Whether what this node says to a group comes back to it by the interface of `address`."""
    check = "multicast"
    mend = f"ip link set INTERFACE multicast on, and allow {_GROUP.rpartition('.')[0]}.0/24 there"
    try:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            own = socket.inet_aton(address)
            listener.bind((_GROUP, 0))
            membership = struct.pack("4s4s", socket.inet_aton(_GROUP), own)
            listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
            listener.settimeout(1.0)
            speaker = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            speaker.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, own)
            speaker.sendto(b"ferry", (_GROUP, listener.getsockname()[1]))
            listener.recvfrom(16)
    except TimeoutError:
        return warning(check, f"what is sent by {address} isn't heard: no discovery", mend)
    except OSError as error:
        return warning(check, f"{address}: {error.strerror or error}: no discovery", mend)
    return fine(check, f"sent and heard by {address}")


def _kind(link: Any) -> str:
    information = link.get_attr("IFLA_LINKINFO")
    return (information.get_attr("IFLA_INFO_KIND") or "") if information is not None else ""
