"""What every route driver keeps to: who leads where, and that the old way ends only when seen.

The worlds: two nodes that speak through one driver, and a network that says where it leads.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from migrator.errors import FabricError
from migrator.ports import RouteDriver
from netfabric.routes.frr.driver import BASE, METRIC_TOP, next_preference, prefix_of
from netfabric.routes.frr.vtysh import BgpPath, BgpPrefix
from netfabric.routes.netlink.driver import NetlinkRoutes
from netfabric.routes.netlink.messages import Claim, Claims, Known, Ledger, sign, verify
from netfabric.routes.netlink.speaker import SpeakerSettings
from node_agent.hooks.routes import RouteCall, WebhookRoutes
from node_agent.hooks.webhook import signature
from tests.contract.namespaces import run_in_new_namespace
from tests.contract.routed_world import FAR, KEY, NEAR, Router, make_near_end

SECRET = "a secret of the test's own"
GUEST = ("10.0.0.5", "2001:db8::5")
NEAR_HOPS, FAR_HOPS = (NEAR, "2001:db8:ff::1"), (FAR, "2001:db8:ff::2")


class Controller:
    """Somebody else's: keeps where each address is, and refuses what isn't signed."""

    def __init__(self) -> None:
        self.where: dict[str, str] = {}
        self.calls: list[RouteCall] = []
        self.failures = 0

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        stamp = request.headers["X-Ferry-Timestamp"]
        if request.headers.get("X-Ferry-Signature") != signature(SECRET, stamp, body):
            return web.Response(status=403)
        if self.failures:
            self.failures -= 1
            return web.Response(status=503)
        call = json.loads(body)
        self.calls.append(call)
        for address in call["addresses"]:
            if call["action"] == "lead":
                self.where[address] = call["node"]
            elif call["action"] == "withdraw" and self.where.get(address) == call["node"]:
                del self.where[address]
        return web.json_response({"node": self.where.get(call["addresses"][0], "")})


@asynccontextmanager
async def controller() -> AsyncIterator[tuple[Controller, str]]:
    made = Controller()
    app = web.Application()
    app.router.add_post("/routes", made.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield made, f"http://127.0.0.1:{runner.addresses[0][1]}/routes"
    finally:
        await runner.cleanup()


def webhook(url: str, node: str, hops: tuple[str, ...]) -> WebhookRoutes:
    return WebhookRoutes(url, SECRET, node=node, hops=hops)


async def moves_once(old: RouteDriver, new: RouteDriver) -> None:
    """A guest starts at `old` and goes to `new`."""
    await old.lead_here(GUEST)
    assert not await old.leads_away(GUEST)
    await new.prepare(GUEST)
    assert not await old.leads_away(GUEST), "preparing moves nothing"
    assert new.lead_here_now(GUEST) is not None
    await new.lead_here(GUEST)
    await new.lead_here(GUEST)
    assert await old.leads_away(GUEST)
    await old.withdraw(GUEST)
    assert await old.leads_away(GUEST)
    assert not await new.leads_away(GUEST)


async def test_a_guest_moves_by_webhook() -> None:
    async with controller() as (made, url):
        old, new = webhook(url, "n1", NEAR_HOPS), webhook(url, "n2", FAR_HOPS)
        await old.open()
        await new.open()
        try:
            made.failures = 2  # What fails is repeated.
            await moves_once(old, new)
            assert made.where == dict.fromkeys(GUEST, "n2")
            await new.withdraw(GUEST)
            assert made.where == {}
        finally:
            await old.close()
            await new.close()


async def test_a_webhook_with_another_secret_is_refused_and_says_so() -> None:
    async with controller() as (made, url):
        wrong = WebhookRoutes(url, "not that one", node="n1", hops=NEAR_HOPS)
        await wrong.open()
        try:
            with pytest.raises(FabricError, match="status 403"):
                await wrong.lead_here(GUEST)
            assert made.calls == []
        finally:
            await wrong.close()


def two_namespaces(body: Callable[[Router], Awaitable[None]]) -> None:
    async def inside() -> None:
        router = Router()
        await router.start()
        try:
            await asyncio.to_thread(make_near_end)
            await body(router)
        finally:
            await router.stop()

    run_in_new_namespace(inside)


@pytest.mark.lab
def test_a_guest_moves_by_netlink() -> None:
    """The other node is in the other namespace; both set their tables."""

    async def body(router: Router) -> None:
        await router.do(router.speaker.close())
        near = NetlinkRoutes(SpeakerSettings(listen=NEAR, key=KEY, own_hops=NEAR_HOPS), (FAR,))
        far = NetlinkRoutes(SpeakerSettings(listen=FAR, key=KEY, own_hops=FAR_HOPS), (NEAR,))
        await near.open()
        await router.do(far.open())
        try:
            await near.lead_here(GUEST)
            assert not await near.leads_away(GUEST)
            assert await router.do(far.leads_away(GUEST))
            await router.do(far.prepare(GUEST))
            await router.do(far.lead_here(GUEST))
            assert await near.leads_away(GUEST)
            assert not await router.do(far.leads_away(GUEST))
            await near.withdraw(GUEST)
            assert await near.leads_away(GUEST), "there is nothing left to withdraw"
        finally:
            await near.close()
            await router.do(far.close())

    two_namespaces(body)


@pytest.mark.lab
def test_a_router_that_is_silent_is_named() -> None:
    async def body(router: Router) -> None:
        await router.do(router.speaker.close())
        near = NetlinkRoutes(SpeakerSettings(listen=NEAR, key=KEY, own_hops=NEAR_HOPS), (FAR,))
        await near.open()
        try:
            with pytest.raises(FabricError, match=f"no answer of {FAR}"):
                await near.lead_here(GUEST)
        finally:
            await near.close()

    two_namespaces(body)


# --- pure parts ------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from(["", "192.0.2.1", "192.0.2.2"]))))
def test_the_highest_claim_counts_in_whatever_order_they_come(
    claims: list[tuple[int, str]],
) -> None:
    ledgers = Ledger(), Ledger()
    made = [Claim(address="10.0.0.5", sequence=number, hop=hop) for number, hop in claims]
    for claim in made:
        ledgers[0].take(claim)
    for claim in reversed(made):
        ledgers[1].take(claim)
    assert ledgers[0].newest("10.0.0.5") == ledgers[1].newest("10.0.0.5")
    if made:
        best = max(claims)
        newest = ledgers[0].newest("10.0.0.5")
        assert newest is not None
        assert (newest.sequence, newest.hop) == best
        assert ledgers[0].next_sequence("10.0.0.5", "192.0.2.9") == best[0] + 1


@pytest.mark.parametrize(
    ("key", "late_s", "spoil", "reason"),
    [
        (b"another key, also long", 0.0, False, "another key"),
        (KEY, 60.0, False, "60 s old"),
        (KEY, -60.0, False, "-60 s old"),
        (KEY, 0.0, True, "another key"),
    ],
)
def test_a_datagram_that_is_not_ours_is_ignored(
    key: bytes, late_s: float, spoil: bool, reason: str
) -> None:
    claims = (Claim(address="10.0.0.5", sequence=1, hop="192.0.2.1"),)
    datagram = sign(Claims(id=7, at_s=1000.0, claims=claims), key)
    if spoil:
        datagram = datagram[:-1] + bytes([datagram[-1] ^ 1])
    with pytest.raises(FabricError, match=reason):
        verify(datagram, KEY, 1000.0 + late_s)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_decoder(data: bytes) -> None:
    with pytest.raises(FabricError):
        verify(data, KEY, 0.0)
    answer = Known(id=1, at_s=0.0, claims=(), failures=("x",))
    assert verify(sign(answer, KEY), KEY, 1.0) == answer


@given(st.lists(st.integers(0, METRIC_TOP - 1), max_size=5))
def test_the_next_announcement_is_preferred_to_every_known_one(known: list[int]) -> None:
    paths = tuple(BgpPath(locPrf=preference) for preference in known)
    chosen = next_preference(BgpPrefix(paths=paths))
    assert chosen > BASE
    assert all(chosen > preference for preference in known)


def test_prefixes_are_those_of_single_addresses() -> None:
    assert prefix_of("10.0.0.5") == ("10.0.0.5/32", 4)
    assert prefix_of("2001:DB8::5") == ("2001:db8::5/128", 6)
    with pytest.raises(FabricError, match="not an IPv4 or IPv6"):
        prefix_of("10.0.0.5/32")
