"""Who says that a UDP port can't be reached: the node itself, or a firewall?

Where nobody listens a node answers "port unreachable" (RFC 1122, section 4.1.3.1). A firewall's
plain `reject` says the same, in the node's own name if it is the node's. A datagram that claims to
be longer than it is tells them apart: UDP drops that without a word, and a rule about ports never
looks at its length. Its checksum is right for what is there, so that the firewall answers.

Synchronous; IPv4.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from typing import Final

TRIES: Final = 3
ANSWER_S: Final = 1.0
_UNREACHABLE: Final = 3
_MORE_BYTES: Final = 1000
_PORT_FIRST: Final = 49152
_PORTS: Final = 16384
_PACKET_BYTES_MAX: Final = 65_535


def rejecter(address: str, port: int) -> str | None:
    """Who rejects datagrams to the port by a rule; None: nobody, or it can't be told. OSError."""
    if ":" in address:
        return None
    own_port = _PORT_FIRST + int.from_bytes(os.urandom(2), "big") % _PORTS
    with (
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as listener,
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as sender,
    ):
        sender.connect((address, 0))
        own: str = sender.getsockname()[0]
        for _ in range(TRIES):
            sender.send(overlong(own, address, own_port, port))
            who = _complainer(listener, address, own_port, port)
            if who is not None:
                return who
    return None


def overlong(source: str, target: str, source_port: int, port: int) -> bytes:
    """A datagram (RFC 768) that says it is longer than it is. Pure."""
    body = b"ferry"
    real_bytes = 8 + len(body)
    head = struct.pack("!HHHH", source_port, port, real_bytes + _MORE_BYTES, 0)
    pseudo = socket.inet_aton(source) + socket.inet_aton(target)
    pseudo += struct.pack("!BBH", 0, socket.IPPROTO_UDP, real_bytes)
    total = checksum(pseudo + head + body) or 0xFFFF
    return head[:6] + total.to_bytes(2, "big") + body


def _complainer(listener: socket.socket, address: str, own_port: int, port: int) -> str | None:
    deadline = time.monotonic() + ANSWER_S / TRIES
    while (left_s := deadline - time.monotonic()) > 0:
        listener.settimeout(left_s)
        try:
            packet, (who, _) = listener.recvfrom(_PACKET_BYTES_MAX)
        except TimeoutError:
            return None
        message = packet[(packet[0] & 0xF) * 4 :]
        if len(message) < 36 or message[0] != _UNREACHABLE:
            continue
        told = message[8:]  # The datagram that it is about.
        ports = told[(told[0] & 0xF) * 4 :][:4]
        if told[16:20] == socket.inet_aton(address) and ports == struct.pack("!HH", own_port, port):
            found: str = who
            return found
    return None


def checksum(data: bytes) -> int:
    """RFC 1071. Pure."""
    data += b"\x00" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
