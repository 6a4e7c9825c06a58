"""Removing nodes, renewing certificates, knowing the peers, the files of a node."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec
import pytest

from migrator.errors import (
    ConfigError,
    ConflictError,
    FerryError,
    ForbiddenError,
    InvalidRequest,
    NotFoundError,
    PeerError,
    RefusedError,
)
from migrator.model import (
    DomainName,
    Migration,
    MigrationProgress,
    MigrationRequest,
    MigrationState,
    NodeName,
    NodeState,
)
from node_agent.events import EventKind
from node_agent.trust import certificates, discovery
from node_agent.trust.certificates import NodeCertificate
from node_agent.trust.discovery import announcing_addresses
from node_agent.trust.files import TrustFolder
from node_agent.trust.founding import found_cluster
from node_agent.trust.members import NEIGHBOURS, Membership, neighbours
from node_agent.trust.opening import wait_for_membership
from node_agent.trust.records import MEMBERS, MemberRecord, RenewRequest
from node_agent.trust.removal import NodeRemoval
from node_agent.trust.renewal import Renewer, due_at_s
from tests.unit.agent_world import SimulatedNode, World, open_world, spec_of
from tests.unit.heartbeats import speak
from tests.unit.peers_world import N1, N2, N3, until
from tests.unit.trust_world import node_config, trust_world

pytestmark = pytest.mark.allow_blocking("what the command line does runs in a thread")

# --- removal ---------------------------------------------------------------------------------


def removal_on(node: SimulatedNode, *, secured: bool) -> NodeRemoval:
    return NodeRemoval(
        node.name,
        node.typed,
        nodes=node.registry,
        records=node.records,
        migrations=node.migrations,
        secured=secured,
    )


async def member(world: World, name: str, *, authority: bool = False) -> None:
    record = MemberRecord(
        name=name,
        peer_address="127.0.0.1:1",
        api_address="127.0.0.1:2",
        key_fingerprint="00",
        authority=authority,
    )
    await world.a.typed.put_if(f"{MEMBERS}{name}", record, None)


async def fall_silent(world: World) -> None:
    """b's last heartbeat is of long ago, and a has never seen it."""
    await world.b.registry.close()
    info = await world.b._describe()
    await speak(world.a.typed, msgspec.structs.replace(info, heartbeat_at_s=time.time() - 60))
    world.a.registry._seen.clear()
    assert (await world.a.registry.read())[NodeName("b")].state is NodeState.UNREACHABLE


