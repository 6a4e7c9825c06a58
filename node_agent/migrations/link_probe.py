"""Measures the way to another node by sending a few megabytes, when nothing better is known.

    source                                        destination
      │  link.probe ───────────────────────────────►│ listens at its migration address, for a moment
      │◄───────────────────────────── Probe(port, …)│
      │  secret, then bytes for 0.4 s or 16 MiB ═══►│ times them, the first quarter left out:
      │◄──────────────────── bytes, microseconds ───│ a shaped link lets a burst through at first

One connection is served a probe, within two seconds; a wrong secret ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import struct
import time
from typing import Final

from migrator.errors import PeerError, words
from migrator.figures import LinkOrigin, LinkSpeed
from migrator.model import NodeName
from migrator.ports import Struct
from node_agent.peers.hub import PeerHub

LINK_PROBE: Final = "link.probe"
CALL_S: Final = 5.0
PROBE_S: Final = 2.0
_SEND_S: Final = 0.4
_SEND_BYTES: Final = 16 * 1024 * 1024
_CHUNK_BYTES: Final = 256 * 1024
_SECRET_BYTES: Final = 32
_SKIPPED_SHARE: Final = 0.25
_PROBES_MAX: Final = 4
_ANSWER: Final = struct.Struct("!QQ")


class ProbeParams(Struct, frozen=True, kw_only=True):
    """No params; the caller is the source."""


class Probe(Struct, frozen=True, kw_only=True):
    """Where to send to."""

    host: str
    port: int
    secret: bytes


class LinkProbe:
    """Both sides. `register` once; `close` ends the probes that others are sending."""

    def __init__(self, hub: PeerHub, address: str) -> None:
        """`address`: this node's migration address."""
        self._hub = hub
        self._address = address
        self._serving: set[asyncio.Task[None]] = set()

    def register(self) -> None:
        self._hub.handle(LINK_PROBE, ProbeParams, self.serve)

    async def close(self) -> None:
        for task in tuple(self._serving):
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving, timeout=PROBE_S)

    async def measure(self, node: NodeName) -> LinkSpeed:
        """PeerError if the other node can't be reached at its migration address."""
        probe = await self._hub.call(node, LINK_PROBE, ProbeParams(), Probe, timeout_s=CALL_S)
        try:
            async with asyncio.timeout(PROBE_S):
                received, microseconds = await self._send(probe)
        except (OSError, EOFError, TimeoutError) as error:
            raise PeerError(
                f"the link to {node} ({probe.host}) can't be measured: {error or 'no answer'}"
            ) from error
        if not received:
            raise PeerError(f"the link to {node} ({probe.host}) can't be measured: nothing arrived")
        return LinkSpeed(
            bytes_per_s=received / max(microseconds, 1) * 1e6,
            origin=LinkOrigin.PROBE,
            detail=f"{received / 1e6:.1f} MB in {microseconds / 1e3:.0f} ms",
        )

    async def _send(self, probe: Probe) -> tuple[int, int]:
        reader, writer = await asyncio.open_connection(
            probe.host, probe.port, local_addr=(self._address, 0)
        )
        try:
            writer.write(probe.secret)
            chunk = bytes(_CHUNK_BYTES)
            deadline = time.monotonic() + _SEND_S
            for _ in range(_SEND_BYTES // _CHUNK_BYTES):
                writer.write(chunk)
                await writer.drain()
                if time.monotonic() > deadline:
                    break
            writer.write_eof()
            answer = _ANSWER.unpack(await reader.readexactly(_ANSWER.size))
        finally:
            writer.close()
        return int(answer[0]), int(answer[1])

    async def serve(self, _: NodeName, __: ProbeParams) -> Probe:
        """Listen for one source, for two seconds. PeerError if this node can't."""
        if len(self._serving) >= _PROBES_MAX:
            raise PeerError(f"{_PROBES_MAX} links are being measured already; try again")
        secret = secrets.token_bytes(_SECRET_BYTES)
        served = asyncio.Event()

        async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                async with asyncio.timeout(PROBE_S):
                    given = await reader.readexactly(_SECRET_BYTES)
                    if hmac.compare_digest(given, secret):
                        writer.write(_ANSWER.pack(*await _time(reader)))
                        await writer.drain()
            except (OSError, EOFError, TimeoutError):
                pass  # The source sees it.
            finally:
                writer.close()
                served.set()

        try:
            server = await asyncio.start_server(receive, self._address, 0, backlog=1)
        except OSError as error:
            raise PeerError(f"can't listen at {self._address}: {words(error)}") from error
        task = asyncio.create_task(_until(server, served), name="link-probe")
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        port = server.sockets[0].getsockname()[1]
        return Probe(host=self._address, port=port, secret=secret)


async def _until(server: asyncio.Server, served: asyncio.Event) -> None:
    async with server:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBE_S):
                await served.wait()


async def _time(reader: asyncio.StreamReader) -> tuple[int, int]:
    """Bytes, and microseconds that they took, after what is skipped."""
    marks: list[tuple[float, int]] = []
    total = 0
    while data := await reader.read(_CHUNK_BYTES):
        total += len(data)
        marks.append((time.monotonic(), total))
    if not marks:
        return 0, 0
    skipped = next(mark for mark in marks if mark[1] >= _SKIPPED_SHARE * total)
    seconds = marks[-1][0] - skipped[0]
    return total - skipped[1], int(seconds * 1e6)
