"""The VLANs of bridge ports: as the kernel tells them, and where an announcement leaves in one."""

from __future__ import annotations

import struct

import pytest

from netfabric.bridge.links import _exit
from netfabric.link_table import Link
from netfabric.netlink_format import attribute
from netfabric.vlan_table import Vlans, vlans_in

OWN = Vlans(7, 7, pvid=True, untagged=True)
NATIVE = Vlans(1, 1, pvid=True, untagged=True)


def _a_link(index: int, name: str) -> Link:
    return Link(index, name, "", True, 1500, 1, True, False, 0x88A8)


@pytest.mark.parametrize(
    ("vlans", "expected"),
    [
        ((OWN,), (None,)),
        ((NATIVE, Vlans(2, 4094)), (7,)),
        ((NATIVE, Vlans(8, 9)), None),
        ((), None),
    ],
)
def test_an_announcement_leaves_in_the_taps_vlan(
    vlans: tuple[Vlans, ...], expected: tuple[int | None] | None
) -> None:
    own, uplink, bridge = _a_link(2, "fy"), _a_link(3, "up0"), _a_link(1, "br0")
    way = _exit(uplink, own, bridge, {2: (OWN,), 3: vlans})
    assert (None if way is None else (way.vlan_id,)) == expected
    assert _exit(uplink, own, bridge, None) is not None


def test_ranges_are_read_as_ranges() -> None:
    """Flags of linux/if_bridge.h: pvid 2, untagged 4, a range's begin 8, its end 16."""
    told = [(6, 1), (8, 2), (16, 4000), (0, 4090), (12, 4092), (20, 4094)]
    infos = b"".join(attribute(2, struct.pack("=HH", *each)) for each in told)
    message = struct.pack("=BxHiII", 7, 0, 3, 0, 0) + attribute(3, b"up0\0") + attribute(26, infos)
    assert tuple(vlans_in(message)) == (
        NATIVE,
        Vlans(2, 4000),
        Vlans(4090, 4090),
        Vlans(4092, 4094, untagged=True),
    )


def test_a_card_that_is_a_switch_itself_tells_no_vlans() -> None:
    mode = attribute(1, struct.pack("=H", 0))  # IFLA_BRIDGE_MODE
    message = struct.pack("=BxHiII", 7, 0, 3, 0, 0) + attribute(26, mode)
    assert tuple(vlans_in(message)) == ()
