"""One node's or router's end of the conversation about host routes: hears, sets, answers, asks.

    Claims come in ──► ledger: which are news ──► own routing table ──► Known goes back
    Claims go out to every peer, again and again until each has answered with the same, or worse
    news: somebody has claimed the address since, with a higher sequence

Belongs to one event loop. What is wrong with a datagram is logged, seldom, and not answered.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from migrator.errors import FabricError
from netfabric.routes.netlink import table
from netfabric.routes.netlink.messages import Claim, Claims, Known, Ledger, canonical, sign, verify
from netfabric.threads import in_thread

PORT: Final = 7783
GAPS_S: Final = (0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 0.74)
"""Between the repetitions of a question that not everybody has answered; 2 s in all."""
_PENDING_MAX: Final = 256
_LOG_GAP_S: Final = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SpeakerSettings:
    """`key` is shared by all nodes and routers. No `networks`: any address may be claimed."""

    listen: str
    key: bytes = field(repr=False)
    port: int = PORT
    networks: tuple[str, ...] = ()
    own_hops: tuple[str, ...] = ()
    """This node's addresses that its guests are by; a router has none."""


class Speaker:
    """See the module."""

    def __init__(
        self,
        settings: SpeakerSettings,
        *,
        heard: Callable[[Claim], None] = lambda _claim: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`heard` is called with each claim that is news."""
        self.ledger = Ledger()
        self._settings = settings
        self._networks = tuple(ipaddress.ip_network(text) for text in settings.networks)
        self._heard = heard
        self._clock = clock
        self._transport: asyncio.DatagramTransport | None = None
        self._waiting: dict[int, asyncio.Future[Known]] = {}
        self._ids = itertools.count(secrets.randbits(48))
        self._setting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._logged_at: float | None = None

    async def open(self) -> None:
        """Listen. FabricError: the address isn't here, or the port is taken."""
        where = self._settings.listen, self._settings.port
        loop = asyncio.get_running_loop()
        try:
            self._transport, _ = await loop.create_datagram_endpoint(
                lambda: _Protocol(self._receive), local_addr=where
            )
        except OSError as error:
            raise FabricError(
                f"routes: can't listen on {where[0]}, UDP port {where[1]}: {error.strerror}"
            ) from error

    async def close(self) -> None:
        """Hear and say no more. Idempotent."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    def say(self, claims: Sequence[Claim], peers: Sequence[str]) -> float | None:
        """Once, without waiting; when (wall clock, s). None: to nobody."""
        at_s: float | None = None
        for peer in peers:
            if self._send(
                Claims(id=next(self._ids), at_s=self._clock(), claims=tuple(claims)), peer
            ):
                at_s = at_s or self._clock()
        return at_s

    async def ask(
        self, claims: Sequence[Claim], peers: Sequence[str]
    ) -> tuple[dict[str, Known], list[str]]:
        """Say it until every peer has answered; the answers, and who hasn't given one. 2 s."""
        loop = asyncio.get_running_loop()
        ids = {peer: next(self._ids) for peer in peers}
        answers = {peer: loop.create_future() for peer in peers}
        for peer, future in answers.items():
            self._waiting[ids[peer]] = future
        try:
            for gap_s in GAPS_S:
                missing = [peer for peer, future in answers.items() if not future.done()]
                if not missing:
                    break
                for peer in missing:
                    message = Claims(id=ids[peer], at_s=self._clock(), claims=tuple(claims))
                    self._send(message, peer)
                await asyncio.wait([answers[peer] for peer in missing], timeout=gap_s)
        finally:
            for number in ids.values():
                self._waiting.pop(number, None)
        done = {peer: future.result() for peer, future in answers.items() if future.done()}
        return done, [peer for peer in peers if peer not in done]

    async def set_routes(self, addresses: Collection[str]) -> list[str]:
        """Bring this node's own table in line with the ledger; what couldn't be done."""
        async with self._setting:
            claims = [self.ledger.newest(address) for address in addresses]
            known = [claim for claim in claims if claim is not None]
            return await in_thread(lambda: table.apply(known, self._settings.own_hops))

    # --- inside ------------------------------------------------------------------------------

    def _send(self, message: Claims | Known, to: str | tuple[Any, ...]) -> bool:
        if self._transport is None:
            return False
        where = (to, self._settings.port) if isinstance(to, str) else to
        self._transport.sendto(sign(message, self._settings.key), where)
        return True

    def _receive(self, datagram: bytes, sender: tuple[Any, ...]) -> None:
        try:
            message = verify(datagram, self._settings.key, self._clock())
        except FabricError as error:
            self._complain(f"routes: a datagram of {sender[0]} is ignored: {error}")
            return
        if isinstance(message, Known):
            waiting = self._waiting.pop(message.id, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
            return
        if len(self._tasks) >= _PENDING_MAX:
            return  # It will be said again.
        task = asyncio.create_task(self._take(message, sender))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take(self, message: Claims, sender: tuple[Any, ...]) -> None:
        failures: list[str] = []
        addresses: list[str] = []
        for claim in message.claims:
            try:
                address = canonical(claim.address)
                if claim.hop:
                    canonical(claim.hop)
            except FabricError as error:
                failures.append(str(error))
                continue
            if not self._allowed(address):
                failures.append(f"{address} is in none of {', '.join(self._settings.networks)}")
                continue
            addresses.append(address)
            if self.ledger.take(Claim(address=address, sequence=claim.sequence, hop=claim.hop)):
                self._heard(claim)
        try:
            failures += await self.set_routes(addresses)
        except FabricError as error:
            failures.append(str(error))
        if failures:
            self._complain("routes: " + "; ".join(failures))
        known = tuple(found for each in addresses if (found := self.ledger.newest(each)))
        answer = Known(
            id=message.id, at_s=self._clock(), claims=known, failures=tuple(failures[:4])
        )
        self._send(answer, sender)

    def _allowed(self, address: str) -> bool:
        parsed = ipaddress.ip_address(address)
        return not self._networks or any(parsed in network for network in self._networks)

    def _complain(self, text: str) -> None:
        now = time.monotonic()
        if self._logged_at is None or now - self._logged_at > _LOG_GAP_S:
            self._logged_at = now
            log.warning("%s", text)


class _Protocol(asyncio.DatagramProtocol):
    def __init__(self, receive: Callable[[bytes, tuple[Any, ...]], None]) -> None:
        self._receive = receive

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self._receive(data, addr)

    def error_received(self, exc: Exception) -> None:
        log.info("routes: a peer isn't there: %s", exc)
