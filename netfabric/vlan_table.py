"""Which VLANs the bridge ports of this namespace are in, read by hand (see `link_table`).

In ranges, as the kernel can tell them: a trunk of 4,094 VLANs, told one by one and decoded by
pyroute2, took 68 times as long (0.81 s and 0.012 s, emulated), and a migration asks some ten times.
Synchronous, and bounded.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from netfabric.link_table import dump_links
from netfabric.netlink_format import attribute_list

_COMPRESSED: Final = 1 << 2
"""RTEXT_FILTER_BRVLAN_COMPRESSED."""
_IFLA_AF_SPEC: Final = 26
_IFLA_BRIDGE_VLAN_INFO: Final = 2
_PVID: Final = 0x2
_UNTAGGED: Final = 0x4
_RANGE_BEGIN: Final = 0x8
_RANGE_END: Final = 0x10
_INFO: Final = struct.Struct("=HH")
_LINK: Final = struct.Struct("=BxHiII")


@dataclass(frozen=True, slots=True)
class Vlans:
    """VLANs of a bridge port: frames of them leave untagged or tagged; pvid: untagged come in."""

    first: int
    last: int
    pvid: bool = False
    untagged: bool = False

    def __contains__(self, vlan_id: object) -> bool:
        return isinstance(vlan_id, int) and self.first <= vlan_id <= self.last


def port_vlans() -> dict[int, tuple[Vlans, ...]]:
    """Those of every bridge and bridge port that has any, by its index. OSError."""
    found: dict[int, tuple[Vlans, ...]] = {}
    for message in dump_links(socket.AF_BRIDGE, _COMPRESSED):
        _, _, index, _, _ = _LINK.unpack_from(message)
        vlans = tuple(vlans_in(message))
        if vlans:  # A network card with a switch of its own tells of that in another message.
            found[index] = vlans
    return found


def vlans_in(message: bytes) -> Iterator[Vlans]:
    """Of an RTM_NEWLINK of AF_BRIDGE. Pure."""
    begun = 0
    for kind, specification in attribute_list(message[_LINK.size :]):
        if kind != _IFLA_AF_SPEC:
            continue
        for inner, data in attribute_list(specification):
            if inner != _IFLA_BRIDGE_VLAN_INFO:
                continue
            flags, vlan_id = _INFO.unpack_from(data)
            if flags & _RANGE_BEGIN:
                begun = vlan_id
                continue
            first = begun if flags & _RANGE_END else vlan_id
            yield Vlans(first, vlan_id, bool(flags & _PVID), bool(flags & _UNTAGGED))
