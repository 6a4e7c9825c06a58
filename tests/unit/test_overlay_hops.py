"""Whom the old node of a guest asks into an overlay, however an address is spelt."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Mapping

import pytest

from migrator.model import NicSpec
from migrator.ports import ProbeReport
from netfabric.host_routes import Address
from netfabric.routed import RoutedFabric, RoutedNetwork, probing
from netfabric.routes.nobody import NobodyRoutes
from netfabric.vxlan import Overlay

HOP = "::ffff:192.0.2.2"
NIC = NicSpec(mac="52:54:00:aa:bb:cc", bridge="br0", addresses=("2001:DB8:0::5", "10.0.0.5"))


class Routes(NobodyRoutes):
    async def hop_of(self, address: str) -> str | None:
        return HOP


def test_every_address_finds_its_hop(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[Address, str] = {}

    def note(
        network: RoutedNetwork, nic: NicSpec, timeout_s: float, hops: Mapping[Address, str]
    ) -> ProbeReport:
        asked.update(hops)
        return ProbeReport(able=True)

    monkeypatch.setattr(probing, "probe", note)
    overlay = Overlay("br0", 77, "192.0.2.1", (), evpn=True)
    network = RoutedNetwork("br0", ("192.0.2.1", "2001:db8:2::1"), overlay=overlay)
    assert asyncio.run(RoutedFabric(network, Routes()).probe(NIC, 0.1)).able
    assert asked == {ipaddress.ip_address(text): HOP for text in ("2001:db8::5", "10.0.0.5")}
