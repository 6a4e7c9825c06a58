"""Every node, and every router that runs `python -m netfabric.routes.netlink`, sets its own routes.

A node that a guest comes to claims the guest's addresses with a higher sequence than any before
(`messages`); whoever hears of it routes them there. What this node has claimed it says again now
and then, so that a router that has lost its routes gets them back.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final

from migrator.errors import FabricError
from migrator.ports import RouteDriver
from netfabric.host_routes import Address, Metric, route_of
from netfabric.routes.netlink.messages import (
    ASKING,
    KEY_BYTES_MIN,
    SKEW_S,
    Claim,
    Known,
    canonical,
)
from netfabric.routes.netlink.speaker import Speaker, SpeakerSettings
from netfabric.threads import in_thread

REFRESH_S: Final = 10.0
_RAISES_MAX: Final = 4
"""So often a claim is raised over one that is heard of meanwhile; each is one round trip."""

log = logging.getLogger(__name__)


class NetlinkRoutes(RouteDriver):
    """See the module. Errors: FabricError."""

    name: ClassVar[str] = "netlink"

    def __init__(
        self, settings: SpeakerSettings, peers: Sequence[str], *, refresh_s: float = REFRESH_S
    ) -> None:
        """`peers`: addresses of the other nodes and of the routers, all of one IP version."""
        if len(settings.key) < KEY_BYTES_MIN:
            raise FabricError(f"routes: the shared key must have {KEY_BYTES_MIN} bytes or more")
        self._hops = tuple(canonical(text) for text in settings.own_hops)
        self._peers = tuple(peers)
        self._speaker = Speaker(settings, heard=self._on_claim)
        self._refresh_s = refresh_s
        self._held: set[str] = set()
        """Claimed by this node, and by no other since."""
        self._refreshing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        await self._speaker.open()
        self._refreshing = asyncio.create_task(self._refresh(), name="routes said again")

    async def prepare(self, addresses: Sequence[str]) -> None:
        """Ask for what is known, so that the claim is high enough at once."""
        unknown = [
            text for text in map(canonical, addresses) if not self._speaker.ledger.newest(text)
        ]
        claims = [Claim(address=text, sequence=ASKING, hop="") for text in unknown]
        if claims:
            answers, _ = await self._speaker.ask(claims, self._peers)
            self._learn(answers.values())

    def lead_here_now(self, addresses: Sequence[str]) -> float | None:
        claims = self._claims(addresses)
        return self._speaker.say(claims, self._peers) if claims else None

    async def lead_here(self, addresses: Sequence[str]) -> None:
        for _ in range(_RAISES_MAX):
            claims = self._claims(addresses)
            if not claims:
                return
            failures = await self._speaker.set_routes([claim.address for claim in claims])
            answers, silent = await self._speaker.ask(claims, self._peers)
            if self._learn(answers.values()):
                continue  # Somebody knew of a later one: ours must be later still.
            failures += [text for answer in answers.values() for text in answer.failures]
            if silent:
                failures.append(
                    f"no answer of {', '.join(silent)}: it can't be reached, or its clock is more "
                    f"than {SKEW_S:.0f} s from this node's"
                )
            if failures:
                raise FabricError("routes: " + "; ".join(dict.fromkeys(failures)))
            return
        raise FabricError(f"routes: another node claims {', '.join(addresses)} again and again")

    async def leads_away(self, addresses: Sequence[str]) -> bool:
        wanted: list[Address] = []
        for text in map(canonical, addresses):
            newest = self._speaker.ledger.newest(text)
            if newest is None or newest.hop in self._hops:
                return False
            if newest.hop:  # Else it has moved, and ended there.
                wanted.append(ipaddress.ip_address(text))
        return await in_thread(lambda: all(route_of(each, Metric.TOLD) for each in wanted))

    async def withdraw(self, addresses: Sequence[str]) -> None:
        """Of an address that another node has claimed since there is nothing to withdraw."""
        claims: list[Claim] = []
        for text in map(canonical, addresses):
            self._held.discard(text)
            newest = self._speaker.ledger.newest(text)
            if newest is not None and newest.hop in self._hops:
                claim = Claim(address=text, sequence=newest.sequence + 1, hop="")
                self._speaker.ledger.take(claim)
                claims.append(claim)
        if claims:
            _, silent = await self._speaker.ask(claims, self._peers)
            if silent:
                log.warning("routes: %s may still lead here", ", ".join(silent))

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait({self._refreshing})
            self._refreshing = None
        await self._speaker.close()

    def hold(self, addresses: Sequence[str]) -> None:
        self._held.update(map(canonical, addresses))

    # --- inside ------------------------------------------------------------------------------

    def _claims(self, addresses: Sequence[str]) -> list[Claim]:
        """What this node says of them from now on."""
        claims: list[Claim] = []
        for text in map(canonical, addresses):
            hop = self._hop_for(text)
            sequence = self._speaker.ledger.next_sequence(text, hop)
            claim = Claim(address=text, sequence=sequence, hop=hop)
            self._speaker.ledger.take(claim)
            self._held.add(text)
            claims.append(claim)
        return claims

    def _hop_for(self, address: str) -> str:
        version = ipaddress.ip_address(address).version
        for hop in self._hops:
            if ipaddress.ip_address(hop).version == version:
                return hop
        raise FabricError(f"routes: this node has no IPv{version} address that {address} can be by")

    def _learn(self, answers: Iterable[Known]) -> bool:
        """Whether another node's claim turned out to be newer than what was known."""
        worse = False
        for answer in answers:
            for claim in answer.claims:
                if self._speaker.ledger.take(claim) and claim.hop not in self._hops:
                    worse = True
        return worse

    def _on_claim(self, claim: Claim) -> None:
        if claim.hop not in self._hops and claim.address in self._held:
            self._held.discard(claim.address)
            log.info("routes: %s is by %s now", claim.address, claim.hop or "nobody")

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_s)
            held = sorted(self._held)
            for at in range(0, len(held), 32):
                await self._say_again(held[at : at + 32])

    async def _say_again(self, addresses: Sequence[str]) -> None:
        claims: list[Claim] = []
        for text in addresses:
            newest = self._speaker.ledger.newest(text)
            if newest is None:  # After a restart: it counts only where nothing else is known.
                newest = Claim(address=text, sequence=0, hop=self._hop_for(text))
            if newest.hop in self._hops:
                claims.append(newest)
        if claims:
            answers, _ = await self._speaker.ask(claims, self._peers)
            for answer in answers.values():
                for claim in answer.claims:
                    if self._speaker.ledger.take(claim):
                        self._on_claim(claim)
