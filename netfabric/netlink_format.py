"""What netlink messages look like, and the kernel's numbers that several modules need. Pure.

    nlmsghdr    length, kind, flags, sequence, port
    nlattr      length and kind, 16 bits each, and the value; padded to 4 bytes, may nest

The numbers have the kernel's names (linux/netlink.h, rtnetlink.h, if_link.h, neighbour.h). Those
that only one module needs are there.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import Final

NLM_F_REQUEST: Final = 0x1
NLM_F_ACK: Final = 0x4
NLM_F_DUMP_INTR: Final = 0x10
NLM_F_REPLACE: Final = 0x100
NLM_F_DUMP: Final = 0x300
NLM_F_CREATE: Final = 0x400
NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
NLA_F_NESTED: Final = 0x8000
NLA_TYPE_MASK: Final = 0x3FFF
"""Of an attribute's kind, without NLA_F_NESTED and NLA_F_NET_BYTEORDER."""
RTM_NEWLINK: Final = 16
RTM_NEWNEIGH: Final = 28
IFF_UP: Final = 0x1
NDA_LLADDR: Final = 2
IFLA_BRPORT_STATE: Final = 1
IFLA_BRPORT_BCAST_FLOOD: Final = 30

_MESSAGE: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")


class PortState(enum.IntEnum):
    """Of a bridge port without a spanning tree (linux/if_bridge.h)."""

    DISABLED = 0
    FORWARDING = 3


def message(kind: int, flags: int, payload: bytes) -> bytes:
    """A request, padded so that another may follow."""
    length = _MESSAGE.size + len(payload)
    header = _MESSAGE.pack(length, kind, NLM_F_REQUEST | flags, 1, 0)
    return header + payload + bytes(-len(payload) % 4)


def messages_in(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Kind, flags and payload of each message in what was read; what is cut short is left out."""
    at = 0
    while at + _MESSAGE.size <= len(data):
        length, kind, flags, _, _ = _MESSAGE.unpack_from(data, at)
        if length < _MESSAGE.size or at + length > len(data):
            return
        yield kind, flags, data[at + _MESSAGE.size : at + length]
        at += (length + 3) & ~3


def error_in(payload: bytes) -> int:
    """The error number of an NLMSG_ERROR; 0: it acknowledges."""
    return -int(struct.unpack_from("=i", payload)[0])


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def attributes_in(data: bytes) -> dict[int, bytes]:
    """A list of attributes by kind, of two of a kind the last; what is cut short is left out."""
    return dict(attribute_list(data))


def attribute_list(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and value of each attribute; what is cut short is left out."""
    at = 0
    while at + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < 4 or at + length > len(data):
            return
        yield kind & NLA_TYPE_MASK, data[at + 4 : at + length]
        at += (length + 3) & ~3
