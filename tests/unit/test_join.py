"""Joining a cluster, over real HTTPS: who gets in, and how everybody else is refused."""

from __future__ import annotations

import asyncio
import secrets
import time
from pathlib import Path

import msgspec
import pytest

from migrator.errors import (
    ConfigError,
    ConflictError,
    FerryError,
    ForbiddenError,
    RemovedError,
    UnauthenticatedError,
)
from migrator.model import NodeName
from node_agent.cli import joining
from node_agent.cli.errors import ApiProblem, CliError, ExitCode
from node_agent.events import EventKind
from node_agent.trust import certificates, join_token
from node_agent.trust.join_token import format_token, make_token, parse_token
from node_agent.trust.records import (
    JOIN_TOKENS,
    MEMBERS,
    JoinRequest,
    JoinTokenRecord,
    MemberRecord,
)
from tests.unit.peers_world import Text, until
from tests.unit.trust_world import Member, TrustWorld, node_config, trust_world

pytestmark = pytest.mark.allow_blocking("what the command line does runs in a thread")


async def refusal(world: TrustWorld, number: int, token: join_token.JoinToken) -> ApiProblem:
    """What n1's API answers to that join."""
    config = node_config(world.folder, number)
    with pytest.raises(ApiProblem) as refused:
        await asyncio.to_thread(joining.join, config, token, world.server)
    assert not (world.folder / f"n{number}" / "tls" / "certificate.pem").exists()
    return refused.value


async def join_request(world: TrustWorld, number: int, token: join_token.JoinToken) -> JoinRequest:
    """What a joining node sends."""
    node, peer, api = f"n{number}", f"127.0.0.{number}:7781", f"127.0.0.{number}:7780"
    request = certificates.make_request(node, certificates.make_key())
    der = certificates.request_der(certificates.load_request(request, node))
    return JoinRequest(
        token_id=token.id,
        node=node,
        peer_address=peer,
        api_address=api,
        request=request.decode(),
        proof=token.prove(join_token.statement(token.id, node, peer, api, der)),
    )


async def test_a_joined_node_speaks_to_all_and_all_to_it(tmp_path: Path) -> None:
    async with trust_world(tmp_path, 2, 3) as world:
        for caller in world.members.values():
            for called in world.members.values():
                answer = await caller.hub.call(called.name, "echo", Text("hi"), Text, timeout_s=60)
                assert answer.text == f"{caller.name} said hi"
        one = world.one.trust.cluster_view()
        assert [(each.name, each.authority) for each in one.members] == [
            ("n1", True),
            ("n2", False),
            ("n3", False),
        ]
        kinds = [event.kind for event in await world.one.events.read(after_seq=0, limit=100)]
        assert kinds.count(EventKind.NODE_JOINED) == 2


async def test_a_member_that_does_not_sign_passes_a_join_on(tmp_path: Path) -> None:
    async with trust_world(tmp_path, 2) as world:
        request = await join_request(world, 3, await world.token())
        answer = await world.members["n2"].trust.join(request, "here")
        assert certificates.read_certificate(answer.certificate.encode()).node == "n3"
        assert answer.members == {"n1": "127.0.0.1:7781", "n2": "127.0.0.2:7781"}
        with pytest.raises(ForbiddenError, match="was used already, by n3"):
            await world.members["n2"].trust.join(request, "here")


async def test_a_wrong_token_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with trust_world(tmp_path) as world:
        good = await world.token()
        unknown = make_token(good.fingerprint)
        guessed = msgspec.structs.replace(good, seed=secrets.token_bytes(32))
        for wrong in (unknown, guessed):
            problem = await refusal(world, 2, wrong)
            assert problem.problem.status == 401
            assert "the join token is wrong" in str(problem)
        assert "n1 refused 127.0.0.1: it may not join: the join token is wrong" in caplog.text
        assert await world.join(2, good)


async def test_a_used_token_and_a_replayed_join_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with trust_world(tmp_path) as world:
        token = await world.token()
        request = await join_request(world, 2, token)
        await world.one.trust.join(request, "here")
        with pytest.raises(ForbiddenError, match="was used already, by n2"):
            await world.one.trust.join(request, "here")
        problem = await refusal(world, 3, token)
        assert (problem.problem.status, problem.problem.code) == (403, "forbidden")
        assert "a token lets one node in" in str(problem)
        assert "n1 refused 127.0.0.1: n3 may not join: join token" in caplog.text


async def test_of_two_joins_with_one_token_one_wins(tmp_path: Path) -> None:
    async with trust_world(tmp_path) as world:
        token = await world.token()
        requests = [await join_request(world, number, token) for number in (2, 3)]
        results = await asyncio.gather(
            *(world.one.trust.join(each, "here") for each in requests), return_exceptions=True
        )
        assert sum(isinstance(each, ForbiddenError) for each in results) == 1


async def test_an_expired_token_is_refused(tmp_path: Path) -> None:
    async with trust_world(tmp_path) as world:
        token = await world.token(ttl_s=60)
        world.clock.ahead_s = 61
        problem = await refusal(world, 2, token)
        assert problem.problem.status == 403
        assert "has expired" in str(problem)


