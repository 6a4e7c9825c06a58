"""The guest that the tests of moves move: its NIC, its tunnel, what it is sent, what it hears."""

from __future__ import annotations

import ipaddress
import os

from migrator.model import DomainName, NicSpec
from migrator.ports import FabricDriver, Tunnel
from netfabric.frames import ethernet, gratuitous_arp_reply, parse_mac
from netfabric.taps import VNET_HEADER_BYTES
from tests.contract.fabric_worlds import eventually

WEB = DomainName("web")
NIC = NicSpec(mac="52:54:00:aa:bb:cc", bridge="br0", addresses=("10.0.0.5",))
TUNNEL = Tunnel(name="m1", local="127.0.0.1", remote="127.0.0.2", port=7782)
CLIENT = bytes.fromhex("525400000001")
TEST = 0x88B6
"""The EtherType of the test's frames, each of which has a number."""


def guest_frames(fd: int) -> list[bytes]:
    """All that waits in a tap."""
    frames: list[bytes] = []
    while True:
        try:
            frames.append(os.read(fd, 4096)[VNET_HEADER_BYTES:])
        except BlockingIOError:
            return frames


def to_guest(number: int) -> bytes:
    return ethernet(parse_mac(NIC.mac), CLIENT, TEST, bytes([number]))


def to_all(number: int) -> bytes:
    return ethernet(b"\xff" * 6, CLIENT, TEST, bytes([number]))


def read_numbers(fd: int) -> list[int]:
    """The numbers of the test's frames that wait in a tap."""
    return [frame[14] for frame in guest_frames(fd) if frame[12:14] == TEST.to_bytes(2, "big")]


async def numbers_until(fd: int, last: int) -> list[int]:
    found: list[int] = []

    async def arrived() -> bool:
        found.extend(read_numbers(fd))
        return last in found

    await eventually(arrived)
    return found


async def says_its_address(fabric: FabricDriver, fd: int, nic: NicSpec) -> None:
    """The guest, which has a further address, and the fabric learns it."""
    own = gratuitous_arp_reply(parse_mac(nic.mac), ipaddress.IPv4Address("10.0.0.6"))
    os.write(fd, bytes(VNET_HEADER_BYTES) + own)

    async def learnt_it() -> bool:
        return "10.0.0.6" in fabric.learnt(WEB, [nic])[0]

    await eventually(learnt_it)
