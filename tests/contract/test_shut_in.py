"""A bridge whose way out is shut: no guest is to come there."""

from __future__ import annotations

import asyncio

import pytest
from pyroute2 import IPRoute

from migrator.model import NicSpec
from netfabric.bridge import BridgeFabric
from netfabric.bridge.links import shut_in, why_shut
from netfabric.link_table import Link
from tests.contract.fabric_worlds import forwarding
from tests.contract.namespaces import run_in_new_namespace

pytestmark = pytest.mark.lab

NIC = NicSpec(mac="52:54:00:aa:bb:cc", bridge="br0")


def test_why_nothing_leaves_by_a_bridge() -> None:
    async def inside() -> None:
        await asyncio.to_thread(make_bridge)
        await forwarding("up0")
        await asyncio.to_thread(shut_uplink)
        report = await BridgeFabric(gaps_s=()).hear_wide(NIC, b"12345678", 0.01)
        assert report.cut_off == "its uplink up0 is down or blocked"

    run_in_new_namespace(inside)


def make_bridge() -> None:
    assert shut_in("br0") == "", "another check says that there is none"
    with IPRoute() as route:
        route.link("add", ifname="br0", kind="bridge")
        route.link("add", ifname="up0", kind="veth", peer="up1")
        (bridge,), (port,) = (route.link_lookup(ifname=name) for name in ("br0", "up0"))
        route.link("set", index=bridge, state="up")
        route.link("set", index=route.link_lookup(ifname="up1")[0], state="up")
        assert shut_in("br0") == "", "it may be meant to lead nowhere"
        route.link("set", index=port, master=bridge, state="up")


def shut_uplink() -> None:
    assert shut_in("br0") == ""
    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname="up0")[0], state="down")
        assert shut_in("br0") == "its uplink up0 is down or blocked"


def test_an_uplink_outside_of_the_nics_vlan_is_named() -> None:
    port = Link(
        index=3,
        name="up0",
        kind="",
        up=True,
        mtu_bytes=1500,
        master=2,
        forwarding=True,
        vlan_filtering=False,
        vlan_ethertype=0x8100,
    )
    assert why_shut([port], 10) == "its uplink up0 isn't in VLAN 10 (bridge vlan show)"
    assert "untagged" in why_shut([port], None)
