"""The ways to other nodes: packets as large as the link's MTU, the tunnels' port, their clocks.

ICMP alone, so that it works before any agent does: an echo request that must not be fragmented
(RFC 792, RFC 1191), a timestamp request, which a Linux host answers with its milliseconds since
midnight UTC, and a datagram to a port where nobody listens, which it answers with "port
unreachable" (RFC 1122, section 4.1.3.1). Synchronous.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import time
from typing import Final

from node_agent.clock_words import DIFFERS_S, offset_text
from node_agent.doctor.datagrams import checksum, rejecter
from node_agent.doctor.findings import Finding, failure, fine, warning

ANSWER_S: Final = 1.0
TRIES: Final = 3
CLOCK_OFFSET_MS_MAX: Final = 100.0
"""Timelines of two nodes are compared; heartbeats and leases don't need it this close."""
CERTIFICATES_S_MAX: Final = 86_400.0
"""As `node_agent.trust.certificates.BACKDATED_S`."""
_OTHER_PORT: Final = 7789
"""Near the tunnels' own; nobody is known to listen there."""
_IP_HEADER_BYTES: Final = 20
_ICMP_HEADER_BYTES: Final = 8
_IP_MTU_DISCOVER: Final = 10
_IP_PMTUDISC_PROBE: Final = 3
_ECHO: Final = (8, 0)
_TIMESTAMP: Final = (13, 14)
_DAY_MS: Final = 86_400_000


def check_mtu(node: str, address: str, mtu_bytes: int) -> Finding:
    """Whether packets of the interface's MTU reach `address` in one piece."""
    name = f"MTU to {node}"
    body = bytes(mtu_bytes - _IP_HEADER_BYTES - _ICMP_HEADER_BYTES)
    try:
        if _ask(address, _ECHO, body) is not None:
            return fine(name, f"{mtu_bytes} bytes pass to {address}")
        small = _ask(address, _ECHO, b"ferry")
    except OSError as error:
        return failure(name, f"{address}: {error.strerror or error}", "mend the route to it")
    if small is None:
        return warning(
            name,
            f"{address} doesn't answer ICMP echo: unknown",
            "allow ICMP between the nodes, path MTU discovery needs it too",
        )
    return failure(
        name,
        f"small packets pass to {address}, packets of {mtu_bytes} bytes don't",
        f"set the same MTU on both nodes and on every switch between, or {mtu_bytes} is too much",
    )


def check_tunnel_port(node: str, address: str, port: int) -> Finding:
    """Whether datagrams to the port that migrations' tunnels use reach `address`.

    Outside of migrations nobody listens there. A firewall may say the same (`rejecter`).
    """
    name = f"UDP port {port} of {node}"
    lost = "what arrives for a guest while it moves there is lost"
    mend = f"allow UDP port {port} between the nodes' migration addresses"
    try:
        if _refuses(address, port):
            who = rejecter(address, port)
            if who is None:
                return fine(name, f"datagrams reach {address}")
            detail = f"a firewall of {who} rejects datagrams to {address}: {lost}"
            return warning(name, detail, mend)
        others = _refuses(address, _OTHER_PORT)
    except OSError as error:
        reason = error.strerror or str(error)
        return warning(name, f"datagrams to {address} are refused ({reason}): {lost}", mend)
    if others:
        detail = f"{address} answers for other ports, not for this one: {lost}"
        return warning(name, f"{detail}, unless a migration uses it now", mend)
    detail = f"{address} answers no datagrams: unknown"
    return warning(name, detail, f"{mend}; `ferry migration show` names what wasn't forwarded")


