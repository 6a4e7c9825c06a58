"""A guest that moves there and back under questions: none is lost, and Ferry has seen that."""

from __future__ import annotations

from typing import Final

from migrator.model import Cutover, Migration
from tests.integration.cluster.pings import PingWatch
from tests.integration.cluster.world import Cluster, Guest, describe, eventually

BEFORE: Final = 100
BETWEEN: Final = 200
"""Questions that are answered before the first move, and after each."""


def cutover_of(cluster: Cluster, move: Migration) -> Cutover:
    """The move's, once it is recorded."""
    return eventually(
        f"the cutover of {move.id} is recorded", lambda: cluster.migration(move.id).cutover
    )


def verified(cluster: Cluster, move: Migration) -> Cutover:
    """The move's cutover, which is verified and without problems."""
    cutover = cutover_of(cluster, move)
    assert cutover.verified_ms is not None, (describe(move), cutover)
    assert not cutover.problems, cutover
    return cutover


def nothing_is_lost_to_and_fro(cluster: Cluster, guest: Guest, address: str) -> list[Cutover]:
    """The guest, which is at n1, goes to n2 and comes back, asked for one of its addresses."""
    cutovers: list[Cutover] = []
    with PingWatch(cluster.plan.namespace("client"), address) as pings:
        pings.wait_answers(BEFORE)
        for node in ("n2", "n1"):
            cutovers.append(verified(cluster, cluster.move(guest.name, node)))
            pings.wait_answers(BETWEEN)
    resumed_at_s = [each.resumed_at_s for each in cutovers]
    outcome = (pings.lost, pings.duplicates, pings.reordered)
    assert outcome == (0, 0, 0), (outcome, pings.story(resumed_at_s))
    return cutovers
