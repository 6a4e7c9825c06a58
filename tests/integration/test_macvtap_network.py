"""A guest above its node's uplink moves: nothing is lost, and Ferry has seen that."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lab.kinds import FabricKind
from tests.integration import quick_agent
from tests.integration.cluster.to_and_fro import nothing_is_lost_to_and_fro
from tests.integration.cluster.world import Cluster, Load, two_nodes

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]


@pytest.fixture
def uplinks(tmp_path: Path) -> Iterator[Cluster]:
    with two_nodes(f"m{os.getpid()}", FabricKind.MACVTAP, quick_agent.COMMAND, tmp_path) as made:
        yield made


def test_no_question_to_a_guest_above_an_uplink_is_lost(uplinks: Cluster) -> None:
    load = Load(udp=False, dirty_pages_per_s=500, ipv6=True)
    with uplinks.guest("above", load=load) as guest:
        for address in (guest.address, guest.address6):
            nothing_is_lost_to_and_fro(uplinks, guest, address)