async def test_a_token_of_another_cluster_goes_nowhere(tmp_path: Path) -> None:
    async with (
        trust_world(tmp_path / "ours") as ours,
        trust_world(tmp_path / "theirs", cluster="c2") as theirs,
    ):
        token = await theirs.token()
        with pytest.raises(CliError, match=r"of another cluster.*nothing was sent") as refused:
            await asyncio.to_thread(joining.join, node_config(tmp_path, 2), token, ours.server)
        assert refused.value.code is ExitCode.REFUSED
        assert not (tmp_path / "n2" / "tls").exists()


async def test_a_proof_fits_one_request_alone(tmp_path: Path) -> None:
    """Who passes a join on, or overhears it, can't turn it to a key or an address of its own."""
    async with trust_world(tmp_path) as world:
        token = await world.token()
        mine, theirs = [await join_request(world, 2, token) for _ in range(2)]
        for stolen in (
            msgspec.structs.replace(mine, request=theirs.request),
            msgspec.structs.replace(mine, peer_address="127.0.0.9:7781"),
        ):
            with pytest.raises(UnauthenticatedError):
                await world.one.trust.join(stolen, "here")
        await world.one.trust.join(mine, "here")


async def test_the_name_and_the_address_of_a_member_are_taken(tmp_path: Path) -> None:
    async with trust_world(tmp_path, 2) as world:
        request = await join_request(world, 2, await world.token())
        with pytest.raises(ConflictError, match="there is a member n2 already"):
            await world.one.trust.join(request, "here")
        token = await world.token()
        request = await join_request(world, 3, token)
        der = certificates.request_der(certificates.load_request(request.request.encode(), "n3"))
        peer, api = "127.0.0.2:9999", request.api_address
        proof = token.prove(join_token.statement(token.id, "n3", peer, api, der))
        taken = msgspec.structs.replace(request, peer_address=peer, proof=proof)
        with pytest.raises(ConflictError, match=r"127\.0\.0\.2 is the address of member n2"):
            await world.one.trust.join(taken, "here")
        record = await world.one.typed.get(f"{JOIN_TOKENS}{token.id}", JoinTokenRecord)
        assert record is not None and record.value.used_by is None


async def test_a_member_may_join_again_with_its_key(tmp_path: Path) -> None:
    """A lost answer, or a certificate that has expired: the key on its disk is what counts."""
    async with trust_world(tmp_path, 2) as world:
        config = node_config(tmp_path, 2)
        before = world.members["n2"].folder.load("n2").certificate.serial
        await asyncio.to_thread(joining.join, config, await world.token(), world.server)
        assert world.members["n2"].folder.load("n2").certificate.serial != before
        with pytest.raises(ConflictError, match="--again"):
            joining.check_free(config, again=False)


async def test_the_store_has_nothing_that_lets_anybody_in(tmp_path: Path) -> None:
    async with trust_world(tmp_path) as world:
        token = await world.token()
        stored = b"".join(entry.value for entry in await world.one.store.list_prefix(""))
        assert token.public_key in stored
        assert token.seed not in stored
        key = await asyncio.to_thread(world.one.folder.authority_key_path.read_bytes)
        assert key not in stored


async def test_a_store_of_another_cluster_is_refused(tmp_path: Path) -> None:
    async with (
        trust_world(tmp_path / "ours") as ours,
        trust_world(tmp_path / "theirs", cluster="c2") as theirs,
    ):
        lost = Member(ours.one.config, theirs.data, theirs.clock)
        await lost.store.open()
        with pytest.raises(ConfigError, match="belongs to another cluster"):
            await lost.trust.open()
        await lost.store.close()


async def test_a_member_that_may_not_start_is_told_how_to_come_back(tmp_path: Path) -> None:
    again = "`ferry cluster join TOKEN --again`"
    async with trust_world(tmp_path, 2) as world:
        store, two = world.one.typed, world.members["n2"].trust
        entry = await store.get(f"{MEMBERS}n2", MemberRecord)
        assert entry is not None
        removed = msgspec.structs.replace(entry.value, removed_at_s=time.time())
        revision = await store.put_if(entry.key, removed, entry.revision)
        with pytest.raises(RemovedError, match=f"was removed from the cluster.*{again}"):
            await two.open()
        assert revision is not None and await store.delete_if(entry.key, revision)
        with pytest.raises(ConfigError, match=f"doesn't know a member n2.*{again}"):
            await two.open()


def test_damaged_tokens_are_told_from_good_ones() -> None:
    token = make_token(bytes(32))
    text = format_token(token)
    assert parse_token(f" {text}\n") == token
    assert token.seed.hex() not in repr(token)
    for wrong in ("", "ferry1-", text[:-4], text.replace("ferry1", "ferry9"), text + "AAAA", "é"):
        with pytest.raises(FerryError, match="not a join token"):
            parse_token(wrong)


async def test_unknown_nodes_are_told_apart_from_removed_ones(tmp_path: Path) -> None:
    async with trust_world(tmp_path, 2) as world:
        assert world.one.members.admit("n7", "00") == "n7 is not a member of this cluster"
        assert world.one.members.admit("n2", "00") is None
        await until(lambda: world.one.hub.round_trip_ms(NodeName("n2")) is not None)
