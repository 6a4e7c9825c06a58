"""Whether frames can be led into tunnels at all, and that `ferry doctor` asks where it matters."""

from __future__ import annotations

import pytest

from netfabric import filters, leading
from node_agent import fabrics
from node_agent.config import AgentConfig, parse_config
from node_agent.doctor.findings import Finding, Level
from node_agent.doctor.links import check_kernel_links
from tests.contract.namespaces import run_in_new_namespace


def of(findings: list[Finding]) -> list[Finding]:
    return [each for each in findings if each.check == "nftables' fwd"]


def test_it_is_tried_without_leaving_anything() -> None:
    async def body() -> None:
        assert leading.obstacle() == ""
        assert filters.run("list ruleset\n", "can't list") == ""

    run_in_new_namespace(body)


def test_the_doctor_tries_it_in_a_network_of_its_own() -> None:
    (found,) = of(check_kernel_links(leading.obstacle))
    assert found.level is Level.OK, found
    assert "fytrial" not in filters.run("list ruleset\n", "can't list")
    assert of(check_kernel_links()) == [], "nobody needs it"


def test_a_kernel_that_cannot_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one without nft_fwd_netdev refuses the rule: here it is another that it doesn't know."""
    run = filters.run
    monkeypatch.setattr(
        filters, "run", lambda commands, what: run(commands.replace("fwd to", "fwd4 to"), what)
    )
    (found,) = of(check_kernel_links(leading.obstacle))
    assert found.level is Level.WARNING
    assert found.detail.startswith("frames can't be led: ")
    assert "nft_fwd_netdev" in found.mend


def configured(fabric: str) -> AgentConfig:
    return parse_config(
        f"""
        [node]
        name = "n1"
        memory_bytes = 1073741824
        state_directory = "/nowhere"
        [api]
        listen = "192.0.2.1:1"
        [peer]
        listen = "192.0.2.1:2"
        [migration]
        address = "192.0.2.1"
        [store]
        driver = "sqlite"
        path = "/nowhere/state"
        [tls]
        mode = "plain"
        [fabric]
        {fabric}
        """
    )


@pytest.mark.parametrize(
    ("fabric", "needed"),
    [
        ("driver = 'bridge'", False),
        ("driver = 'macvtap'\nbridge = 'guests'\nuplink = 'eth1'", True),
        ("driver = 'vxlan'\nbridge = 'br0'\nidentifier = 7\nevpn = true", True),
        ("driver = 'vxlan'\nbridge = 'br0'\nidentifier = 7\nremotes = ['192.0.2.2']", False),
    ],
)
def test_it_is_asked_where_a_fabric_leads_frames(fabric: str, needed: bool) -> None:
    assert (fabrics.leading_obstacle(configured(fabric)) is leading.obstacle) is needed
