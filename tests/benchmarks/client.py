"""The guest's user: `python -m tests.benchmarks.client`, in the lab's client namespace.

Listens to the guest's packets of each millisecond, downloads, plays. Prints `ready` when the first
packet arrived, works until its standard input ends, then prints one JSON line, `Observed`.

Packets are timed by the kernel (SO_TIMESTAMPNS) and fetched in batches, so that the client itself
takes hardly any of the machine's time.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import select
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Final

import msgspec

from deploy.guest.protocol import UdpPacket, parse_status

_SO_TIMESTAMPNS: Final = 35
_SO_RCVBUFFORCE: Final = 33
_TIMESPEC = struct.Struct("@ll")
_ECHO = struct.Struct("!BBHHH")
_ECHO_REQUEST: Final = 8
_ECHO_REPLY: Final = 0
_RECEIVE_BUFFER_BYTES: Final = 16 * 1024**2
_BATCH_S: Final = 0.05
_STREAM_BYTES: Final = 1 << 40
_STREAM_SILENCE_S: Final = 20.0
_STATUS_TIMEOUT_S: Final = 3.0
_WORK_GAP_S: Final = 0.1


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """What the client saw. Times by the host's wall clock, in ns."""

    arrivals_ns: list[int]
    sequences: list[int]
    """The numbers of the packets, in the order of `arrivals_ns`."""
    echoes_sent: int
    echoes_received: int
    stream_at_ns: list[int]
    stream_bytes: list[int]
    """Bytes that had arrived by `stream_at_ns`."""
    stream_error: str | None
    work_at_ns: list[int]
    work: list[int]
    """Pages that the guest had rewritten and verified by `work_at_ns`."""
    corruptions: int | None
    """What the guest says of its memory at the end; None: it doesn't answer."""


@dataclass(slots=True)
class _Seen:
    arrivals_ns: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    echoes_sent: int = 0
    echoes_received: int = 0
    stream_at_ns: list[int] = field(default_factory=list)
    stream_bytes: list[int] = field(default_factory=list)
    stream_error: str | None = None
    work_at_ns: list[int] = field(default_factory=list)
    work: list[int] = field(default_factory=list)


