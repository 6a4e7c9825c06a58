"""The demo's client: one long download, short requests, and a packet each millisecond.

    python -m deploy.demo.client --guest ADDRESS --udp-port PORT --stream-bytes-per-s N

Runs in the lab's client namespace. Prints `observations`, a JSON object a line, a second after
what they tell of. When its standard input ends, so also when its parent dies, it stops, asks the
guest to verify its memory, says `Farewell` and ends.

Packets are timed by the kernel at their arrival (SO_TIMESTAMPNS), not when this process got to
them: on a busy machine those are different things.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import ipaddress
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from deploy.demo.observations import (
    SAMPLE_S,
    Farewell,
    Observation,
    Request,
    Stream,
    StreamState,
    encode_line,
)
from deploy.demo.tally import Tally
from deploy.guest.protocol import GuestStatus, UdpPacket, parse_status, stream_bytes

HTTP_PORT: Final = 80
REQUEST_INTERVAL_S: Final = 0.25
REQUEST_TIMEOUT_S: Final = 5.0
"""Longer than a lost SYN's first two repetitions, 1 and 3 s."""
STREAM_BYTES: Final = 1 << 40
"""More than any demo downloads."""
STREAM_SILENCE_S: Final = 20.0
"""A download that brings nothing for so long counts as broken."""
VERIFY_TIMEOUT_S: Final = 70.0
"""The guest gives up its own verification after 60 s."""
REPORT_DELAY_S: Final = 1.0
"""How old a sample is when it's printed: late arrivals have been counted by then."""
_RECEIVE_BUFFER_BYTES: Final = 8 * 1024**2
"""Some seconds of packets: none may be lost because this process was busy."""
_POLL_S: Final = 0.2
_SO_TIMESTAMPNS: Final = 35
"""Of <asm-generic/socket.h>; Python doesn't name it."""
_SO_RCVBUFFORCE: Final = 33
_TIMESPEC = struct.Struct("@ll")
_DATAGRAM_BYTES_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for."""

    guest: str
    """IPv4 address."""
    udp_port: int
    stream_bytes_per_s: int


class Client:
    """The threads and what they share. `run` returns when `stop` was set, everything closed."""

    def __init__(self, options: Options, say: Callable[[Observation], None]) -> None:
        self._options = options
        self._say = say
        self._lock = threading.Lock()
        self._tally = Tally(time.time())
        self._failures: list[BaseException] = []
        self.stop = threading.Event()

    def run(self, wait: Callable[[float], bool]) -> None:
        """Work until `wait(seconds)` says True or a thread fails; then the farewell.

        Raises OSError if the packets' port can't be bound.
        """
        with _packet_socket(self._options.udp_port) as packets:
            jobs = (lambda: self._receive(packets), self._download, self._request_often)
            threads = [threading.Thread(target=self._guarded, args=(job,)) for job in jobs]
            try:
                for thread in threads:
                    thread.start()
                while not self.stop.is_set() and not wait(SAMPLE_S):
                    self._report(time.time() - REPORT_DELAY_S)
                ended_at_s = time.time()
            finally:
                self.stop.set()
                for thread in threads:
                    if thread.ident is not None:
                        thread.join(REQUEST_TIMEOUT_S + _POLL_S)
        if self._failures:
            raise self._failures[0]
        self._report(ended_at_s, last=True)
        self._say(farewell(self._options.guest))

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # Raised again by `run`, in the main thread.
            self._failures.append(error)
            self.stop.set()

    def _report(self, until_s: float, *, last: bool = False) -> None:
        with self._lock:
            taken = self._tally.take(until_s, last=last)
        for observation in taken:
            self._say(observation)

    def _note(self, observation: Observation) -> None:
        with self._lock:
            self._tally.note(observation)

    def _receive(self, packets: socket.socket) -> None:
        """Count the guest's packets; others are ignored."""
        space = socket.CMSG_SPACE(_TIMESPEC.size)
        while not self.stop.is_set():
            try:
                data, control, _, sender = packets.recvmsg(_DATAGRAM_BYTES_MAX, space)
            except TimeoutError:
                continue
            at_s = _kernel_time_s(control)
            if sender[0] != self._options.guest:
                continue
            with contextlib.suppress(ValueError), self._lock:
                self._tally.packet(at_s, UdpPacket.parse(data))

    def _download(self) -> None:
        """One connection, to the end. Whatever ends it earlier is told, and it isn't repeated."""
        try:
            with socket.create_connection(
                (self._options.guest, HTTP_PORT), REQUEST_TIMEOUT_S
            ) as connection:
                connection.settimeout(_POLL_S)
                rate = self._options.stream_bytes_per_s
                target = f"/stream?bytes={STREAM_BYTES}&bytes_per_s={rate}"
                connection.sendall(f"GET {target} HTTP/1.1\r\nHost: guest\r\n\r\n".encode())
                self._read_stream(connection)
        except (OSError, ValueError) as error:
            self._note(Stream(at_s=time.time(), state=StreamState.BROKEN, error=str(error)))

    def _read_stream(self, connection: socket.socket) -> None:
        """Raises ValueError for a wrong answer, OSError when the connection ends or is silent."""
        head, offset_bytes, heard_at_s = b"", -1, time.monotonic()
        while not self.stop.is_set():
            try:
                data = connection.recv(1 << 18)
            except TimeoutError:
                if time.monotonic() - heard_at_s > STREAM_SILENCE_S:
                    raise OSError(f"nothing arrived for {STREAM_SILENCE_S:g} s") from None
                continue
            at_s, heard_at_s = time.time(), time.monotonic()
            if not data:
                raise OSError("the guest closed the connection")
            if offset_bytes < 0:
                head += data
                body = _body_after(head)
                if body is None:
                    continue
                data, offset_bytes = body, 0
                self._note(Stream(at_s=at_s, state=StreamState.STARTED))
            if data != stream_bytes(offset_bytes, len(data)):
                raise ValueError(f"wrong content in the {len(data)} bytes from {offset_bytes} on")
            offset_bytes += len(data)
            with self._lock:
                self._tally.stream(at_s, len(data))

    def _request_often(self) -> None:
        while not self.stop.wait(REQUEST_INTERVAL_S):
            at_s, started_s, error = time.time(), time.monotonic(), None
            try:
                fetch(self._options.guest, "/", REQUEST_TIMEOUT_S)
            except OSError as failure:
                error = str(failure) or type(failure).__name__
            seconds = time.monotonic() - started_s
            self._note(Request(at_s=at_s, seconds=seconds, error=error))


