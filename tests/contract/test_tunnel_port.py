"""Whether `ferry doctor` finds what keeps migrations' tunnels from another node."""

from __future__ import annotations

import asyncio

import pytest

from netfabric import filters
from node_agent.doctor.findings import Finding, Level
from node_agent.doctor.paths import check_tunnel_port
from tests.contract.namespaces import run_in_new_namespace
from tests.contract.two_nodes import FAR, Pair, two_nodes

pytestmark = pytest.mark.lab

PORT = 7782


def found(near_rule: str = "", far_rule: str = "") -> Finding:
    """With a rule for what leaves the near node, and one for what enters the far one."""
    findings: list[Finding] = []

    async def inside() -> None:
        async with two_nodes("bridge") as pair:
            await look(pair)

    async def look(pair: Pair) -> None:
        if near_rule:
            chain = f"chain c {{ type filter hook output priority 0; {near_rule}; }}"
            rules = f"table inet test {{ {chain}; }}"
            await asyncio.to_thread(filters.run, rules, "test")
        if far_rule:
            await pair.filter("input priority 0", far_rule)
        findings.append(await asyncio.to_thread(check_tunnel_port, "far", FAR, PORT))

    run_in_new_namespace(inside)
    return findings[0]


def test_a_node_that_is_reached_says_that_nobody_listens() -> None:
    assert found().level is Level.OK


@pytest.mark.parametrize(
    ("near_rule", "far_rule", "detail"),
    [
        ("", f"udp dport {PORT} drop", "not for this one"),
        ("", f"udp dport {PORT} reject with icmpx admin-prohibited", "refused"),
        ("", f"udp dport {PORT} reject", f"a firewall of {FAR} rejects"),
        ("", "meta l4proto udp reject with icmpx port-unreachable", "rejects"),
        (f"udp dport {PORT} drop", "", "refused"),
        ("", "meta l4proto udp drop", "unknown"),
    ],
)
def test_what_keeps_the_tunnels_away_is_found(near_rule: str, far_rule: str, detail: str) -> None:
    finding = found(near_rule, far_rule)
    assert finding.level is Level.WARNING
    assert detail in finding.detail
    assert f"allow UDP port {PORT}" in finding.mend
