"""A guest above its node's uplink moves: nothing is lost, and Ferry has seen that."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lab.plan import FabricKind
from migrator.model import Cutover, Migration
from tests.integration import quick_agent
from tests.integration.cluster.pings import PingWatch
from tests.integration.cluster.world import Cluster, Load, describe, eventually, two_nodes

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]


@pytest.fixture
def uplinks(tmp_path: Path) -> Iterator[Cluster]:
    with two_nodes(f"m{os.getpid()}", FabricKind.MACVTAP, quick_agent.COMMAND, tmp_path) as made:
        yield made


def cutover_of(cluster: Cluster, move: Migration) -> Cutover:
    return eventually(
        f"the cutover of {move.id} is recorded", lambda: cluster.migration(move.id).cutover
    )


def test_no_question_to_a_guest_above_an_uplink_is_lost(uplinks: Cluster) -> None:
    client = uplinks.plan.namespace("client")
    load = Load(udp=False, dirty_pages_per_s=500, ipv6=True)
    with uplinks.guest("above", load=load) as guest:
        for address in (guest.address, guest.address6):
            with PingWatch(client, address) as pings:
                pings.wait_answers(100)
                resumed_at_s: list[float] = []
                for node in ("n2", "n1"):
                    move = uplinks.move("above", node)
                    cutover = cutover_of(uplinks, move)
                    assert cutover.verified_ms is not None, (describe(move), cutover)
                    assert not cutover.problems, cutover
                    resumed_at_s.append(cutover.resumed_at_s)
                    pings.wait_answers(200)
            assert (pings.lost, pings.duplicates, pings.reordered) == (0, 0, 0), pings.story(
                resumed_at_s
            )