def fetch(guest: str, path: str, timeout_s: float) -> bytes:
    """The body of a GET. Raises OSError for anything but 200 with all of its body."""
    connection = http.client.HTTPConnection(guest, HTTP_PORT, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    except http.client.HTTPException as error:
        raise OSError(f"no proper answer: {error!r}") from error
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        raise OSError(f"the guest answered {response.status}")
    return body


def farewell(guest: str) -> Farewell:
    """What the guest says of itself after verifying its memory, or why it can't be asked."""
    status: GuestStatus | None = None
    error: str | None = None
    try:
        status = parse_status(fetch(guest, "/verify", VERIFY_TIMEOUT_S))
    except (OSError, msgspec.DecodeError) as failure:
        error = str(failure) or type(failure).__name__
    return Farewell(at_s=time.time(), status=status, error=error)


def _packet_socket(port: int) -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        try:
            opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
        except PermissionError:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        opened.bind(("", port))
        opened.settimeout(_POLL_S)
    except OSError:
        opened.close()
        raise
    return opened


def _kernel_time_s(control: list[tuple[int, int, bytes]]) -> float:
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
            seconds, nanoseconds = _TIMESPEC.unpack_from(data)
            return float(seconds + nanoseconds / 1e9)
    return time.time()


def _body_after(head: bytes) -> bytes | None:
    """What follows an answer's head; None: there's more of the head to come."""
    text, separator, body = head.partition(b"\r\n\r\n")
    if not separator:
        if len(head) > 65_536:
            raise ValueError("the answer has no end to its head")
        return None
    if not text.startswith(b"HTTP/1.1 200 "):
        raise ValueError(f"the guest answered {text.splitlines()[0].decode(errors='replace')}")
    return body


def _parse(arguments: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(description="Watch a guest: a download, requests, packets.")
    parser.add_argument("--guest", required=True, type=ipaddress.IPv4Address)
    parser.add_argument("--udp-port", required=True, type=int)
    parser.add_argument("--stream-bytes-per-s", required=True, type=int)
    parsed = parser.parse_args(arguments)
    return Options(
        guest=str(parsed.guest),
        udp_port=parsed.udp_port,
        stream_bytes_per_s=parsed.stream_bytes_per_s,
    )


def _input_ended(timeout_s: float) -> bool:
    """Wait for the end of the standard input, at most so long; what comes on it is ignored."""
    readable, _, _ = select.select([sys.stdin], [], [], timeout_s)
    return bool(readable) and not os.read(sys.stdin.fileno(), 4096)


def _say(observation: Observation) -> None:
    sys.stdout.buffer.write(encode_line(observation))
    sys.stdout.buffer.flush()


def main(arguments: list[str] | None = None) -> int:
    try:
        Client(_parse(arguments), _say).run(_input_ended)
    except (BrokenPipeError, KeyboardInterrupt):
        return 1
    except OSError as error:
        print(f"demo client: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
