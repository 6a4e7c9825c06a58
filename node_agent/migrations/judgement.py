"""Whether the network has followed a guest, and what is wrong if it hasn't. Pure.

The evidence is what other nodes found when they asked for each NIC at its MAC (`Witness`): which
addresses answered, and what kinds of frames of the NIC reached them. The old node is the best
witness (see `netfabric.probing`), so its word is needed where it can speak at all.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import msgspec

from migrator.model import NicSpec, Witness


def with_learnt(nics: Sequence[NicSpec], learnt: Sequence[Sequence[str]]) -> tuple[NicSpec, ...]:
    """The NICs with what was learnt of their addresses beside what they are defined with."""
    found: list[NicSpec] = []
    for index, nic in enumerate(nics):
        more = learnt[index] if index < len(learnt) else ()
        own = {str(ipaddress.ip_address(text)) for text in nic.addresses}
        extra = (text for text in more if text not in own)
        found.append(msgspec.structs.replace(nic, addresses=(*nic.addresses, *extra)))
    return tuple(found)


def to_prove(nics: Sequence[NicSpec], learnt: Sequence[Sequence[str]]) -> tuple[NicSpec, ...]:
    """The NICs with the addresses that must answer: the defined ones, or else the newest learnt.

    An older learnt one may be given up since: that it is silent would prove nothing.
    """
    found: list[NicSpec] = []
    for index, nic in enumerate(nics):
        more = learnt[index] if index < len(learnt) else ()
        addresses = nic.addresses or tuple(more[-1:])
        found.append(msgspec.structs.replace(nic, addresses=addresses))
    return tuple(found)


def is_verified(nics: Sequence[NicSpec], witnesses: Sequence[Witness]) -> bool:
    """Every node that could ask found every NIC: each address, or a frame where it has none.

    False where nobody could ask for some NIC: nothing was proved then.
    """
    return all(_found(nic, _able(nic, witnesses)) for nic in nics)


def _found(nic: NicSpec, witnesses: Sequence[Witness]) -> bool:
    if not witnesses:
        return False
    if not nic.addresses:
        return all(witness.heard for witness in witnesses)
    wanted = {str(ipaddress.ip_address(text)) for text in nic.addresses}
    return all(wanted <= set(witness.answered) for witness in witnesses)


def suspects(nics: Sequence[NicSpec], witnesses: Sequence[Witness]) -> str:
    """What most likely keeps the network from following, in one sentence a NIC; "" if nothing."""
    found = [
        f"NIC {nic.mac}: {_suspect(nic, _able(nic, witnesses))}"
        for nic in nics
        if not _found(nic, _able(nic, witnesses))
    ]
    return "; ".join(found)


def _suspect(nic: NicSpec, witnesses: Sequence[Witness]) -> str:
    if not witnesses:
        return f"no other node has a way into the network of bridge {nic.bridge} to ask by"
    if all(witness.routed for witness in witnesses):
        return _routed_suspect(nic, witnesses)
    heard = {kind for witness in witnesses for kind in witness.heard}
    answered = {address for witness in witnesses for address in witness.answered}
    silent = [text for text in nic.addresses if str(ipaddress.ip_address(text)) not in answered]
    if not heard and not answered:
        return (
            "no frame of it reaches any other node: look for port security or ARP inspection on the"
            " new node's switch port, a VLAN that is missing on its trunk, its uplink, or its FRR"
            " where EVPN carries the network"
        )
    if answered and not silent:
        deaf = [each.node for each in witnesses if set(each.answered) != answered]
        return (
            f"{', '.join(deaf)} can't reach it, others can: a switch on the way still believes"
            " that it is at its old place, or lacks its VLAN"
        )
    if answered:
        return (
            f"{', '.join(silent)} doesn't answer while its other addresses do: the definition may"
            " name an address that the guest hasn't, or the guest filters"
        )
    if "arp" not in heard and "rarp" not in heard:
        return (
            "other frames of it are heard, no announcement is: look for ARP inspection or storm"
            " control on the new node's switch port"
        )
    if heard <= {"arp", "rarp"}:
        return (
            "its announcements are heard, but frames to its MAC find nobody: look for port"
            " security (the MAC is bound to the old port), or a guest that doesn't answer"
        )
    return "it is heard but doesn't answer: the guest filters ARP or has other addresses"


def _routed_suspect(nic: NicSpec, witnesses: Sequence[Witness]) -> str:
    answered = {address for witness in witnesses for address in witness.answered}
    silent = [text for text in nic.addresses if str(ipaddress.ip_address(text)) not in answered]
    if not answered:
        return (
            "no other node reaches it through the routers: look for a router that still leads to"
            " its old node, that was not told, or that refuses the route; or a guest that answers"
            " no echo"
        )
    if not silent:
        deaf = [each.node for each in witnesses if set(each.answered) != answered]
        return (
            f"{', '.join(deaf)} can't reach it, others can: a router on the way still leads to its"
            " old node"
        )
    return (
        f"{', '.join(silent)} doesn't answer while its other addresses do: a router has no route"
        " to it, or the guest filters"
    )


def _able(nic: NicSpec, witnesses: Sequence[Witness]) -> list[Witness]:
    return [witness for witness in witnesses if witness.mac == nic.mac and witness.able]
