"""Certificates and clocks: signed too early or too late, at the authority's end, and clocks set."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec
import pytest

from migrator.errors import ConflictError, FerryError, PeerError
from migrator.model import NodeInfo, NodeName, NodeState
from node_agent.cli.cluster import troubles
from node_agent.clock_words import offset_text, span_text
from node_agent.clocks import ClockWatch, own_offset_s
from node_agent.cluster_views import node_view
from node_agent.drain.survey import make_survey
from node_agent.events import EventKind
from node_agent.migrations.checks import node_reasons
from node_agent.nodes import NodeRegistry, NodeView
from node_agent.state.memory import SimulatedStore
from node_agent.state.typed import TypedStore
from node_agent.trust import certificates
from node_agent.trust.certificates import NodeCertificate, Span
from node_agent.trust.renewal import REMIND_S, Renewer
from tests.unit.heartbeats import heartbeat, speak
from tests.unit.peers_world import until
from tests.unit.trust_world import TrustWorld, trust_world

pytestmark = pytest.mark.allow_blocking("what the command line does runs in a thread")

DAY_S = 86_400.0
YEAR_S = 365 * DAY_S


class Signer:
    """An authority whose clock a test sets."""

    def __init__(self, now_s: float, *, founded_s: float | None = None) -> None:
        self.key = certificates.make_key()
        self.authority = certificates.make_authority("c1", self.key, founded_s or now_s)
        self.now_s = now_s

    def sign(self, request: bytes, life_s: float = 30 * DAY_S) -> bytes:
        return certificates.sign_request(
            certificates.load_request(request, "n1"),
            "n1",
            [],
            authority_pem=self.authority,
            authority_key=self.key,
            now_s=self.now_s,
            life_s=life_s,
        )


def fresh(signer: Signer) -> NodeCertificate:
    request = certificates.make_request("n1", certificates.make_key())
    return certificates.read_certificate(signer.sign(request))


@pytest.mark.parametrize("ahead_s", [300.0, 3600.0, 0.9 * DAY_S])
def test_a_signer_whose_clock_is_ahead_signs_what_holds_now(ahead_s: float) -> None:
    now_s = time.time()
    signer = Signer(now_s + ahead_s)
    assert certificates.why_not_now(fresh(signer), now_s) == ""
    assert certificates.why_not_now(certificates.read_authority(signer.authority), now_s) == ""


def test_why_a_certificate_does_not_hold_now() -> None:
    span = Span(not_before_s=0.0, not_after_s=DAY_S)
    assert certificates.why_not_now(span, 1.0) == ""
    assert certificates.why_not_now(span, -60.0) == (
        "it holds from 1970-01-01 00:00 UTC on, and the clock here says 1969-12-31 23:59 UTC"
    )
    assert "it held until 1970-01-02 00:00 UTC" in certificates.why_not_now(span, DAY_S)


def test_no_certificate_outlives_the_authority() -> None:
    now_s = time.time()
    signer = Signer(now_s, founded_s=now_s - 3640 * DAY_S)
    ends_s = certificates.read_authority(signer.authority).not_after_s
    assert now_s < fresh(signer).not_after_s == ends_s < now_s + 11 * DAY_S
    signer.now_s = ends_s
    with pytest.raises(ConflictError, match="the cluster's authority held until"):
        fresh(signer)


def renewer_of(world: TrustWorld, certificate: NodeCertificate, **more: object) -> Renewer:
    one = world.one
    options: dict[str, object] = {
        "folder": one.folder,
        "contexts": one.contexts,
        "request": one.trust._renewed_certificate,
        "clock": world.clock,
        "retry_s": 0.01,
    }
    return Renewer("n1", certificate, **(options | more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ahead_s", "reason"), [(YEAR_S, "it holds from"), (-YEAR_S, "it held until")]
)
async def test_a_fresh_certificate_that_does_not_hold_now_is_not_used(
    tmp_path: Path, ahead_s: float, reason: str
) -> None:
    """The signer's clock is a year off: the node stays in the cluster by what it has."""
    async with trust_world(tmp_path) as world:
        one = world.one
        before, on_disk = one.identity.certificate, one.identity.certificate_pem
        signer = Signer(time.time() + ahead_s)

        async def request(csr: bytes) -> bytes:
            return signer.sign(csr)

        renewer = renewer_of(world, before, request=request)
        with pytest.raises(FerryError, match=f"is not used: {reason}"):
            await renewer.renew()
        assert renewer.certificate == before
        assert one.folder.certificate_path.read_bytes() == on_disk


