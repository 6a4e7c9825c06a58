"""Whether the guests' network carries frames as long as a NIC's MTU from one node to another.

    source ── uplink ── switches ── uplink ── destination
           a short frame and a full one, of a type that nobody else listens to

Only where short ones arrive and no full one does is anything proved: nodes may not share a network
at all, and routed ones don't; and after a few, the listening may have ended between a short one and
its full one. The frames are broadcasts, two of them, since no switch need know where the other
node's uplink is.

Synchronous; belongs into a thread.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Sequence
from typing import Final

from migrator.errors import FabricError
from migrator.ports import WidthReport
from netfabric import capture
from netfabric.exits import Exit
from netfabric.frames import (
    BROADCAST,
    ETHERTYPE_EXPERIMENTAL,
    ETHERTYPE_VLAN,
    ethernet,
    tagged,
)
from netfabric.probing import dissect

TOKEN_BYTES: Final = 8
SHORT_BYTES: Final = 64
SHORT_FRAMES_MIN: Final = 4
"""So many short frames without a full one are no accident."""
_TAG_BYTES: Final = 4
_MARK: Final = b"ferrywidth"
_HEAD: Final = struct.Struct(f"!{len(_MARK)}s{TOKEN_BYTES}sI")


def frame_of(own_mac: bytes, token: bytes, payload_bytes: int, *, cut_bytes: int = 0) -> bytes:
    """A frame whose payload is that long, but for what is cut off, and says so. Pure."""
    head = _HEAD.pack(_MARK, token, payload_bytes)
    body = head.ljust(payload_bytes - cut_bytes, b"\x00")
    return ethernet(BROADCAST, own_mac, ETHERTYPE_EXPERIMENTAL, body)


def length_in(frame: bytes, token: bytes) -> int | None:
    """The payload's length, if the frame is one of those with this token, and whole. Pure.

    One that lacks a tag's length counts as whole: see `send`.
    """
    ethertype, payload = dissect(frame)
    if ethertype != ETHERTYPE_EXPERIMENTAL or len(payload) < _HEAD.size:
        return None
    mark, found, length = _HEAD.unpack_from(payload)
    if (mark, found) != (_MARK, token) or len(payload) < length - _TAG_BYTES:
        return None
    return int(length)


def send(uplinks: Sequence[Exit], own_mac: bytes, token: bytes, mtu_bytes: int) -> None:
    """A short frame and a full one by each uplink. FabricError: an uplink takes no full one.

    A packet socket takes a full frame with a tag of 802.1Q's, but with one of 802.1ad's only what
    is within the MTU (packet_extra_vlan_len_allowed, net/packet/af_packet.c): that is cut.
    """
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        for way in uplinks:
            for length in (SHORT_BYTES, mtu_bytes):
                if way.vlan_id is None:
                    frame = frame_of(own_mac, token, length)
                else:
                    cut_bytes = 0 if way.vlan_ethertype == ETHERTYPE_VLAN else _TAG_BYTES
                    frame = frame_of(own_mac, token, length, cut_bytes=cut_bytes)
                    frame = tagged(frame, way.vlan_id, way.vlan_ethertype)
                try:
                    sender.sendto(frame, (way.port, 0))
                except OSError as error:
                    raise FabricError(
                        f"{way.port} takes no frame of {length} bytes: {error.strerror}"
                    ) from error


def hear(uplinks: Sequence[Exit], token: bytes, mtu_bytes: int, timeout_s: float) -> WidthReport:
    """Listen until the full frame has come, or for `timeout_s`."""
    shorts, full = 0, False
    program = capture.of_ethertype(ETHERTYPE_EXPERIMENTAL)
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(capture.open_capture(way.port, capture.in_vlan(way, program)))
            for way in uplinks
        ]
        deadline = time.monotonic() + timeout_s
        for ready in capture.ready_until(sockets, deadline):
            for frame, outgoing, _ in capture.received(ready):
                length = None if outgoing else length_in(frame, token)
                shorts += length == SHORT_BYTES
                full = full or length == mtu_bytes
            if full:
                break
    return WidthReport(short=full or shorts >= SHORT_FRAMES_MIN, full=full)
