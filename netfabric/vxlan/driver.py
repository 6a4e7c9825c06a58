"""The bridge fabric on a bridge that the agent makes itself, and joins to other nodes by VXLAN.

All that `netfabric.bridge` says of taps, announcements and moves holds here: the VXLAN is the
bridge's uplink, and learns as a switch does.

With EVPN (`Overlay.evpn`) it learns nothing: the node's FRR hears of every entry of the bridge,
says by BGP which MACs are here (type 2), and enters where the others are. So `learn` is the
announcement that counts, and of two nodes that say they have a MAC the later one wins (RFC 7432,
section 15). A pinned entry would be said to be one that never moves, so nothing is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from migrator.model import NicSpec
from migrator.ports import WidthReport
from netfabric.announcer import GAPS_S
from netfabric.bridge.driver import BridgeFabric
from netfabric.threads import in_thread
from netfabric.vxlan.overlay import Overlay, ensure, remotes


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
        await super().open()

    async def hear_wide(self, nic: NicSpec, token: bytes, timeout_s: float) -> WidthReport:
        """Where FRR knows no other node a guest would be cut off, and nobody would hear of it."""
        by_frr = self.overlay.evpn and nic.bridge == self.overlay.bridge
        if by_frr and not await in_thread(lambda: remotes(self.overlay)):
            return WidthReport(cut_off="FRR has told it of no other node by EVPN")
        return await super().hear_wide(nic, token, timeout_s)
