"""Guests behind a real HAProxy: each moves, its server is out meanwhile, no user notices."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from deploy.demo.visitors import visitors
from deploy.lab.balancer import LoadBalancer, load_balancer
from migrator.model import MigrationState
from node_agent.hooks.model import HookFailure, HookSpec
from tests.contract.haproxy_server import Haproxy
from tests.integration.cluster.world import Cluster, Guest, Load, describe, eventually

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]


@pytest.fixture
def guests(cluster: Cluster) -> Iterator[list[Guest]]:
    load = Load(dirty_pages_per_s=200, memory_mib=8, udp=False)
    with cluster.guest("lb1", "n1", load) as one, cluster.guest("lb2", "n1", load) as two:
        yield [one, two]


@pytest.fixture
def balancer(cluster: Cluster, guests: list[Guest]) -> Iterator[LoadBalancer]:
    with load_balancer(cluster.plan, {each.name: each.address for each in guests}) as found:
        yield found


def test_servers_are_out_while_their_guests_move_and_users_see_no_error(
    cluster: Cluster, guests: list[Guest], balancer: LoadBalancer
) -> None:
    haproxy = Haproxy(f"unix:{balancer.socket}", 0)
    hook = msgspec.structs.replace(balancer.hook("lb"), on_failure=HookFailure.CANCEL)
    api = cluster.api()
    api.post("/v1/hooks", HookSpec, hook)
    try:
        with visitors(cluster.plan.namespace("client"), balancer.frontend, 1, gap_s=0) as users:
            for guest in guests:
                before = users.answers
                eventually("users are served", lambda: users.answers > before + 5)  # noqa: B023
                ended = cluster.ended(cluster.migrate(guest.name, guest.other_node()).id)
                assert ended.state is MigrationState.COMPLETED, describe(ended)
                done = {phase.name: phase.detail for phase in ended.timeline}
                assert f"web/{guest.name} is in drain, 0 sessions left" in done["leave"]

                def is_back(name: str = guest.name) -> bool:
                    return haproxy.server(name)["srv_admin_state"] == "0"

                eventually(f"{guest.name} is back in HAProxy", is_back)
            before = users.answers
            eventually("users are served", lambda: users.answers > before + 5)
        assert users.errors == []
        for guest in guests:
            guest.verify()
    finally:
        api.delete("/v1/hooks/lb")