async def test_what_was_signed_while_the_clock_was_ahead_is_renewed_once_it_is_set(
    tmp_path: Path,
) -> None:
    """n1 signs its own: with its clock a year ahead, and back, nobody would speak to it."""
    async with trust_world(tmp_path) as world:
        world.clock.ahead_s = YEAR_S
        renewer = renewer_of(world, world.one.identity.certificate)
        assert renewer.due()
        ahead = await renewer.renew()
        assert ahead.not_before_s > time.time() + YEAR_S - 2 * DAY_S
        world.clock.ahead_s = 0.0
        assert renewer.due()
        renewer.open()
        await until(lambda: renewer.certificate != ahead)
        await renewer.close()
        assert certificates.why_not_now(renewer.certificate, time.time()) == ""
        assert not renewer.due()


async def test_with_a_clock_before_the_cluster_nothing_is_renewed(tmp_path: Path) -> None:
    """A dead battery: the clock begins in 1970, until it is set."""
    async with trust_world(tmp_path) as world:
        span = world.one.trust.authority_span
        world.clock.ahead_s = -time.time() + DAY_S
        renewer = renewer_of(
            world, world.one.identity.certificate, authority=span, addresses=["192.0.2.1"]
        )
        assert not renewer.due()
        world.clock.ahead_s = 0.0
        assert renewer.due()  # For its address.


async def test_renewals_do_not_follow_each_other_at_the_authority_s_end(tmp_path: Path) -> None:
    async with trust_world(tmp_path) as world:
        now_s = time.time()
        certificate = NodeCertificate(
            node="n1", serial="", not_before_s=now_s - 30 * DAY_S, not_after_s=now_s + DAY_S
        )
        ends = Span(not_before_s=0.0, not_after_s=certificate.not_after_s)
        assert not renewer_of(world, certificate, authority=ends).due()
        assert renewer_of(world, certificate).due()


async def test_one_that_is_due_again_at_once_waits_for_the_next_try(tmp_path: Path) -> None:
    """A signer whose clock is far behind: no loop that signs without an end."""
    async with trust_world(tmp_path) as world:
        now_s, signed = time.time(), 0
        signer = Signer(now_s - 25 * DAY_S)

        async def request(csr: bytes) -> bytes:
            nonlocal signed
            signed += 1
            return signer.sign(csr)

        expiring = NodeCertificate(node="n1", serial="", not_before_s=0.0, not_after_s=now_s + 60)
        renewer = renewer_of(world, expiring, request=request, retry_s=3600.0)
        renewer.open()
        await until(lambda: renewer.certificate != expiring)
        for _ in range(20):
            await asyncio.sleep(0)
        await renewer.close()
        assert signed == 1


async def test_the_operator_hears_that_nobody_signs(tmp_path: Path) -> None:
    async with trust_world(tmp_path) as world:
        now, told = [0.0], list[tuple[float, str]]()

        async def request(csr: bytes) -> bytes:
            raise PeerError("nobody signs")

        certificate = NodeCertificate(
            node="n1", serial="", not_before_s=0.0, not_after_s=time.time() + DAY_S
        )
        renewer = renewer_of(
            world,
            certificate,
            request=request,
            failing=lambda _, why: told.append((now[0], why)),
            monotonic=lambda: now[0],
        )
        for at_s in (0.0, 300.0, REMIND_S, REMIND_S + 300.0):
            now[0] = at_s
            renewer._tell("nobody signs")
        assert told == [(0.0, "nobody signs"), (REMIND_S, "nobody signs")]
        world.clock.ahead_s = 2 * DAY_S
        renewer._tell("nobody signs")  # It has ended.
        renewer._tell("nobody signs")
        assert len(told) == 3
        world.clock.ahead_s = 0.0
        world.one.trust._note_failing(certificate, "nobody signs")
        async with asyncio.timeout(30):
            async for event in world.one.events.tail(0):
                if event.kind == EventKind.CERTIFICATE_NOT_RENEWED:
                    break
        assert event.message.startswith("the certificate of n1 can't be renewed: nobody signs; it")
        assert event.data["node"] == "n1"


# --- what the heartbeats tell of clocks ------------------------------------------------------


async def test_heartbeats_tell_how_far_clocks_are_apart() -> None:
    store = SimulatedStore()
    await store.open()
    typed, now = TypedStore(store), [1000.0]

    async def describe() -> NodeInfo:
        return heartbeat("n1")

    registry = NodeRegistry(typed, describe, clock=lambda: now[0], monotonic=lambda: now[0])

    async def offset_s(ahead_s: float, late_s: float) -> float | None:
        await speak(typed, heartbeat("n2", now[0] + ahead_s))
        now[0] += late_s
        return (await registry.read())[NodeName("n2")].clock_offset_s

    assert await offset_s(300.0, 0.5) is None  # Not seen coming: it may be of yesterday.
    assert await offset_s(300.0, 0.5) == pytest.approx(299.5)
    assert await offset_s(300.0, 0.2) == pytest.approx(299.8)
    assert await offset_s(300.0, 20.0) == pytest.approx(299.8), "a store that is slow is no clock"
    for _ in range(5):
        found = await offset_s(-86_400.0, 0.5)
    assert found == pytest.approx(-86_400.5)
    await store.close()


