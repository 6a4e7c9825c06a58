"""Single rtnetlink messages, written by hand: for the moments in which a guest stands still.

A conversation of pyroute2's takes 1 to 3 ms, most of it Python's own; one of these takes 0.1 ms. So
only what happens between a pause and a resume is said this way. Synchronous, and bounded.

    port      RTM_SETLINK of AF_BRIDGE: what a bridge port floods, learns, and whether it is open
    entry     RTM_NEWNEIGH, RTM_DELNEIGH of AF_BRIDGE: one MAC in a bridge's table

Host routes are in `host_routes`, which speaks by `tell`.
"""

from __future__ import annotations

import enum
import os
import socket
import struct
from collections.abc import Collection
from typing import Final

from migrator.errors import FabricError

TIMEOUT_S: Final = 5.0

_AF_BRIDGE: Final = 7
_RTM_SETLINK: Final = 19
_RTM_NEWNEIGH: Final = 28
_RTM_DELNEIGH: Final = 29
_NLM_F_REQUEST: Final = 0x1
_NLM_F_ACK: Final = 0x4
NLM_F_REPLACE: Final = 0x100
NLM_F_CREATE: Final = 0x400
_NLA_F_NESTED: Final = 0x8000
TYPE_MASK: Final = 0x3FFF
"""Of an attribute's kind, without NLA_F_NESTED and NLA_F_NET_BYTEORDER."""
_HEAD: Final = struct.Struct("=HH")
_IFLA_PROTINFO: Final = 12
_BRPORT_STATE: Final = 1
_BRPORT_LEARNING: Final = 8
_BRPORT_FLOODS: Final = (9, 27, 30)
"""Of unknown unicast, multicast, broadcast."""
_NDA_LLADDR: Final = 2
_NTF_MASTER: Final = 0x04
_NTF_STICKY: Final = 0x40
_NUD_REACHABLE: Final = 0x02
_NUD_NOARP: Final = 0x40


class PortState(enum.IntEnum):
    """Of a bridge port without a spanning tree (linux/if_bridge.h)."""

    DISABLED = 0
    FORWARDING = 3


def set_port(index: int, *, floods: bool, learns: bool) -> None:
    """Whether the bridge floods frames out of this port, and learns from those that come in.

    FabricError if it is no bridge port (any more).
    """
    flags = [(_BRPORT_LEARNING, learns), *((flood, floods) for flood in _BRPORT_FLOODS)]
    _set_port(index, b"".join(attribute(kind, bytes([value])) for kind, value in flags))


def set_port_state(index: int, state: PortState) -> None:
    """Shut or open a port altogether. FabricError, e.g. where a spanning tree decides that."""
    _set_port(index, attribute(_BRPORT_STATE, bytes([state])))


def learn(port_index: int, mac: bytes) -> None:
    """Tell the port's bridge that the MAC is behind the port, as if it had learnt it.

    The entry ages and moves as a learnt one does. Under VLAN filtering the kernel makes one for
    each VLAN of the port. FabricError if the port is gone.
    """
    _entry(_RTM_NEWNEIGH, port_index, mac, _NUD_REACHABLE, 0)


def pin(port_index: int, mac: bytes) -> None:
    """The same, but it stays, whatever the bridge hears of that MAC on other ports."""
    _entry(_RTM_NEWNEIGH, port_index, mac, _NUD_NOARP, _NTF_STICKY)


def forget(port_index: int, mac: bytes) -> None:
    """Remove the entry of a MAC behind this port. FabricError if there is none."""
    _entry(_RTM_DELNEIGH, port_index, mac, 0, 0)


def _set_port(index: int, attributes: bytes) -> None:
    header = struct.pack("=BxHiII", _AF_BRIDGE, 0, index, 0, 0)
    nested = attribute(_IFLA_PROTINFO | _NLA_F_NESTED, attributes)
    tell(_RTM_SETLINK, 0, header + nested, "can't set the bridge port")


def _entry(kind: int, port_index: int, mac: bytes, state: int, flags: int) -> None:
    header = struct.pack("=BxxxiHBB", _AF_BRIDGE, port_index, state, _NTF_MASTER | flags, 0)
    create = NLM_F_REPLACE | NLM_F_CREATE if kind == _RTM_NEWNEIGH else 0
    payload = header + attribute(_NDA_LLADDR, mac)
    tell(kind, create, payload, "can't set the bridge's table")


def attribute(kind: int, value: bytes) -> bytes:
    """nlattr: length and kind, 16 bits each, padded to 4 bytes."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def attributes_in(data: bytes) -> dict[int, bytes]:
    """A list of nlattr by kind; what is cut short is left out."""
    found: dict[int, bytes] = {}
    at = 0
    while at + 4 <= len(data):
        length, kind = _HEAD.unpack_from(data, at)
        if length < 4 or at + length > len(data):
            break
        found[kind & TYPE_MASK] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


def tell(kind: int, flags: int, payload: bytes, what: str, tolerated: Collection[int] = ()) -> None:
    """nlmsghdr and the payload; FabricError, beginning with `what`, if the kernel refuses.

    Error numbers of `tolerated` are as good as success.
    """
    flags |= _NLM_F_REQUEST | _NLM_F_ACK
    header = struct.pack("=IHHII", 16 + len(payload), kind, flags, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
            kernel.settimeout(TIMEOUT_S)
            kernel.sendto(header + payload, (0, 0))
            answer = kernel.recv(4096)
    except OSError as error:
        raise FabricError(f"{what}: {error.strerror or error}") from error
    code: int = -struct.unpack_from("=i", answer, 16)[0]
    if code and code not in tolerated:
        raise FabricError(f"{what}: {os.strerror(code)}")
