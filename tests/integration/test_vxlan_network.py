"""A guest moves between nodes that share no layer 2, by an overlay: nothing is lost.

Its ends know each other and learn, or FRR tells them where MACs are (EVPN, routes of type 2).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from deploy import lab
from deploy.lab.cables import NODE_UPLINK
from deploy.lab.kinds import OVERLAY_FABRICS, OVERLAY_LINK_BYTES, FabricKind
from tests.integration import quick_agent
from tests.integration.cluster.to_and_fro import nothing_is_lost_to_and_fro
from tests.integration.cluster.world import Cluster, Load, eventually, two_nodes
from tests.integration.test_routed_network import in_lab, refusals

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

NARROW_BYTES = OVERLAY_LINK_BYTES - 50


@pytest.fixture(scope="module", params=OVERLAY_FABRICS, ids=str)
def overlay(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A lab whose guests' network is an overlay; its client is an end of it, too. One end, and what
    the others know of it, came later than the rest.
    """
    name, folder = f"v{os.getpid()}", tmp_path_factory.mktemp("holds")
    try:
        lab.up(name, nodes=1, fabric=request.param, agent_command=quick_agent.COMMAND)
        with two_nodes(name, request.param, quick_agent.COMMAND, folder) as made:
            yield made
    finally:
        lab.down(name)


def test_no_question_to_a_guest_in_an_overlay_is_lost(
    overlay: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    with overlay.guest("over", load=Load(udp=False, dirty_pages_per_s=500, ipv6=True)) as guest:
        cutovers = [
            cutover
            for address in (guest.address, guest.address6)
            for cutover in nothing_is_lost_to_and_fro(overlay, guest, address)
        ]
        guest.verify()
    with capsys.disabled():
        verified = ", ".join(f"{each.verified_ms or -1:.0f}" for each in cutovers)
        print(f"\n{overlay.plan.fabric}: verified after {verified} ms")


def narrow(cluster: Cluster, where: str, interface: str, mtu_bytes: int) -> None:
    in_lab(cluster, where, "ip", "link", "set", interface, "mtu", str(mtu_bytes))


@pytest.mark.parametrize("overlay", [FabricKind.VXLAN], indirect=True, ids=str)
def test_a_way_without_room_for_the_overlays_headers_is_refused(overlay: Cluster) -> None:
    with overlay.guest("wide", load=Load(udp=False, dirty_pages_per_s=0)):
        # What leaves n1 with a VXLAN's headers is too long for the router's port.
        narrow(overlay, "router", "g-n1", NARROW_BYTES)
        try:
            (reason,) = eventually("n2 is out of reach", lambda: refusals(overlay, "wide", "n2"))
            assert "doesn't carry frames of 1500 bytes to n2" in reason
        finally:
            narrow(overlay, "router", "g-n1", OVERLAY_LINK_BYTES)
        eventually("n2 is reached", lambda: not refusals(overlay, "wide", "n2"))
        # n2's own interface is too narrow: nobody need send anything to know that.
        narrow(overlay, "n2", NODE_UPLINK, NARROW_BYTES)
        try:
            reasons = refusals(overlay, "wide", "n2")
            assert any(f"{NODE_UPLINK} has an MTU of {NARROW_BYTES}" in each for each in reasons)
        finally:
            narrow(overlay, "n2", NODE_UPLINK, OVERLAY_LINK_BYTES)
        eventually("n2 is wide again", lambda: not refusals(overlay, "wide", "n2"))