async def test_a_node_with_domains_or_migrations_stays(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await member(world, "a", authority=True)
        await member(world, "b")
        await world.a.cluster.define(spec_of())
        await world.a.cluster.start(DomainName("web"), NodeName("b"))
        request = MigrationRequest(destination="a")
        world.migrations["m-1"] = Migration(
            id="m-1",
            domain="web",
            source="b",
            destination="a",
            request=request,
            state=MigrationState.PRECOPY,
            progress=MigrationProgress(state=MigrationState.PRECOPY, iteration=1),
            created_at_s=0,
        )
        removal = removal_on(world.a, secured=True)
        for force in (False, True):  # A node that speaks is not dead.
            with pytest.raises(RefusedError) as refused:
                await removal.remove(NodeName("b"), force=force)
            assert len(refused.value.reasons) == 2
            assert "domains run there (web): drain it first" in refused.value.reasons[0]
            assert (
                "(m-1): wait for their end, or `ferry migration cancel m-1`"
                in refused.value.reasons[1]
            )
        await fall_silent(world)
        with pytest.raises(RefusedError, match="if it is dead, use --force"):
            await removal.remove(NodeName("b"), force=False)
        assert await removal.remove(NodeName("b"), force=True) == ["web"]
        assert [node.name for node in await world.a.cluster.list_nodes()] == ["a"]
        record = await world.a.typed.get(f"{MEMBERS}b", MemberRecord)
        assert record is not None and not record.value.active
        with pytest.raises(NotFoundError, match="there is no node b"):
            await removal.remove(NodeName("b"), force=False)


async def test_who_must_know_hears_of_a_removal(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        for name in ("a", "b", "c"):
            await member(world, name)
        members = Membership(NodeName("a"), world.a.typed, static={}, reach_every_s=60)
        members.secured = True
        gone: list[str] = []
        members.on_gone = gone.append
        await members.read()
        members.open(world.a.hub)
        try:
            entry = await world.a.typed.get(f"{MEMBERS}b", MemberRecord)
            assert entry is not None
            renewed = msgspec.structs.replace(entry.value, key_fingerprint="01")
            revision = await world.a.typed.put_if(entry.key, renewed, entry.revision)
            removed = msgspec.structs.replace(renewed, removed_at_s=time.time())
            await world.a.typed.put_if(entry.key, removed, revision)
            async with asyncio.timeout(20):
                while gone != ["b"]:  # noqa: ASYNC110  It has no event.
                    await asyncio.sleep(0.005)
            # Its last heartbeat may come after the removal: it isn't a node all the same.
            world.a.registry.counts = members.counts
            assert set(await world.a.registry.read()) == {"a"}
            members.secured = False
            assert set(await world.a.registry.read()) == {"a", "b"}
        finally:
            await members.close()


async def test_the_last_that_signs_and_the_one_that_is_asked_stay(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await member(world, "a")
        await member(world, "b", authority=True)
        with pytest.raises(RefusedError, match="no other node holds the authority's key"):
            await removal_on(world.a, secured=True).remove(NodeName("b"), force=False)
        with pytest.raises(RefusedError, match="ask another one"):
            await removal_on(world.b, secured=True).remove(NodeName("b"), force=True)


async def test_without_tls_only_a_silent_node_can_be_forgotten(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        removal = removal_on(world.a, secured=False)
        with pytest.raises(RefusedError, match="it would be back with its next heartbeat"):
            await removal.remove(NodeName("b"), force=True)
        await fall_silent(world)
        assert await removal.remove(NodeName("b"), force=False) == []


async def test_a_second_node_signs_once_it_has_the_key(tmp_path: Path) -> None:
    async with trust_world(tmp_path, 2) as world:
        two = world.members.pop("n2")
        await two.close()
        two.folder.write(
            two.folder.authority_key_path.name, world.one.folder.authority_key_path.read_bytes()
        )
        again = await world.start(two.config)
        await until(lambda: world.one.members.members["n2"].authority)
        renewed = await again.trust.renew()  # Without n1's help.
        assert renewed.serial != two.identity.certificate.serial


# --- renewal ---------------------------------------------------------------------------------


def test_a_certificate_is_due_at_two_thirds_of_its_life() -> None:
    day_s = 86_400.0
    usual = NodeCertificate(
        node="n1", serial="", not_before_s=-day_s, not_after_s=30 * day_s
    )  # Backdated by a day.
    assert due_at_s(usual) == 20 * day_s
    short = NodeCertificate(node="n1", serial="", not_before_s=-900, not_after_s=900)
    assert due_at_s(short) == 600


async def test_a_certificate_renews_itself_when_it_is_due(tmp_path: Path) -> None:
    async with trust_world(tmp_path, 2) as world:
        two = world.members["n2"]
        before = two.identity.certificate
        await two.trust.start()
        await asyncio.sleep(0)
        assert two.folder.load("n2").certificate == before
        await two.trust.close()
        world.clock.ahead_s = due_at_s(before) - time.time() + 60
        await two.trust.start()
        await until(lambda: two.folder.load("n2").certificate != before)
        renewed = two.folder.load("n2").certificate
        assert renewed.not_after_s > before.not_after_s + 19 * 86_400
        record = await world.one.typed.get(f"{MEMBERS}n2", MemberRecord)
        assert record is not None
        assert [each.serial for each in record.value.certificates] == [
            before.serial,
            renewed.serial,
        ]
        async with asyncio.timeout(30):
            async for event in two.events.tail(0):
                if event.kind == EventKind.CERTIFICATE_RENEWED:
                    break


async def test_a_renewal_that_fails_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with trust_world(tmp_path) as world:
        one = world.one
        failures = [PeerError("nobody signs now"), PeerError("still nobody")]

        async def request(csr: bytes) -> bytes:
            if failures:
                raise failures.pop()
            return await one.trust._renewed_certificate(csr)

        before = one.identity.certificate
        expiring = msgspec.structs.replace(before, not_after_s=time.time())
        renewed = asyncio.Event()
        renewer = Renewer(
            "n1",
            expiring,
            folder=one.folder,
            contexts=one.contexts,
            request=request,
            renewed=lambda _: renewed.set(),
            retry_s=0.01,
        )
        renewer.open()
        await asyncio.wait_for(renewed.wait(), 30)
        await renewer.close()
        assert "can't be renewed (still nobody)" in caplog.text
        assert renewer.certificate.serial != before.serial


async def test_a_node_whose_address_has_changed_gets_a_certificate_for_it_at_once(
    tmp_path: Path,
) -> None:
    async with trust_world(tmp_path) as world:
        one = world.one
        assert one.identity.certificate.addresses == ("127.0.0.1",)
        one.trust.peer_address, one.trust.api_address = "127.0.0.9:7781", "127.0.0.9:7780"
        renewed = asyncio.Event()

        def renewer(certificate: NodeCertificate) -> Renewer:
            return Renewer(
                "n1",
                certificate,
                folder=one.folder,
                contexts=one.contexts,
                request=one.trust._renewed_certificate,
                addresses=("127.0.0.9",),
                renewed=lambda _: renewed.set(),
            )

        moved = renewer(one.identity.certificate)
        moved.open()
        await asyncio.wait_for(renewed.wait(), 30)
        await moved.close()
        assert moved.certificate.addresses == ("127.0.0.9",)
        record = await one.typed.get(f"{MEMBERS}n1", MemberRecord)
        assert record is not None and record.value.peer_address == "127.0.0.9:7781"
        assert not renewer(moved.certificate)._readdress


async def test_only_a_member_with_its_own_key_is_renewed(tmp_path: Path) -> None:
    async with trust_world(tmp_path, 2) as world:
        authority = world.one.trust._own_authority()
        renewal = world.one.trust
        other = certificates.make_request("n2", certificates.make_key())
        body = msgspec.structs.replace(
            await _renewal_of(world.members["n2"].folder), request=other.decode()
        )
        with pytest.raises(ForbiddenError, match="joined with another key"):
            await authority.renew(N2, body)
        with pytest.raises(InvalidRequest, match="not for n3"):
            await authority.renew(N3, body)
        with pytest.raises(ConflictError, match="doesn't hold the authority's key"):
            await world.members["n2"].trust._sign_renewal(N1, body)
        assert renewal.authority_view().fingerprint == world.one.identity.fingerprint


async def _renewal_of(folder: TrustFolder) -> RenewRequest:
    key = await asyncio.to_thread(folder.own_key)
    request = certificates.make_request("n2", key).decode()
    return RenewRequest(
        peer_address="127.0.0.2:7781", api_address="127.0.0.2:7780", request=request
    )


# --- peers -----------------------------------------------------------------------------------


async def test_members_are_known_before_any_heartbeat_is_read(tmp_path: Path) -> None:
    """So an agent that has just come up takes nobody of its cluster for a stranger."""
    async with trust_world(tmp_path, 2) as world:
        fresh = Membership(N2, world.one.typed, static={})
        fresh.secured = True
        await fresh.read()
        assert set(fresh.peers()) == {N1}


async def test_plain_peers_come_from_the_heartbeats_and_the_configuration(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        static = {NodeName("b"): ("127.0.0.9", 9), NodeName("c"): ("127.0.0.9", 8)}
        membership = Membership(NodeName("a"), world.a.typed, static=static, reach_every_s=60)
        membership.open(world.a.hub)
        links = world.a.hub._links
        assert {name: link.address for name, link in links.items()} == static
        membership.saw(await world.a.registry.read())
        assert links[NodeName("b")].address == ("127.0.0.1", 2)  # As its heartbeat says.
        assert links[NodeName("c")].address == ("127.0.0.9", 8)
        await membership.close()


def test_neighbours_are_the_next_by_name_in_a_ring() -> None:
    peers = {NodeName(f"n{number}"): ("h", 1) for number in range(1, 4)}
    peers.pop(N2)
    assert neighbours(N2, peers) == [N3, N1]
    many = {NodeName(f"n{number:03}"): ("h", 1) for number in range(200)}
    some = neighbours(NodeName("n190"), many)
    assert len(some) == NEIGHBOURS
    assert some[:2] == ["n191", "n192"] and some[-1] == "n006"


# --- files -----------------------------------------------------------------------------------


def test_what_init_leaves_is_for_root_alone(tmp_path: Path) -> None:
    config = node_config(tmp_path, 1)
    identity = found_cluster(config, "c1")
    folder = TrustFolder(tmp_path / "n1")
    assert folder.path.stat().st_mode & 0o777 == 0o700
    for path in folder.path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path
    assert identity.certificate.node == "n1"
    assert folder.load("n1") == identity
    with pytest.raises(ConflictError, match="belongs to the cluster c1 already"):
        found_cluster(config, "c2")
    folder.certificate_path.unlink()
    with pytest.raises(ConflictError, match=r"authority-key\.pem is there already"):
        found_cluster(config, "c2")


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    found_cluster(node_config(tmp_path, 1), "c1")
    found_cluster(node_config(tmp_path, 2), "c2")
    one, two = (TrustFolder(tmp_path / name) for name in ("n1", "n2"))
    with pytest.raises(ConfigError, match=r"certificate\.pem is of node n1, but node.name is n3"):
        one.load("n3")
    key = (one.path / "key.pem").read_bytes()
    one.write("key.pem", (two.path / "key.pem").read_bytes())
    with pytest.raises(ConfigError, match=r"certificate\.pem and key\.pem don't belong together"):
        one.load("n1")
    one.write("key.pem", key)
    one.write("authority.pem", (two.path / "authority.pem").read_bytes())
    with pytest.raises(ConfigError, match=r"certificate\.pem is not signed by authority\.pem"):
        one.load("n1")
    (one.path / "cluster.json").unlink()
    with pytest.raises(ConfigError, match=r"cluster\.json"):
        one.load("n1")


def test_plain_mode_has_no_cluster_to_found(tmp_path: Path) -> None:
    with pytest.raises(ConflictError, match=r'tls\.mode is "plain"'):
        found_cluster(node_config(tmp_path, 1, 'mode = "plain"'), "c1")


async def test_an_agent_waits_until_it_is_a_member(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = node_config(tmp_path, 1)
    stop = asyncio.Event()
    waiting = asyncio.create_task(wait_for_membership(config, stop))
    await until(lambda: "belongs to no cluster yet and serves nobody" in caplog.text)
    assert not waiting.done()
    await asyncio.to_thread(found_cluster, config, "c1")
    assert await asyncio.wait_for(waiting, 30)
    waiting = asyncio.create_task(wait_for_membership(node_config(tmp_path, 2), stop))
    await asyncio.sleep(0)
    stop.set()
    assert not await asyncio.wait_for(waiting, 30)
    assert await wait_for_membership(node_config(tmp_path, 3, 'mode = "plain"'), asyncio.Event())


@pytest.mark.parametrize(
    ("request_pem", "reason"),
    [
        (certificates.make_request("n2", certificates.make_key()), "not for n1"),
        (b"nonsense", "can't be read"),
        (b"x" * 20_000, "larger than"),
    ],
    ids=["another node's", "nonsense", "too large"],
)
def test_signing_requests_are_checked(request_pem: bytes, reason: str) -> None:
    with pytest.raises(FerryError, match=reason):
        certificates.load_request(request_pem, "n1")


def test_a_node_announces_itself_where_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "local_addresses", lambda: ["192.0.2.1", "198.51.100.1"])
    assert announcing_addresses("192.0.2.1") == ["192.0.2.1"]
    assert announcing_addresses("0.0.0.0") == ["192.0.2.1", "198.51.100.1"]
    assert announcing_addresses("127.0.0.1") == []
    assert announcing_addresses("n1.example.com") == ["192.0.2.1", "198.51.100.1"]