def _packets(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
    listener.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    listener.bind(("", port))
    listener.setblocking(False)
    return listener


def _drain(listener: socket.socket, seen: _Seen) -> None:
    space = socket.CMSG_SPACE(_TIMESPEC.size)
    while True:
        try:
            data, control, _, _ = listener.recvmsg(64, space)
        except BlockingIOError:
            return
        seconds, nanoseconds = _TIMESPEC.unpack(control[0][2])
        with contextlib.suppress(ValueError):
            seen.sequences.append(UdpPacket.parse(data).sequence)
            seen.arrivals_ns.append(seconds * 1_000_000_000 + nanoseconds)


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def _play(guest: str, players: int, per_s: int, stop: threading.Event, seen: _Seen) -> None:
    """Each player's packets are echo requests with the player's number; 32 bytes of payload."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.setblocking(False)
        base = os.getpid() & 0xF000
        payload = bytes(32)
        sequence, deadline_s = 0, time.monotonic()
        while not stop.is_set():
            sequence = (sequence + 1) & 0xFFFF
            for player in range(players):
                head = _ECHO.pack(_ECHO_REQUEST, 0, 0, base + player, sequence)
                head = _ECHO.pack(
                    _ECHO_REQUEST, 0, _checksum(head + payload), base + player, sequence
                )
                with contextlib.suppress(BlockingIOError):
                    raw.sendto(head + payload, (guest, 0))
                    seen.echoes_sent += 1
            deadline_s = max(deadline_s + 1 / per_s, time.monotonic())
            stop.wait(deadline_s - time.monotonic())
            with contextlib.suppress(BlockingIOError):
                while data := raw.recv(128):
                    if data[20] == _ECHO_REPLY:
                        seen.echoes_received += 1


def _download(guest: str, bytes_per_s: int, stop: threading.Event, seen: _Seen) -> None:
    path = f"/stream?bytes={_STREAM_BYTES}&bytes_per_s={bytes_per_s}"
    connection = http.client.HTTPConnection(guest, timeout=_STREAM_SILENCE_S)
    total = 0
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        while not stop.is_set():
            chunk = response.read1(262_144)
            if not chunk:
                seen.stream_error = "ended early"
                return
            total += len(chunk)
            seen.stream_at_ns.append(time.time_ns())
            seen.stream_bytes.append(total)
    except (OSError, http.client.HTTPException) as error:
        seen.stream_error = str(error) or type(error).__name__
    finally:
        connection.close()


def _watch(guest: str, stop: threading.Event, seen: _Seen) -> None:
    """How far the guest's own work is, again and again."""
    while not stop.wait(_WORK_GAP_S):
        with contextlib.suppress(OSError, http.client.HTTPException, msgspec.DecodeError):
            connection = http.client.HTTPConnection(guest, timeout=_STATUS_TIMEOUT_S)
            try:
                connection.request("GET", "/status")
                status = parse_status(connection.getresponse().read())
            finally:
                connection.close()
            seen.work_at_ns.append(time.time_ns())
            seen.work.append(status.memory_writes + status.memory_checks)


def _corruptions(guest: str) -> int | None:
    connection = http.client.HTTPConnection(guest, timeout=_STATUS_TIMEOUT_S)
    try:
        connection.request("GET", "/status")
        return parse_status(connection.getresponse().read()).corruptions
    except (OSError, http.client.HTTPException, msgspec.DecodeError):
        return None
    finally:
        connection.close()


def _work(listener: socket.socket, seen: _Seen) -> None:
    """Fetch packets until the standard input ends."""
    said_ready = False
    while True:
        readable, _, _ = select.select([sys.stdin.buffer], [], [], _BATCH_S)
        _drain(listener, seen)
        if seen.arrivals_ns and not said_ready:
            said_ready = True
            print("ready", flush=True)
        if readable and not os.read(sys.stdin.fileno(), 4096):
            return


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--guest", required=True)
    parser.add_argument("--udp-port", type=int, required=True)
    parser.add_argument("--download-bytes-per-s", type=int, default=0)
    parser.add_argument("--watch-work", action="store_true")
    parser.add_argument("--players", type=int, default=0)
    parser.add_argument("--player-packets-per-s", type=int, default=20)
    options = parser.parse_args()
    seen, stop = _Seen(), threading.Event()
    threads = []
    if options.download_bytes_per_s:
        download = (options.guest, options.download_bytes_per_s, stop, seen)
        threads.append(threading.Thread(target=_download, args=download, daemon=True))
    if options.watch_work:
        watch = (options.guest, stop, seen)
        threads.append(threading.Thread(target=_watch, args=watch, daemon=True))
    if options.players:
        players = (options.guest, options.players, options.player_packets_per_s, stop, seen)
        threads.append(threading.Thread(target=_play, args=players, daemon=True))
    with _packets(options.udp_port) as listener:
        for thread in threads:
            thread.start()
        _work(listener, seen)
        stop.set()
        for thread in threads:
            thread.join(2.0)
    observed = Observed(
        arrivals_ns=seen.arrivals_ns,
        sequences=seen.sequences,
        echoes_sent=seen.echoes_sent,
        echoes_received=seen.echoes_received,
        stream_at_ns=seen.stream_at_ns,
        stream_bytes=seen.stream_bytes,
        stream_error=seen.stream_error,
        work_at_ns=seen.work_at_ns,
        work=seen.work,
        corruptions=_corruptions(options.guest),
    )
    sys.stdout.buffer.write(msgspec.json.encode(observed) + b"\n")


if __name__ == "__main__":
    main()