def view(name: str, offset_s: float | None, state: NodeState = NodeState.READY) -> NodeView:
    return NodeView(info=heartbeat(name), state=state, heartbeat_age_s=0.0, clock_offset_s=offset_s)


@pytest.mark.parametrize(
    ("others", "own"),
    [
        ([], None),
        ([None], None),
        ([31.0], -31.0),
        ([0.0, 31.0], 0.0),  # n3's is wrong, which is n3's to tell.
        ([-31.0, -31.0], 31.0),
        ([0.5, 0.0, 31.0], -0.5),
        ([0.0, 31.0, 31.0], -31.0),  # Two against two.
    ],
)
def test_whose_clock_differs_is_told_by_the_middle_of_all(
    others: list[float | None], own: float | None
) -> None:
    views = {NodeName(f"n{n}"): view(f"n{n}", each) for n, each in enumerate(others, 2)}
    assert own_offset_s(NodeName("n1"), {NodeName("n1"): view("n1", 0.0), **views}) == own


async def test_a_node_tells_that_its_own_clock_differs_and_agrees_again() -> None:
    now, told = [0.0], list[tuple[str, str]]()

    class Heard:
        def emit(self, kind: EventKind, message: str, **_: object) -> None:
            told.append((kind.value, message))

    watch = ClockWatch(NodeName("n1"), Heard(), lambda: now[0])  # type: ignore[arg-type]

    def saw(*offsets_s: float | None) -> None:
        views = {NodeName(f"n{n}"): view(f"n{n}", each) for n, each in enumerate(offsets_s, 2)}
        watch.saw({NodeName("n1"): view("n1", 0.0), **views})

    saw(None, None)
    saw(-1.0, 1.5, 86_400.0)  # n4's is wrong, which is n4's to tell.
    assert told == []
    saw(-300.0, -299.0, -300.5)
    saw(-300.0, -299.0, -300.5)
    assert told == [
        (
            "clock-differs",
            "the clock of n1 is 5.0 min ahead of the other nodes': set it, and run chrony or "
            "another NTP client on every node",
        )
    ]
    now[0] += 86_400.0
    saw(-300.0, -299.0, -300.5)
    assert len(told) == 2, "it is reminded of each day"
    saw(-0.5, -0.4, 0.1)
    saw(-0.5, -0.4, 0.1)
    assert told[2:] == [("clock-agrees", "the clock of n1 agrees with the other nodes' again")]
    silent = {NodeName("n2"): view("n2", 900.0, NodeState.UNREACHABLE)}
    watch.saw(silent)
    assert len(told) == 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7.2, "7 s"), (300.0, "5.0 min"), (86_400.0, "24.0 h"), (YEAR_S, "365.0 days")],
)
def test_spans_in_words(seconds: float, text: str) -> None:
    assert span_text(seconds) == text
    assert offset_text(-seconds, "n1's") == f"{text} behind n1's"


def test_what_an_operator_sees_of_a_node_beside_its_state() -> None:
    def told(**changes: float | None) -> list[str]:
        shown = node_view(view("n2", None), {}, None)
        return list(troubles(msgspec.structs.replace(shown, **changes), 1e9))

    assert told() == told(clock_offset_s=-1.4, certificate_until_s=1e9 + 5 * DAY_S) == []
    assert told(clock_offset_s=-300.0) == [
        "its clock is 5.0 min behind that of the node that was asked; see `ferry doctor`"
    ]
    assert told(certificate_until_s=1e9 + 3600.0) == [
        "its certificate ends in 60.0 min; see `ferry events`"
    ]
    (ended,) = told(certificate_until_s=1e9 - 40 * DAY_S)
    assert ended.startswith("its certificate has ended 40.0 days ago: nobody can connect to it")


async def test_a_node_whose_certificate_has_ended_is_no_place_to_go() -> None:
    """Its heartbeats are heard by the store, and connections that are open stay."""
    store = SimulatedStore()
    await store.open()
    typed = TypedStore(store)

    async def describe() -> NodeInfo:
        return heartbeat("n1")

    registry = NodeRegistry(typed, describe, clock=lambda: 1e9, monotonic=lambda: 1.0)
    for name, until_s in (("n1", 1e9 + 60), ("n2", 1e9), ("n3", None)):
        await speak(typed, heartbeat(name, 1e9, certificate_until_s=until_s))
    views = await registry.read()
    ended = "its certificate has ended, on 2001-09-09 01:46 UTC (`ferry doctor` there says what"
    n1, n2, n3 = map(NodeName, ("n1", "n2", "n3"))
    assert node_reasons(n1, n3, views) == []
    for source, destination in ((n1, n2), (n2, n1)):
        (reason,) = node_reasons(source, destination, views)
        assert reason.startswith(f"node n2: {ended}")
    left_out = make_survey({str(name): each for name, each in views.items()}, (), {}).left_out()
    assert [each.node for each in left_out] == ["n2"]
    assert left_out[0].reason.startswith(ended)
    await store.close()
