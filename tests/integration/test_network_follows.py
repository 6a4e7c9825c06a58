"""The network follows a guest: nothing is lost, nothing comes twice, and Ferry has seen that."""

from __future__ import annotations

import concurrent.futures
import ipaddress
import statistics
from collections.abc import Callable

import pytest

from deploy.lab.enter import enter
from migrator.model import Migration
from netfabric import filters
from tests.integration.cluster.pings import PingWatch
from tests.integration.cluster.to_and_fro import cutover_of
from tests.integration.cluster.world import Cluster, Load, describe

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

MOVES = 8


def test_no_question_to_a_migrating_guest_is_lost(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    client = cluster.plan.namespace("client")
    quiet = Load(udp=False, dirty_pages_per_s=500, ipv6=True)
    with cluster.guest("net", load=quiet) as guest:
        cluster.move("net", "n2")
        cluster.move("net", "n1")
        moves: list[Migration] = []
        with PingWatch(client, guest.address) as pings:
            pings.wait_answers(300)
            for number in range(MOVES):
                moves.append(cluster.move("net", "n2" if number % 2 == 0 else "n1"))
                pings.wait_answers(200)
        cutovers = [cutover_of(cluster, move) for move in moves]
        for move, cutover in zip(moves, cutovers, strict=True):
            assert cutover.verified_ms is not None, (describe(move), cutover)
            assert not cutover.problems, cutover
            both = {ipaddress.ip_address(each) for each in (guest.address, guest.address6)}
            for witness in cutover.witnesses:  # By ARP the one, by neighbour discovery the other.
                assert set(map(ipaddress.ip_address, witness.answered)) == both, cutover
    first = [each.first_announcement_ms or -1.0 for each in cutovers]
    verified = [each.verified_ms or -1.0 for each in cutovers]
    to_guest = [each.first_to_guest_ms or -1.0 for each in cutovers]
    answers = [pings.first_after_ms(each.resumed_at_s) for each in cutovers]
    blackouts = [move.blackout_ms or 0.0 for move in moves]
    with capsys.disabled():
        print(
            f"\n{len(moves)} moves, {pings.sent} questions: {pings.lost} lost, "
            f"{pings.duplicates} twice, {pings.reordered} out of order; "
            f"announced +{statistics.median(first):.2f} ms (worst {max(first):.2f}), "
            f"first to guest +{statistics.median(to_guest):.2f} ms, "
            f"first answer +{statistics.median(answers):.2f} ms (worst {max(answers):.2f}), "
            f"verified +{statistics.median(verified):.1f} ms (worst {max(verified):.1f}), "
            f"blackout {statistics.median(blackouts):.1f} ms"
        )
    assert pings.duplicates == 0
    assert pings.lost == 0
    assert pings.reordered == 0


def in_namespace(namespace: str, work: Callable[[], str]) -> str:
    """What `work` returns in a thread of that network namespace."""

    def inside() -> str:
        enter(namespace)
        return work()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(inside).result(30)


def test_announcements_that_are_lost_are_made_up_for(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """The switch drops the first three; its table says the old place until a later one passes."""
    with cluster.guest("lost", load=Load(udp=False, dirty_pages_per_s=0)) as guest:
        cluster.move("lost", "n2")
        rules = (
            "table bridge ferrytest { chain c { type filter hook prerouting priority 0; "
            f'iifname "g-n1" ether saddr {guest.mac} ether type {{ arp, 0x8035 }} '
            "quota until 150 bytes counter drop; }; }"
        )
        switch = cluster.plan.switch
        in_namespace(switch, lambda: filters.run(rules, "test"))
        try:
            cutover = cutover_of(cluster, cluster.move("lost", "n1"))
            listed = in_namespace(switch, lambda: filters.run("list ruleset", "test"))
        finally:
            in_namespace(switch, lambda: filters.run("delete table bridge ferrytest", "test"))
        seen = cluster.domain("lost").addresses
    assert "packets 3 " in listed, listed
    assert cutover.verified_ms is not None, cutover
    assert cutover.suspect == ""
    assert guest.address in seen[0], "what the guest uses was learnt on its way"
    with capsys.disabled():
        print(f"\nthree lost: verified +{cutover.verified_ms:.0f} ms, {cutover.rounds} rounds")
