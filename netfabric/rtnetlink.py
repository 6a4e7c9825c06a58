"""Single rtnetlink messages, written by hand: for the moments in which a guest stands still.

A conversation of pyroute2's takes 1 to 3 ms, most of it Python's own; one of these takes 0.1 ms. So
only what happens between a pause and a resume is said this way. Synchronous, and bounded.

    port      RTM_SETLINK of AF_BRIDGE: what a bridge port floods, learns, and whether it is open
    entry     RTM_NEWNEIGH, RTM_DELNEIGH of AF_BRIDGE: one MAC in a bridge's table

Host routes are in `host_routes`, which speaks by `tell`.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection
from typing import Final

from migrator.errors import FabricError
from netfabric.netlink_format import (
    IFLA_BRPORT_BCAST_FLOOD,
    IFLA_BRPORT_STATE,
    NDA_LLADDR,
    NLA_F_NESTED,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_REPLACE,
    RTM_NEWNEIGH,
    PortState,
    attribute,
    error_in,
    message,
    messages_in,
)

TIMEOUT_S: Final = 5.0

_AF_BRIDGE: Final = 7
_RTM_SETLINK: Final = 19
_RTM_DELNEIGH: Final = 29
_IFLA_PROTINFO: Final = 12
_BRPORT_LEARNING: Final = 8
_BRPORT_FLOODS: Final = (9, 27, IFLA_BRPORT_BCAST_FLOOD)
"""Of unknown unicast, multicast, broadcast."""
_NTF_MASTER: Final = 0x04
_NTF_STICKY: Final = 0x40
_NUD_REACHABLE: Final = 0x02
_NUD_NOARP: Final = 0x40


def set_port(index: int, *, floods: bool, learns: bool) -> None:
    """Whether the bridge floods frames out of this port, and learns from those that come in.

    FabricError if it is no bridge port (any more).
    """
    flags = [(_BRPORT_LEARNING, learns), *((flood, floods) for flood in _BRPORT_FLOODS)]
    _set_port(index, b"".join(attribute(kind, bytes([value])) for kind, value in flags))


def set_port_state(index: int, state: PortState) -> None:
    """Shut or open a port altogether. FabricError, e.g. where a spanning tree decides that."""
    _set_port(index, attribute(IFLA_BRPORT_STATE, bytes([state])))


def learn(port_index: int, mac: bytes) -> None:
    """Tell the port's bridge that the MAC is behind the port, as if it had learnt it.

    The entry ages and moves as a learnt one does. A kernel that knows VLANs makes one for each of
    the port's beside that without, whether the bridge filters by them or not; those that the
    bridge doesn't go by stay until they age. FabricError if the port is gone.
    """
    _entry(RTM_NEWNEIGH, port_index, mac, _NUD_REACHABLE, 0)


def pin(port_index: int, mac: bytes) -> None:
    """The same, but it stays, whatever the bridge hears of that MAC on other ports."""
    _entry(RTM_NEWNEIGH, port_index, mac, _NUD_NOARP, _NTF_STICKY)


def forget(port_index: int, mac: bytes) -> None:
    """Remove the entry of a MAC behind this port. FabricError if there is none."""
    _entry(_RTM_DELNEIGH, port_index, mac, 0, 0)


def _set_port(index: int, attributes: bytes) -> None:
    header = struct.pack("=BxHiII", _AF_BRIDGE, 0, index, 0, 0)
    nested = attribute(_IFLA_PROTINFO | NLA_F_NESTED, attributes)
    tell(_RTM_SETLINK, 0, header + nested, "can't set the bridge port")


def _entry(kind: int, port_index: int, mac: bytes, state: int, flags: int) -> None:
    header = struct.pack("=BxxxiHBB", _AF_BRIDGE, port_index, state, _NTF_MASTER | flags, 0)
    create = NLM_F_REPLACE | NLM_F_CREATE if kind == RTM_NEWNEIGH else 0
    payload = header + attribute(NDA_LLADDR, mac)
    tell(kind, create, payload, "can't set the bridge's table")


def tell(kind: int, flags: int, payload: bytes, what: str, tolerated: Collection[int] = ()) -> None:
    """Send it, and hear that it was done. FabricError, beginning with `what`, if it is refused.

    Error numbers of `tolerated` are as good as success.
    """
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
            kernel.settimeout(TIMEOUT_S)
            kernel.sendto(message(kind, NLM_F_ACK | flags, payload), (0, 0))
            answer = kernel.recv(4096)
    except OSError as error:
        raise FabricError(f"{what}: {error.strerror or error}") from error
    code = next((error_in(told) for _, _, told in messages_in(answer)), errno.EBADMSG)
    if code and code not in tolerated:
        raise FabricError(f"{what}: {os.strerror(code)}")
