"""The bridge fabric on a bridge that the agent makes itself, and joins to other nodes by VXLAN.

All that `netfabric.bridge` says of taps, announcements and moves holds here: the VXLAN is the
bridge's uplink, and learns as a switch does.

With EVPN (`Overlay.evpn`) it learns nothing: the node's FRR hears of every entry of the bridge,
says by BGP which MACs are here (type 2), and enters where the others are. So `learn` is the
announcement that counts, and of two nodes that say they have a MAC the later one wins (RFC 7432,
section 15). A pinned entry would be said to be one that never moves, so nothing is pinned.

Nodes hear of a move one after the other. An old node that has heard of it would lose what comes
from one that hasn't: its bridge has the MAC behind the VXLAN by then, and sends nothing back to
where it came from. So from `divert` to the tunnel's end it leads what the VXLAN brings for the MAC
into the tunnel, past the bridge (`netfabric.leading`).
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Sequence
from typing import ClassVar

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec
from migrator.ports import Tunnel, WidthReport
from netfabric import filters
from netfabric.announcer import GAPS_S
from netfabric.bridge import tunnels
from netfabric.bridge.driver import BridgeFabric
from netfabric.bridge.moving import BridgeArrival, BridgeDeparture
from netfabric.leading import lead, tunnels_with_rules
from netfabric.moves import Arrival, Departure
from netfabric.taps import tunnel_name
from netfabric.threads import in_thread
from netfabric.uplinks import uplink_reason
from netfabric.vxlan.overlay import Overlay, ensure, forget_stale, remotes


class VxlanFabric(BridgeFabric):
    """See the module. `open` makes the overlay. Errors: FabricError."""

    name: ClassVar[str] = "vxlan"

    def __init__(self, overlay: Overlay, *, gaps_s: Sequence[float] = GAPS_S) -> None:
        super().__init__(gaps_s=gaps_s)
        self.overlay = overlay
        self._pins = not overlay.evpn

    async def open(self) -> None:
        """Also makes the bridge and the VXLAN, or corrects them. FabricError: what is wrong."""
        await in_thread(lambda: ensure(self.overlay))
        if self.overlay.evpn:
            await in_thread(_remove_leftovers)
        await super().open()

    async def check(self, nic: NicSpec) -> Sequence[str]:
        """Also where the NIC's frames with a VXLAN's headers wouldn't fit into what carries them:
        an end of a VXLAN must not cut frames up (RFC 7348, section 4.3).
        """
        return [*await super().check(nic), *await self._narrow_uplink(nic)]

    async def plug(self, domain: DomainName, index: int, nic: NicSpec) -> int:
        narrow = await self._narrow_uplink(nic)
        if narrow:
            raise FabricError("; ".join(narrow))
        return await super().plug(domain, index, nic)

    async def _narrow_uplink(self, nic: NicSpec) -> list[str]:
        overlay = self.overlay
        if nic.bridge != overlay.bridge or nic.mtu_bytes > overlay.mtu_bytes:
            return []  # It isn't ours, or is refused for that.
        hop = ipaddress.ip_address(overlay.local)
        reason = await in_thread(lambda: uplink_reason(hop, nic, overlay.overhead_bytes))
        return [reason] if reason is not None else []

    async def hear_wide(self, nic: NicSpec, token: bytes, timeout_s: float) -> WidthReport:
        """Where FRR knows no other node a guest would be cut off, and nobody would hear of it."""
        by_frr = self.overlay.evpn and nic.bridge == self.overlay.bridge
        if by_frr and not await in_thread(lambda: remotes(self.overlay)):
            return WidthReport(cut_off="FRR has told it of no other node by EVPN")
        return await super().hear_wide(nic, token, timeout_s)

    # --- what the kernel is told ---

    def _leave(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> tuple[tuple[BridgeDeparture, ...], list[str]]:
        self._forget_stale()
        return super()._leave(domain, nics, tunnel)

    def _come(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> tuple[tuple[BridgeArrival, ...], list[str]]:
        self._forget_stale()
        return super()._come(domain, nics, tunnel)

    def _forget_stale(self) -> None:
        """Before a tunnel's end becomes a port. Best effort: what is left costs no frame."""
        if self.overlay.evpn:
            with contextlib.suppress(FabricError):
                forget_stale(self.overlay)

    def _divert(self, departures: Sequence[BridgeDeparture]) -> None:
        super()._divert(departures)
        if not self.overlay.evpn:
            return
        for each in departures:
            ours = each.nic.bridge == self.overlay.bridge
            if ours and each.forwards and each.tunnel_index is not None:
                what = f"what the VXLAN brings for {each.nic.mac} can't be led into the tunnel"
                lead(each.tunnel, self.overlay.device, each.nic.mac, each.tunnel, what)

    def _reopen(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        if self.overlay.evpn:
            for index, _ in enumerate(nics):
                filters.remove(tunnel_name(domain, index))
        super()._reopen(domain, nics)

    def _close(self, ends: Sequence[Departure | Arrival]) -> tuple[int, int]:
        if not self.overlay.evpn:
            return super()._close(ends)
        return tunnels.close_ends(ends, _close_end)


def _close_end(tunnel: str) -> None:
    filters.remove(tunnel)
    tunnels.close_end(tunnel)


def _remove_leftovers() -> None:
    for tunnel in tunnels_with_rules():
        filters.remove(tunnel)
