"""What is read by hand of the kernel's links is what pyroute2 reads of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import Any

import pytest
from pyroute2 import IPRoute

from netfabric.link_table import Link, all_links, link_named
from netfabric.rtnetlink import set_port
from netfabric.taps import open_tap
from tests.contract.namespaces import run_in_new_namespace

pytestmark = pytest.mark.lab

LONGEST = "an-interface-15"
TAP = "fyt0123456789"
FORWARDING = ("v0", "v1")
FORWARDING_TIMEOUT_S = 20.0


def _by_pyroute2(message: Any) -> dict[str, object]:
    """What both read of every link."""
    information = message.get_attr("IFLA_LINKINFO")
    port = None
    if information is not None and information.get_attr("IFLA_INFO_SLAVE_KIND") == "bridge":
        port = information.get_attr("IFLA_INFO_SLAVE_DATA")
    up = bool(message["flags"] & 1)
    state = None if port is None else port.get_attr("IFLA_BRPORT_STATE")
    return {
        "index": message["index"],
        "name": message.get_attr("IFLA_IFNAME"),
        "kind": (information and information.get_attr("IFLA_INFO_KIND")) or "",
        "up": up,
        "mtu_bytes": message.get_attr("IFLA_MTU"),
        "master": message.get_attr("IFLA_MASTER"),
        "forwarding": up and state == 3,
        "floods": port is None or bool(port.get_attr("IFLA_BRPORT_BCAST_FLOOD")),
        "mac": message.get_attr("IFLA_ADDRESS") or "",
    }


def _by_hand(link: Link) -> dict[str, object]:
    read = {name: getattr(link, name) for name in Link.__slots__}
    return {name: read[name] for name in read if not name.startswith("vlan_")}


def _make_links(route: IPRoute) -> None:
    for name in ("br0", LONGEST):
        route.link("add", ifname=name, kind="bridge")
    for number in range(40):  # More than one answer of the kernel's.
        route.link("add", ifname=f"v{number}", kind="veth", peer={"ifname": f"w{number}"})
    index = {link.get_attr("IFLA_IFNAME"): link["index"] for link in route.get_links()}
    for name in ("v0", "v1", "v2"):
        route.link("set", index=index[name], master=index["br0"], mtu=1400)
    for name in ("br0", "w0", "w1", "v0", "v1"):
        route.link("set", index=index[name], state="up")
    set_port(index["v1"], floods=False, learns=True)


def _wait_for_forwarding(route: IPRoute) -> None:
    """Until the ports of br0 whose links are up forward.

    The kernel tells a bridge that a port has its carrier from a worker of its own, at once or,
    where other links change too, up to a second later; the state may change between two reads.
    """
    ends_at_s = time.monotonic() + FORWARDING_TIMEOUT_S
    while True:
        links = [_by_pyroute2(message) for message in route.get_links()]
        if all(link["forwarding"] for link in links if link["name"] in FORWARDING):
            return
        assert time.monotonic() < ends_at_s, [link for link in links if link["master"]]
        time.sleep(0.01)


def _compare() -> None:
    with IPRoute() as route, contextlib.ExitStack() as stack:
        _make_links(route)
        stack.callback(os.close, open_tap(TAP))
        _wait_for_forwarding(route)
        expected = [_by_pyroute2(message) for message in route.get_links()]
        found = [_by_hand(link) for link in all_links()]
        named = [link_named(str(each["name"])) for each in expected]
    assert found == expected
    seen = {str(each["name"]): each for each in found}
    assert {"lo", TAP, LONGEST, "v39", "w39"} <= set(seen)
    assert seen["v0"]["forwarding"]
    assert not seen["v1"]["floods"]
    assert not seen["v2"]["up"]
    assert [_by_hand(link) for link in named if link is not None] == expected


def test_every_link_is_read_as_pyroute2_reads_it() -> None:
    run_in_new_namespace(lambda: asyncio.to_thread(_compare))


def test_a_link_that_is_not_there_is_none() -> None:
    async def look() -> None:
        for name in ("no-such", "", "a-name-of-16-byt", "x" * 300, "a/b"):
            assert link_named(name) is None, name

    run_in_new_namespace(look)
