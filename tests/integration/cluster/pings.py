"""A thousand numbered questions a second to a guest, from the lab's client: what comes back, when.

A question that was asked during a blackout is answered after it, if the network kept it.

Paced strictly: what couldn't be asked in time is never made up for. Between the first and the last
of k + 1 questions lie at least k - 0.5 gaps, so in a blackout of B ms at most B + 1.5 are asked.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import socket
import struct
import time
from collections.abc import Sequence
from typing import Final

from tests.integration.cluster.client import ANSWER_S, _Watch, in_namespace

_ECHO_REQUEST: Final = {4: 8, 6: 128}
_ECHO_REPLY: Final = {4: 0, 6: 129}
_SO_TIMESTAMPNS: Final = 35
_SO_RCVBUFFORCE: Final = 33
_BUFFER_BYTES: Final = 16 * 1024**2
_DRAIN_S: Final = 20.0
_WAITING_MAX: Final = 100
"""So many may wait for their answer: a guest that a busy machine starves has bounded queues. The
narrowest is its kernel's socket for ICMP: 2 x SKB_TRUESIZE(64 KiB) (net/ipv4/icmp.c) holds some 170
answers, and what a burst has above that it drops (measured: with 200, only those of a place above
170 in their burst, and none on the way to the guest)."""
_TOLD_MAX: Final = 20
_BODY: Final = struct.Struct("!Q")


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


class PingWatch(_Watch):
    """ICMP echo requests at `per_s`; the numbers of the answers in the order of their arrival."""

    def __init__(
        self, namespace: str, address: str, per_s: int = 1000, *, waiting_max: int = _WAITING_MAX
    ) -> None:
        """`waiting_max`: more than that are lost where losses are what is measured."""
        super().__init__()
        self._waiting_max = waiting_max
        self._version = ipaddress.ip_address(address).version
        self._socket = in_namespace(namespace, self._opened)
        self._address = address
        self._gap_s = 1.0 / per_s
        self._identifier = id(self) & 0xFFFF
        self.sent_at_s: list[float] = []
        self.answers: list[tuple[float, int]] = []
        """Kernel's wall-clock time of arrival, number."""

    def _opened(self) -> socket.socket:
        if self._version == 4:
            opened = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        else:
            opened = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        opened.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        opened.setblocking(False)
        return opened

    def _run(self) -> None:
        with self._socket:
            due = time.monotonic()
            while not self._stop.is_set():
                self._drain()
                if len(self.sent_at_s) - len(self.answers) < self._waiting_max:
                    self._send()
                now = time.monotonic()
                due = max(due + self._gap_s, now + self._gap_s / 2)
                time.sleep(due - now)
            until = time.monotonic() + _DRAIN_S
            while time.monotonic() < until and self.lost:
                self._drain()
                time.sleep(0.01)

    def _send(self) -> None:
        body = _BODY.pack(self.sent)
        kind = _ECHO_REQUEST[self._version]
        head = struct.pack("!BBHHH", kind, 0, 0, self._identifier, self.sent & 0xFFFF)
        checksum = _checksum(head + body)  # The kernel makes that of ICMPv6.
        head = head[:2] + checksum.to_bytes(2, "big") + head[4:]
        with contextlib.suppress(BlockingIOError):
            self._socket.sendto(head + body, (self._address, 0))
            self.sent_at_s.append(time.time())

    def _drain(self) -> None:
        while True:
            try:
                packet, control, _, _ = self._socket.recvmsg(256, 64)
            except BlockingIOError:
                return
            message = packet[(packet[0] & 0xF) * 4 :] if self._version == 4 else packet
            if len(message) < 8 + _BODY.size:
                continue
            kind, _, _, identifier, _ = struct.unpack_from("!BBHHH", message)
            if kind == _ECHO_REPLY[self._version] and identifier == self._identifier:
                seconds, nanoseconds = struct.unpack_from("@ll", control[0][2])
                at_s = seconds + nanoseconds / 1e9
                self.answers.append((at_s, _BODY.unpack_from(message, 8)[0]))

    def wait_answers(self, count: int) -> None:
        """Until so many more have arrived."""
        wanted, deadline = len(self.answers) + count, time.monotonic() + ANSWER_S
        while len(self.answers) < wanted:
            assert time.monotonic() < deadline, f"no {count} answers within {ANSWER_S:g} s"
            time.sleep(0.01)

    @property
    def sent(self) -> int:
        return len(self.sent_at_s)

    @property
    def lost_at_s(self) -> list[float]:
        """When the questions were asked that nobody answered."""
        answered = {number for _, number in self.answers}
        sent = enumerate(list(self.sent_at_s))
        return [at_s for number, at_s in sent if number not in answered]

    @property
    def lost(self) -> int:
        return len(self.lost_at_s)

    @property
    def duplicates(self) -> int:
        return len(self.answers) - len({number for _, number in self.answers})

    @property
    def overtaken_at_s(self) -> list[float]:
        """When the questions were asked whose answers came after one to a later question."""
        numbers = [number for _, number in self.answers]
        pairs = itertools.pairwise(numbers)
        return [self.sent_at_s[after] for before, after in pairs if after < before]

    @property
    def reordered(self) -> int:
        return len(self.overtaken_at_s)

    def first_question_ms(self, at_s: float) -> float:
        """From `at_s` to the first question after it: nothing can arrive sooner."""
        return min(((each - at_s) * 1e3 for each in self.sent_at_s if each >= at_s), default=-1.0)

    def story(self, resumed_at_s: Sequence[float]) -> str:
        """What was lost, or answered after a later question, in ms beside the nearest resume."""

        def beside(at_s: float) -> str:
            return f"{min(((at_s - each) * 1e3 for each in resumed_at_s), key=abs):+.2f}"

        told = [f"lost, asked at {beside(at_s)} ms" for at_s in self.lost_at_s]
        for (_, before), (at_s, number) in itertools.pairwise(self.answers):
            if number < before:
                asked, later = self.sent_at_s[number], self.sent_at_s[before]
                told.append(
                    f"{number} after {before}: asked at {beside(asked)} and {beside(later)} ms,"
                    f" answered at {beside(at_s)} ms"
                )
        return "; ".join(told[:_TOLD_MAX])

    def first_after_ms(self, at_s: float) -> float:
        """From `at_s` to the first answer after it."""
        return min(((each - at_s) * 1e3 for each, _ in self.answers if each >= at_s), default=-1.0)