def _refuses(address: str, port: int) -> bool:
    """Whether the node says that nobody listens there. OSError: somebody else says something."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as opened:
        opened.settimeout(ANSWER_S / TRIES)
        opened.connect((address, port))
        for _ in range(TRIES):
            try:
                opened.send(b"ferry")
                opened.recv(1)
            except ConnectionRefusedError:
                return True
            except TimeoutError:
                continue
    return False


def check_clock(node: str, address: str, heartbeats_s: float | None = None) -> Finding:
    """How far the other node's clock is from ours.

    A timestamp's answer knows no date. `heartbeats_s`: what the node's heartbeats say, to a second.
    """
    name = f"clock of {node}"
    mend = "run chrony or another NTP client on both nodes"
    if heartbeats_s is not None and abs(heartbeats_s) > DIFFERS_S:
        detail = offset_text(heartbeats_s, "this node's")
        if abs(heartbeats_s) > CERTIFICATES_S_MAX:
            said = f"{detail}: certificates may be refused as expired, or as not yet valid"
            return failure(name, said, f"set the clock that is wrong; {mend}")
        return warning(name, detail, f"set the clock that is wrong; {mend}")
    try:
        offset_ms = clock_offset_ms(address)
    except OSError as error:
        return warning(name, f"{address}: {error.strerror or error}", "mend the route to it")
    if offset_ms is None:
        if heartbeats_s is not None:
            return fine(name, f"within {DIFFERS_S:.0f} s, by its heartbeats")
        return warning(name, "unknown: no answer to ICMP timestamps", "look at `chronyc tracking`")
    detail = f"{round(offset_ms):+d} ms"
    if abs(offset_ms) <= CLOCK_OFFSET_MS_MAX:
        return fine(name, detail)
    return warning(name, detail, mend)


def clock_offset_ms(address: str) -> float | None:
    """Theirs less ours, of the time of day, to about 1 ms; None without an answer. OSError.

    To half of what asking took. Where that is much, we may have waited for a core, and ask again.
    """
    found: list[tuple[float, float]] = []
    while len(found) < TRIES and min(found, default=(math.inf, 0.0))[0] > CLOCK_OFFSET_MS_MAX:
        measured = _measure(address)
        if measured is None:
            break
        found.append(measured)
    return min(found)[1] if found else None


def _measure(address: str) -> tuple[float, float] | None:
    """How long it took to ask, and what `clock_offset_ms` says of it; in ms."""
    sent_ms = _since_midnight_ms()
    answer = _ask(address, _TIMESTAMP, struct.pack("!III", int(sent_ms), 0, 0))
    received_ms = _since_midnight_ms()
    if answer is None or len(answer) < 12:
        return None
    _, theirs_in, theirs_out = struct.unpack_from("!III", answer)
    if (theirs_in | theirs_out) & 0x8000_0000:  # Not in milliseconds since midnight, it says.
        return None
    offset: float = ((theirs_in - sent_ms) + (theirs_out - received_ms)) / 2 + 0.5
    took_ms = (received_ms - sent_ms) % _DAY_MS
    return took_ms, (offset + _DAY_MS / 2) % _DAY_MS - _DAY_MS / 2


def _since_midnight_ms() -> float:
    return (time.time() * 1000) % _DAY_MS


def _ask(address: str, kinds: tuple[int, int], body: bytes) -> bytes | None:
    """The body of the answer; None if there is none in time. OSError, also for IPv6 addresses."""
    identifier = os.getpid() & 0xFFFF
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as opened:
        opened.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
        for number in range(TRIES):
            head = struct.pack("!BBHHH", kinds[0], 0, 0, identifier, number)
            sum_ = checksum(head + body)
            opened.sendto(head[:2] + sum_.to_bytes(2, "big") + head[4:] + body, (address, 0))
            found = _answer(opened, address, (kinds[1], identifier, number))
            if found is not None:
                return found
    return None


def _answer(opened: socket.socket, address: str, wanted: tuple[int, int, int]) -> bytes | None:
    deadline = time.monotonic() + ANSWER_S / TRIES
    while (left_s := deadline - time.monotonic()) > 0:
        opened.settimeout(left_s)
        try:
            packet, (sender, _) = opened.recvfrom(65_535)
        except TimeoutError:
            return None
        message = packet[(packet[0] & 0xF) * 4 :]
        if sender == address and len(message) >= _ICMP_HEADER_BYTES:
            kind, _, _, identifier, number = struct.unpack_from("!BBHHH", message)
            if (kind, identifier, number) == wanted:
                return message[_ICMP_HEADER_BYTES:]
    return None
