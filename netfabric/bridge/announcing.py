"""Sending an announcement: out of every other port of a tap's bridge, in the tap's VLAN.

Why there, and why the bridge's table is set besides, `driver` tells. The event loop sends the very
first frames with what was looked up beforehand; all else here is synchronous and belongs into a
thread.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from migrator.errors import FabricError
from netfabric.bridge.links import Exits, find_exits, netlink
from netfabric.exits import Exit
from netfabric.frames import tagged
from netfabric.rtnetlink import learn, set_port

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Announced:
    """One NIC of an announcement: its tap, its MAC, its frames of one round."""

    tap: str
    mac: bytes
    frames: tuple[bytes, ...]


def first_round(
    sender: socket.socket,
    announced: Sequence[Announced],
    known: Mapping[str, Exits],
    sent: Mapping[str, tuple[Exit, ...]],
    ended: threading.Event,
) -> None:
    """Set the bridges' tables, and send to every port that the event loop hasn't sent to."""
    for one in announced:
        with contextlib.suppress(FabricError):  # a tap made anew since: below
            if one.tap in known:
                learn(known[one.tap].tap_index, one.mac)
    failures: list[str] = []
    with netlink("can't announce") as kernel:
        for one in announced:
            exits = find_exits(kernel, one.tap)
            if exits is None:
                failures.append(f"NIC {one.mac.hex(':')} has no tap on a bridge here")
                continue
            if one.tap not in known or known[one.tap].tap_index != exits.tap_index:
                learn(exits.tap_index, one.mac)
            if exits.tap_closed:
                set_port(exits.tap_index, floods=True, learns=True)
            if ended.is_set():
                return
            done = sent.get(one.tap, ())
            missing = [way for way in (*exits.uplinks, *exits.guests) if way not in done]
            if missing and not send(sender, missing, one.frames) and not done:
                failures.append(f"NIC {one.mac.hex(':')}: no port of its bridge takes a frame")
    if failures:
        raise FabricError("; ".join(failures))


def repeat(sender: socket.socket, announced: Sequence[Announced], ended: threading.Event) -> None:
    """One more round. The ports may have changed; the bridge's table is the guest's by now."""
    with netlink("can't announce") as kernel:
        for one in announced:
            exits = find_exits(kernel, one.tap)
            if exits is not None and not ended.is_set():
                send(sender, (*exits.uplinks, *exits.guests), one.frames)


def send(sender: socket.socket, exits: Iterable[Exit], frames: Sequence[bytes]) -> tuple[Exit, ...]:
    """Send each frame out of each port; the ports that took them all. The others are passed over.

    A port may be going, or full: the next round finds it again.
    """
    done: list[Exit] = []
    for way in exits:
        try:
            for frame in frames:
                if way.vlan_id is None:
                    sender.sendto(frame, (way.port, 0))
                else:
                    sender.sendto(tagged(frame, way.vlan_id, way.vlan_ethertype), (way.port, 0))
        except OSError as error:
            if error.errno == errno.EBADF:
                break  # the driver was closed meanwhile
            _log.warning("announcement not sent on %s: %s", way.port, error)
        else:
            done.append(way)
    return tuple(done)
