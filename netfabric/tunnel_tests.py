"""Whether a migration's tunnels pass frames: tried while the guest still runs, by both its nodes.

    source      a short frame and a full one into each tunnel's end
    destination which of them came out of its end

A firewall that drops the tunnel's UDP port swallows both, one that drops fragments the full ones.
They are addressed to a group that bridges keep to themselves (IEEE 802.1Q, table 8-1), so where
they come out, at a bridge's port or an interface of its own, they go no further.

The sockets hear from `listen` on and are read when somebody asks: what a busy agent reads late
isn't lost. Belongs to one event loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from migrator.errors import FabricError
from migrator.model import DomainName
from migrator.ports import TunnelReport
from netfabric import capture
from netfabric.frames import ETHERTYPE_EXPERIMENTAL, ethernet
from netfabric.probing import dissect
from netfabric.threads import in_thread

SHORT_BYTES: Final = 64
GROUP: Final = bytes.fromhex("0180c200000d")
_MARK: Final = b"ferrytunnel"
_HEAD: Final = struct.Struct(f"!{len(_MARK)}sI")

log = logging.getLogger(__name__)


def frame_of(tunnel: str, payload_bytes: int) -> bytes:
    """A test frame whose payload is that long, and says so. Pure.

    Its sender's MAC is nobody's: a tunnel's end takes a frame from its own MAC for a loop.
    """
    own_mac = b"\x06" + hashlib.blake2b(tunnel.encode(), digest_size=5).digest()
    body = _HEAD.pack(_MARK, payload_bytes).ljust(payload_bytes, b"\x00")
    return ethernet(GROUP, own_mac, ETHERTYPE_EXPERIMENTAL, body)


def length_in(frame: bytes) -> int | None:
    """The payload's length, if it is a test frame, and whole. Pure."""
    ethertype, payload = dissect(frame)
    if ethertype != ETHERTYPE_EXPERIMENTAL or len(payload) < _HEAD.size:
        return None
    mark, length = _HEAD.unpack_from(payload)
    return int(length) if mark == _MARK and len(payload) >= length else None


@dataclass(slots=True)
class _Ears:
    """What listens for one domain that is on its way here, by tunnel, and what it has heard."""

    sockets: dict[str, socket.socket]
    lengths: dict[str, set[int]] = field(default_factory=dict)
    frames: int = 0


class TunnelTests:
    """See the module. Nothing depends on it: what can't be tried is logged."""

    def __init__(self) -> None:
        self._ears: dict[DomainName, _Ears] = {}
        self._sent: dict[DomainName, int] = {}

    async def send(
        self, domain: DomainName, tunnels: Sequence[str], mtus_bytes: Sequence[int | None]
    ) -> Sequence[bool]:
        """Into each tunnel, but where the MTU is None; whether that was possible."""
        sent = await in_thread(
            lambda: [_send(name, mtu) for name, mtu in zip(tunnels, mtus_bytes, strict=True)]
        )
        self._sent[domain] = self._sent.get(domain, 0) + sum(sent)
        return [count > 0 for count in sent]

    async def listen(self, domain: DomainName, tunnels: Sequence[str]) -> None:
        """At these ends, from now on."""
        await self.deafen(domain)
        sockets = await in_thread(lambda: _open(tunnels), lambda made: _close(made.values()))
        self._ears[domain] = _Ears(sockets)

    def heard(self, domain: DomainName, tunnel: str, mtu_bytes: int) -> TunnelReport:
        """What has come out of this tunnel so far."""
        ears = self._ears.get(domain)
        opened = ears.sockets.get(tunnel) if ears is not None else None
        if ears is None or opened is None:
            return TunnelReport(made=False)
        lengths = ears.lengths.setdefault(tunnel, set())
        with contextlib.suppress(FabricError):  # the end is gone
            for frame, outgoing, _ in capture.received(opened):
                length = None if outgoing else length_in(frame)
                if length is not None:
                    lengths.add(length)
                    ears.frames += 1
        full = mtu_bytes in lengths
        return TunnelReport(short=full or SHORT_BYTES in lengths, full=full)

    async def deafen(self, domain: DomainName) -> int:
        """Listen no more; how many test frames were heard. Idempotent."""
        ears = self._ears.pop(domain, None)
        if ears is None:
            return 0
        await in_thread(lambda: _close(ears.sockets.values()))  # takes some ms
        return ears.frames

    def forget_sent(self, domain: DomainName) -> int:
        """Of a domain that has left, or stays; how many test frames were sent. Idempotent."""
        return self._sent.pop(domain, 0)

    async def close(self) -> None:
        """Idempotent."""
        for domain in list(self._ears):
            await self.deafen(domain)


def _send(tunnel: str, mtu_bytes: int | None) -> int:
    """Frames sent."""
    if mtu_bytes is None:
        return 0
    sent = 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        sender.setblocking(False)
        for length in (SHORT_BYTES, mtu_bytes):
            try:
                sender.sendto(frame_of(tunnel, length), (tunnel, 0))
                sent += 1
            except OSError as error:
                log.info("tunnel %s takes no frame of %d bytes: %s", tunnel, length, error)
    return sent


def _open(tunnels: Sequence[str]) -> dict[str, socket.socket]:
    program = capture.of_ethertype(ETHERTYPE_EXPERIMENTAL)
    found: dict[str, socket.socket] = {}
    for name in tunnels:
        try:
            found[name] = capture.open_capture(name, program)
        except FabricError as error:
            log.info("nothing comes by tunnel %s: %s", name, error)
    return found


def _close(sockets: Iterable[socket.socket]) -> None:
    for opened in sockets:
        opened.close()
