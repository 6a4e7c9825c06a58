"""What a guest's users see, from the lab's client namespace.

Sockets are made in the namespace, and used from here: a socket stays where it was made. Packets are
timed by the kernel at their arrival, so that a busy test process doesn't count as a gap.
"""

from __future__ import annotations

import itertools
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Final, Self

from deploy.guest.protocol import UdpPacket, stream_bytes
from deploy.lab.cables import GUEST_INTERFACE
from deploy.lab.enter import enter

HTTP_PORT: Final = 80
CONNECT_S: Final = 10.0
ANSWER_S: Final = 60.0
_POLL_S: Final = 0.05
_DRAIN_S: Final = 0.05
_SO_TIMESTAMPNS: Final = 35
_SO_RCVBUFFORCE: Final = 33
_BUFFER_BYTES: Final = 16 * 1024**2
_TIMESPEC: Final = struct.Struct("@ll")
_ANNOUNCEMENTS: Final = {0x0806: "arp", 0x8035: "rarp"}


def in_namespace(namespace: str, make: Callable[[], socket.socket]) -> socket.socket:
    """A socket that `make` made in the namespace."""
    made: list[socket.socket] = []
    failures: list[Exception] = []

    def work() -> None:
        try:
            enter(namespace)
            made.append(make())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(CONNECT_S * 2)
    if failures:
        raise failures[0]
    return made[0]


def fetch(namespace: str, address: str, target: str) -> bytes:
    """The body of a GET. AssertionError for another answer than 200, OSError for none."""
    with in_namespace(
        namespace, lambda: socket.create_connection((address, HTTP_PORT), CONNECT_S)
    ) as connection:
        connection.settimeout(ANSWER_S)
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: guest\r\n\r\n".encode())
        answer = b""
        while data := connection.recv(65_536):
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    return body


class _Watch:
    """A thread that works until the `with` block ends; its failure is raised there."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._guarded, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(ANSWER_S)
        if error is None and self._failure is not None:
            raise self._failure

    def _guarded(self) -> None:
        try:
            self._run()
        except Exception as failure:
            self._failure = failure

    def _run(self) -> None:
        raise NotImplementedError


class PacketWatch(_Watch):
    """Receives a guest's numbered packets of each millisecond."""

    def __init__(self, namespace: str, port: int) -> None:
        super().__init__()
        self._socket = in_namespace(namespace, lambda: self._opened(port))
        self._seen: list[tuple[float, int]] = []
        self._boots: set[int] = set()

    @staticmethod
    def _opened(port: int) -> socket.socket:
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        opened.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        opened.setblocking(False)
        opened.bind(("", port))
        return opened

    def _run(self) -> None:
        with self._socket:
            while True:
                ending = self._stop.wait(_DRAIN_S)
                self._drain()
                if ending:
                    return

    def _drain(self) -> None:
        space = socket.CMSG_SPACE(_TIMESPEC.size)
        while True:
            try:
                data, control, _, _ = self._socket.recvmsg(64, space)
            except BlockingIOError:
                return
            packet = UdpPacket.parse(data)
            seconds, nanoseconds = _TIMESPEC.unpack_from(control[0][2])
            self._boots.add(packet.boot_id)
            self._seen.append((seconds + nanoseconds / 1e9, packet.sequence))

    def wait_packets(self, count: int) -> None:
        """Until so many more have arrived."""
        wanted, deadline = len(self._seen) + count, time.monotonic() + ANSWER_S
        while len(self._seen) < wanted:
            assert time.monotonic() < deadline, f"no {count} packets within {ANSWER_S:g} s"
            time.sleep(_POLL_S)

    def longest_gap_ms(self, since_s: float, until_s: float) -> float:
        """The longest silence between two packets, of those that overlap the span."""
        seen = list(self._seen)
        gaps = [
            (after - before) * 1e3
            for (before, _), (after, _) in itertools.pairwise(seen)
            if after >= since_s and before <= until_s
        ]
        assert gaps, "no packets at all"
        return max(gaps)

    @property
    def lost(self) -> int:
        """Numbers that never arrived, of those between the first and the last."""
        numbers = {sequence for _, sequence in list(self._seen)}
        return max(numbers) - min(numbers) + 1 - len(numbers)

    @property
    def duplicates(self) -> int:
        """More than one guest sent it, or one guest's time went back."""
        numbers = [sequence for _, sequence in list(self._seen)]
        return len(numbers) - len(set(numbers))

    @property
    def boots(self) -> int:
        return len(self._boots)


class Download(_Watch):
    """One TCP connection that is held open, and whose content is checked byte by byte."""

    def __init__(self, namespace: str, address: str, bytes_per_s: int) -> None:
        super().__init__()
        self._connection = in_namespace(
            namespace, lambda: socket.create_connection((address, HTTP_PORT), CONNECT_S)
        )
        target = f"/stream?bytes={1 << 40}&bytes_per_s={bytes_per_s}"
        self._connection.sendall(f"GET {target} HTTP/1.1\r\nHost: guest\r\n\r\n".encode())
        self.received_bytes = 0

    def _run(self) -> None:
        head: bytes | None = b""
        with self._connection as connection:
            while not self._stop.is_set():
                if not select.select([connection], [], [], _POLL_S)[0]:
                    continue
                data = connection.recv(1 << 18)
                if not data:
                    raise AssertionError("the guest closed the connection")
                if head is not None:
                    head += data
                    start, end, data = head.partition(b"\r\n\r\n")
                    if not end:
                        continue
                    assert start.startswith(b"HTTP/1.1 200 "), start
                    head = None
                expected = stream_bytes(self.received_bytes, len(data))
                assert data == expected, f"wrong content at byte {self.received_bytes} or after"
                self.received_bytes += len(data)

    def wait_bytes(self, count: int) -> None:
        """Until so many more have arrived: the connection is alive."""
        wanted, deadline = self.received_bytes + count, time.monotonic() + ANSWER_S
        while self.received_bytes < wanted:
            assert self._failure is None, f"the download broke: {self._failure}"
            assert time.monotonic() < deadline, "the download stands still"
            time.sleep(_POLL_S)


class AnnouncementWatch(_Watch):
    """Counts ARP and RARP frames that arrive at the client from other than itself."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self._sockets = [
            in_namespace(namespace, partial(self._opened, kind)) for kind in _ANNOUNCEMENTS
        ]
        self.frames: Counter[str] = Counter()

    @staticmethod
    def _opened(ethertype: int) -> socket.socket:
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ethertype))
        opened.bind((GUEST_INTERFACE, ethertype))
        return opened

    def _run(self) -> None:
        while not self._stop.is_set():
            for readable in select.select(self._sockets, [], [], _POLL_S)[0]:
                _, sender = readable.recvfrom(2048)
                if sender[2] != socket.PACKET_OUTGOING:
                    self.frames[_ANNOUNCEMENTS[sender[1]]] += 1
        for each in self._sockets:
            each.close()
