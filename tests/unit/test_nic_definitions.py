"""A NIC's definition that can't be right is refused when it is given, with the reason."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from migrator.errors import ConflictError, InvalidRequest
from migrator.model import DomainSpec, NicSpec
from node_agent.domain_records import DomainRecords, check_spec
from node_agent.resources import DomainRecord
from node_agent.state.memory import SimulatedData, SimulatedStore
from node_agent.state.typed import TypedStore

MAC = "52:54:00:00:00:01"


def spec_of(name: str, **nic: Any) -> DomainSpec:
    values = {"mac": MAC, "bridge": "br0", **nic}
    return DomainSpec(name=name, memory_bytes=64 << 20, nics=(msgspec.convert(values, NicSpec),))


@pytest.mark.parametrize(
    ("nic", "field", "reason"),
    [
        ({"mac": "01:00:5e:00:00:01"}, "nics[0].mac", "a unicast address"),
        ({"mac": "ff:ff:ff:ff:ff:ff"}, "nics[0].mac", "a unicast address"),
        ({"mac": "00:00:00:00:00:00"}, "nics[0].mac", "not all zeroes"),
        ({"addresses": ("10.0.0.7/24",)}, "nics[0].addresses[0]", "without a prefix"),
        (
            {"addresses": ("10.0.1.7",), "networks": ("10.0.0.0/24",)},
            "nics[0].addresses[0]",
            "10.0.0.0/24",
        ),
        ({"networks": ("10.0.0.7/24",)}, "nics[0].networks[0]", "a network"),
    ],
)
def test_what_no_nic_can_have_is_refused(nic: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_spec(spec_of("web", **nic), ())
    assert list(caught.value.fields) == [field]
    assert reason in caught.value.fields[field]


@pytest.mark.parametrize("vlan", [0, 4095, 70_000, -1])
def test_a_vlan_beyond_4094_is_refused(vlan: int) -> None:
    with pytest.raises(msgspec.ValidationError):
        spec_of("web", vlan=vlan)


@pytest.mark.parametrize("mtu_bytes", [0, 575, 65_522])
def test_an_mtu_that_no_network_has_is_refused(mtu_bytes: int) -> None:
    with pytest.raises(msgspec.ValidationError):
        spec_of("web", mtu_bytes=mtu_bytes)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"mac": MAC}, f"MAC {MAC} belongs to domain web"),
        (
            {"mac": "52:54:00:00:00:02", "addresses": ("2001:DB8:0::7",)},
            "address 2001:db8::7 belongs to domain web",
        ),
    ],
)
async def test_what_another_domain_has_is_refused(other: dict[str, Any], reason: str) -> None:
    store = SimulatedStore(SimulatedData())
    await store.open()
    records = DomainRecords(TypedStore(store))
    web = spec_of("web", addresses=("2001:db8::7",))
    await records.add(DomainRecord(spec=web, defined_at_s=1.0))
    with pytest.raises(ConflictError, match=reason):
        await records.add(DomainRecord(spec=spec_of("db", **other), defined_at_s=2.0))
    assert list(await records.list_records()) == ["web"]
    await store.close()
