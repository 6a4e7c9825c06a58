"""Packet sockets with a filter in the kernel: what passes an interface, chosen by classic BPF.

A program is a list of instructions (code, jt, jf, k), as SO_ATTACH_FILTER takes it. A socket is
given its filter before it is bound, so that it never holds a frame that the filter refuses.
"""

from __future__ import annotations

import ctypes
import errno
import math
import select
import socket
import struct
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Final

from migrator.errors import FabricError
from netfabric.exits import Exit

Instruction = tuple[int, int, int, int]

ETH_P_ALL: Final = 0x0003
PACKET_OUTGOING: Final = 4
SO_TIMESTAMPNS: Final = 35
_SOL_PACKET: Final = 263
_PACKET_ADD_MEMBERSHIP: Final = 1
_PACKET_MR_PROMISCUOUS: Final = 1
_SO_ATTACH_FILTER: Final = 26
_SO_RCVBUF_BYTES: Final = 1 << 18
_LOAD_WORD: Final = 0x20
_LOAD_HALF: Final = 0x28
_AND: Final = 0x54
_EQUAL: Final = 0x15
_RETURN: Final = 0x06
WHOLE_FRAME: Final = 0x40000
_VLAN_TAG: Final = 0xFFFFF02C
_VLAN_TAGGED: Final = 0xFFFFF030
"""SKF_AD_VLAN_TAG and SKF_AD_VLAN_TAG_PRESENT of linux/filter.h: the kernel takes the outer tag off
before a filter sees the frame. Where a bridge took it off, the former is still what it was."""
_VLAN_MASK: Final = 0xFFF
FRAMES_A_TURN: Final = 64
"""Of one interface, before others get their turn, or the time is looked at."""


def from_mac(mac: bytes) -> list[Instruction]:
    """Frames whose Ethernet source is this MAC."""
    high, low = struct.unpack("!IH", mac)
    return [
        (_LOAD_WORD, 0, 0, 6),
        (_EQUAL, 0, 3, high),
        (_LOAD_HALF, 0, 0, 10),
        (_EQUAL, 0, 1, low),
        (_RETURN, 0, 0, WHOLE_FRAME),
        (_RETURN, 0, 0, 0),
    ]


def of_ethertype(ethertype: int) -> list[Instruction]:
    """Frames of one EtherType, untagged or with a tag that the interface has taken off."""
    return [
        (_LOAD_HALF, 0, 0, 12),
        (_EQUAL, 0, 1, ethertype),
        (_RETURN, 0, 0, WHOLE_FRAME),
        (_RETURN, 0, 0, 0),
    ]


def in_vlan(way: Exit, program: Sequence[Instruction]) -> Sequence[Instruction]:
    """The program, for what comes in by the way's port in its VLAN alone.

    Where the port isn't VLAN-aware all that comes is in one network, whatever tags it has.
    """
    if not way.vlan_aware:
        return program
    to_program, to_refusal = 4, 3
    return [
        (_LOAD_WORD, 0, 0, _VLAN_TAGGED),
        (_EQUAL, to_program if way.vlan_id is None else to_refusal, 0, 0),
        (_LOAD_WORD, 0, 0, _VLAN_TAG),
        (_AND, 0, 0, _VLAN_MASK),
        (_EQUAL, 1, 0, way.vlan_id or 0),  # 0: a priority without a VLAN.
        (_RETURN, 0, 0, 0),
        *program,
    ]


def open_capture(
    interface: str, program: Sequence[Instruction] = (), *, promiscuous: bool = False
) -> socket.socket:
    """A non-blocking socket that gets, and sends, the interface's frames; with time stamps.

    `promiscuous`: also those for MACs that the interface was never told of.

    FabricError: no such interface, no right to.
    """
    try:
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    except OSError as error:
        raise FabricError(f"can't open a packet socket: {error.strerror}") from error
    try:
        opened.setblocking(False)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SO_RCVBUF_BYTES)
        opened.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        if program:
            _attach(opened, program)
        opened.bind((interface, ETH_P_ALL))
        if promiscuous:
            index = socket.if_nametoindex(interface)
            request = struct.pack("iHH8x", index, _PACKET_MR_PROMISCUOUS, 0)
            opened.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, request)
    except OSError as error:
        opened.close()
        raise FabricError(f"can't listen on {interface}: {error.strerror}") from error
    return opened


def receive(opened: socket.socket) -> tuple[bytes, bool, float] | None:
    """One frame, whether it left by the interface, and the kernel's time of it (s); None: no more.

    An interface that is down has none; it is heard again once it is up. FabricError if it is gone.
    """
    try:
        frame, control, _, sender = opened.recvmsg(65_600, 64)
    except (BlockingIOError, InterruptedError):
        return None
    except OSError as error:
        if error.errno == errno.ENETDOWN and opened.getsockname()[0]:
            return None
        raise FabricError(f"can't listen any more: {error.strerror}") from error
    seconds, nanoseconds = struct.unpack("@ll", control[0][2]) if control else (0, 0)
    return frame, sender[2] == PACKET_OUTGOING, seconds + nanoseconds / 1e9


def received(opened: socket.socket) -> Iterator[tuple[bytes, bool, float]]:
    """What has come, as `receive` has it, but FRAMES_A_TURN at most: a guest may send faster than
    anybody here reads. FabricError if the interface is gone.
    """
    for _ in range(FRAMES_A_TURN):
        one = receive(opened)
        if one is None:
            return
        yield one


def readable(sockets: Collection[socket.socket], timeout_s: float) -> list[socket.socket]:
    """Those that something has come to, or an error; waits for it. [] when the time is over.

    By poll(2): an agent of many guests has descriptors above 1,023, which select(2) can't take.
    """
    poller, by_number = select.poll(), {each.fileno(): each for each in sockets}
    for number in by_number:
        poller.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poller.poll(math.ceil(max(timeout_s, 0.0) * 1e3))]


def ready_until(sockets: Collection[socket.socket], deadline_s: float) -> Iterator[socket.socket]:
    """Those that something has come to, again and again, until a time of time.monotonic().

    What is there by then is given, however late this thread gets to it: that the node is busy is no
    silence of anybody else's. But FRAMES_A_TURN looks at most, as somebody may send on and on.
    """
    looks = FRAMES_A_TURN
    while sockets and looks:
        left_s = deadline_s - time.monotonic()
        ready = readable(sockets, left_s)
        if left_s <= 0:
            looks = looks - 1 if ready else 0
        yield from ready


def _attach(opened: socket.socket, program: Sequence[Instruction]) -> None:
    code = b"".join(struct.pack("@HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    opened.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, header)
