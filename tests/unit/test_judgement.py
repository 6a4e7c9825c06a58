"""Whether the network has followed, and what is suspected if not: a table of evidence."""

from __future__ import annotations

import pytest

from migrator.model import NicSpec, Witness
from node_agent.migrations.judgement import is_verified, suspects

MAC = "52:54:00:aa:bb:cc"
NIC = NicSpec(mac=MAC, bridge="br0", addresses=("10.0.0.5", "2001:DB8::5"))
BARE = NicSpec(mac=MAC, bridge="br0")
BOTH = ("10.0.0.5", "2001:db8::5")


def saw(node: str, answered: tuple[str, ...] = (), heard: tuple[str, ...] = ()) -> Witness:
    return Witness(node=node, mac=MAC, able=True, answered=answered, heard=heard)


BLIND = Witness(node="n4", mac=MAC, able=False)


def test_verified_is_what_everybody_who_can_ask_has_found() -> None:
    assert is_verified([NIC], [saw("n1", BOTH), saw("n3", BOTH), BLIND])
    assert not is_verified([NIC], [saw("n1", BOTH), saw("n3", ("10.0.0.5",))])
    assert not is_verified([NIC], [saw("n1", ("10.0.0.5",))])
    assert not is_verified([NIC], [BLIND])
    assert not is_verified([NIC], [])


def test_a_nic_without_addresses_must_be_heard() -> None:
    assert is_verified([BARE], [saw("n1", heard=("rarp",))])
    assert not is_verified([BARE], [saw("n1")])


def test_no_nics_need_no_proof() -> None:
    assert is_verified([], [])
    assert suspects([], []) == ""


@pytest.mark.parametrize(
    ("witnesses", "word"),
    [
        ([], "no other node has a way"),
        ([BLIND], "no other node has a way"),
        ([saw("n1"), saw("n3")], "port security"),
        ([saw("n1"), saw("n3", BOTH)], "n1 can't reach it"),
        ([saw("n1", ("10.0.0.5",), ("arp",))], "2001:DB8::5 doesn't answer"),
        ([saw("n1", heard=("ipv4",))], "ARP inspection or storm control"),
        ([saw("n1", heard=("arp",))], "bound to the old port"),
        ([saw("n1", heard=("arp", "ipv4"))], "the guest filters ARP"),
        ([saw("n1", BOTH, ("arp",))], ""),
    ],
)
def test_the_suspect(witnesses: list[Witness], word: str) -> None:
    found = suspects([NIC], witnesses)
    assert (word in found) if word else found == ""
    assert not found or MAC in found
