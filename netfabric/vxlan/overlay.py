"""One node's end of the overlay: a bridge for its guests, and a VXLAN to every other node.

    guest ── tap ── BRIDGE ── fyo-BRIDGE ═══ UDP ═══ each remote

What is for everybody, or for a MAC that nobody has heard yet, goes to each remote; after that the
VXLAN knows by itself where a MAC was last heard from. So a gratuitous ARP moves a guest in it as in
any switch: nothing else has to be told.

Level-triggered: `ensure` makes what is missing and corrects what differs, and takes nothing from
guests that run. The bridge stays when the agent ends. Synchronous; belongs into a thread.
"""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass
from typing import Final, Protocol

from migrator.errors import FabricError
from netfabric.bridge.links import Netlink, netlink
from netfabric.rtnetlink import set_port
from netfabric.taps import made_mac

OVERHEAD_BYTES: Final = {4: 50, 6: 70}
"""Outer Ethernet, IP, UDP and VXLAN headers, by the version of the outer IP (RFC 7348)."""


class OverlayTable(Protocol):
    """What of the configuration's fabric table is about the overlay."""

    @property
    def bridge(self) -> str: ...
    @property
    def identifier(self) -> int: ...
    @property
    def local(self) -> str: ...
    @property
    def remotes(self) -> tuple[str, ...]: ...
    @property
    def port(self) -> int: ...
    @property
    def mtu_bytes(self) -> int: ...
    @property
    def evpn(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Overlay:
    """The overlay as one node sees it. `mtu_bytes`: of the guests' network, without overhead."""

    bridge: str
    identifier: int
    local: str
    remotes: tuple[str, ...]
    port: int = 4789
    mtu_bytes: int = 1450
    evpn: bool = False
    """The node's FRR says where MACs are, and to whom broadcasts go: no remotes, no learning."""

    @classmethod
    def of(cls, table: OverlayTable, address: str) -> Overlay:
        """As a node's configuration has it; `address` is its end where that names none."""
        local = table.local or address
        return cls(
            bridge=table.bridge,
            identifier=table.identifier,
            local=local,
            remotes=table.remotes,
            port=table.port,
            mtu_bytes=table.mtu_bytes,
            evpn=table.evpn,
        )

    @property
    def overhead_bytes(self) -> int:
        """What each packet grows by."""
        return OVERHEAD_BYTES[ipaddress.ip_address(self.local).version]

    @property
    def carried_bytes(self) -> int:
        """The MTU that what carries it must have."""
        return self.mtu_bytes + self.overhead_bytes

    @property
    def device(self) -> str:
        """The VXLAN's interface."""
        digest = hashlib.blake2b(self.bridge.encode(), digest_size=5).hexdigest()
        return f"fyo{digest}"


def overlay_reasons(overlay: Overlay) -> list[str]:
    """What is wrong with it wherever it is. Pure."""
    found: list[str] = []
    if not 1 <= overlay.identifier < 1 << 24:
        found.append(f"identifier {overlay.identifier} must be 1 to {(1 << 24) - 1}")
    versions = set()
    for text in (overlay.local, *overlay.remotes):
        try:
            versions.add(ipaddress.ip_address(text).version)
        except ValueError:
            found.append(f"{text!r} is not an IPv4 or IPv6 address")
    if len(versions) > 1:
        found.append("local and remotes must be all IPv4 or all IPv6")
    if overlay.local in overlay.remotes:
        found.append(f"{overlay.local} is this node itself: leave it out of the remotes")
    if overlay.evpn and overlay.remotes:
        found.append("with EVPN, FRR knows the remotes: leave them out")
    if len(set(overlay.remotes)) < len(overlay.remotes):
        found.append("a remote is listed twice")
    return found


def remotes(overlay: Overlay) -> list[str]:
    """To which nodes it leads now, as configured or as FRR has said. FabricError."""
    with netlink(f"can't look at {overlay.device}") as kernel:
        device = kernel.find(overlay.device)
        return kernel.remotes(device.index) if device is not None else []


def forget_stale(overlay: Overlay) -> None:
    """With EVPN: where MACs were before they came to this node's own ports. FabricError.

    FRR leaves that in the VXLAN. Nothing is sent by it, but FRR reads it again whenever a VXLAN
    becomes a port of the bridge, as a tunnel's end does: it believes that those MACs have left,
    withdraws them, finds them here, and announces them anew, as if they had never moved. What is
    sent to them meanwhile goes everywhere, and by the tunnel it would come twice.
    """
    with netlink(f"can't look at {overlay.device}") as kernel:
        device, bridge = kernel.find(overlay.device), kernel.find(overlay.bridge)
        if device is not None and bridge is not None:
            kernel.forget_remote(device, bridge)


def ensure(overlay: Overlay) -> None:
    """Make it. FabricError: what is wrong, or what the kernel refuses; the next call goes on."""
    reasons = overlay_reasons(overlay)
    if reasons:
        raise FabricError("fabric: " + "; ".join(reasons))
    with netlink(f"can't make the overlay {overlay.bridge}") as kernel:
        _ensure_bridge(kernel, overlay)
        _ensure_device(kernel, overlay)
        if overlay.evpn:
            device = kernel.find(overlay.device)
            if device is not None:
                set_port(device.index, floods=True, learns=False)
        else:
            kernel.set_remotes(overlay.device, overlay.remotes)


def _ensure_bridge(kernel: Netlink, overlay: Overlay) -> None:
    found = kernel.find(overlay.bridge)
    if found is None:
        found = kernel.add(
            overlay.bridge,
            "bridge",
            br_stp_state=0,
            br_forward_delay=0,
            br_mcast_snooping=0,
        )
    elif found.kind != "bridge":
        raise FabricError(f"{overlay.bridge} is there already, and no bridge")
    kernel.set_mtu(found.index, overlay.mtu_bytes)
    kernel.raise_up(found)


def _ensure_device(kernel: Netlink, overlay: Overlay) -> None:
    bridge, device = kernel.find(overlay.bridge), kernel.find(overlay.device)
    if bridge is None:
        raise FabricError(f"{overlay.bridge} was removed by somebody else")
    wanted = (overlay.identifier, overlay.local, overlay.port, not overlay.evpn)
    if device is not None and kernel.vxlan_of(overlay.device) != wanted:
        kernel.delete(device)
        device = None
    if device is None:
        device = kernel.add_vxlan(
            overlay.device,
            overlay.identifier,
            local=overlay.local,
            port=overlay.port,
            learns=not overlay.evpn,
        )
    kernel.attach(device, bridge, made_mac(overlay.local))
