"""MAC addresses for NICs that are defined without one; pure but for the dice, which are given.

    x2:xx:xx:xx:xx:xx    unicast and locally administered, in the quadrant that is an
                         administrator's own to assign (IEEE 802c); 44 bits are random

Two of a million guests on one network, of whichever clusters, have the same with a probability of
3 %; within a cluster `DomainRecords` sees to it that no two do. It is made once, with the
definition, and is a part of it from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from migrator.model import DomainDefinition, DomainSpec, MacAddress, NicSpec

_BYTES: Final = 6
_LOCAL_UNICAST: Final = 0x02
Roll = Callable[[int], bytes]
"""So many random bytes, like `secrets.token_bytes`."""


def made(definition: DomainDefinition, spec: DomainSpec) -> frozenset[str]:
    """The MACs of `spec` that its definition doesn't have."""
    return frozenset(nic.mac for nic in spec.nics) - {nic.mac for nic in definition.nics}


def with_macs(definition: DomainDefinition, roll: Roll) -> DomainSpec:
    """The definition, in which each NIC has a MAC."""
    taken = {nic.mac for nic in definition.nics if nic.mac is not None}
    nics = []
    for nic in definition.nics:
        mac = nic.mac
        while mac is None or (nic.mac is None and mac in taken):
            mac = _rolled(roll)
        taken.add(mac)
        nics.append(NicSpec(**(msgspec.structs.asdict(nic) | {"mac": mac})))
    return DomainSpec(**(msgspec.structs.asdict(definition) | {"nics": tuple(nics)}))


def _rolled(roll: Roll) -> MacAddress:
    first, *rest = roll(_BYTES)
    return bytes([first & 0xF0 | _LOCAL_UNICAST, *rest]).hex(":")
