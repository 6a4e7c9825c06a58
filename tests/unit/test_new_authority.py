"""`ferry cluster init --replace`: another authority for a cluster that has all else already."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from migrator.errors import ConfigError, StoreError
from migrator.model import PoolName
from node_agent.config import AgentConfig
from node_agent.pool_owners import PoolOwners
from node_agent.trust import certificates
from node_agent.trust.files import Identity
from node_agent.trust.founding import replace_cluster
from node_agent.trust.join_token import JoinToken, parse_token, statement
from node_agent.trust.records import (
    JOIN_TOKENS,
    MEMBERS,
    JoinRequest,
    JoinTokenRecord,
    MemberRecord,
    UserCreate,
)
from storage.simulated import SimulatedPool
from tests.unit.trust_world import Member, trust_world

pytestmark = pytest.mark.allow_blocking("what the command line does runs in a thread")


async def test_a_cluster_gets_a_new_authority_and_keeps_all_else(tmp_path: Path) -> None:
    async with trust_world(tmp_path, 2, 3) as world:
        one, two = world.one, world.members["n2"]
        await one.trust.users.create(UserCreate(name="bob"))
        await world.token()
        key = await asyncio.to_thread(one.folder.authority_key_path.read_bytes)
        await asyncio.to_thread(two.folder.write, two.folder.authority_key_path.name, key)
        before = one.identity.fingerprint
        owners = PoolOwners(one.typed, "n1")
        await owners.open()
        await owners.claim(PoolName("p"), pool := SimulatedPool(PoolName("p")))
        identity, kept = await replace_cluster(one.config, None, one.typed)
        assert (identity.cluster, identity.fingerprint == before) == ("c1", False)
        assert kept is not None and (kept / "authority-key.pem").read_bytes() == key
        assert await one.typed.list_prefix(MEMBERS, MemberRecord) == []
        assert await one.typed.list_prefix(JOIN_TOKENS, JoinTokenRecord) == []
        again = await asyncio.to_thread(Member, one.config, world.data, world.clock)
        await again.store.open()
        await again.trust.open()
        assert [each.name for each in again.trust.cluster_view().members] == ["n1"]
        assert [each.name for each in await again.trust.users.list_users()] == ["bob"]
        owners = PoolOwners(again.typed, "n1")
        await owners.open()
        await owners.claim(PoolName("p"), pool)  # It is this cluster's still.
        with pytest.raises(ConfigError, match="belongs to another cluster"):
            await two.trust.open()
        pem = await again.trust._own_authority().admit(
            await _join_of(two, parse_token((await again.trust.make_join_token(60, "test")).token))
        )
        await asyncio.to_thread(
            lambda: two.folder.write_membership(
                cluster="c1", authority_pem=identity.authority_pem, certificate=pem
            )
        )
        joined = await asyncio.to_thread(two.folder.load, "n2")
        assert joined.authority_key_pem is None, "the old authority's key signs nothing more"
        assert (two.folder.path / "authority-key.replaced.pem").read_bytes() == key
        await again.store.close()


async def _join_of(member: Member, token: JoinToken) -> JoinRequest:
    key = await asyncio.to_thread(member.folder.own_key)
    request = certificates.make_request(member.name, key)
    peer, api = member.trust.peer_address, member.trust.api_address
    der = certificates.request_der(certificates.load_request(request, member.name))
    return JoinRequest(
        token_id=token.id,
        node=member.name,
        peer_address=peer,
        api_address=api,
        request=request.decode(),
        proof=token.prove(statement(token.id, member.name, peer, api, der)),
    )


async def test_a_new_authority_that_can_not_be_made_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trust_world(tmp_path) as world:
        one = world.one
        world.one.store.faults.unavailable = True
        with pytest.raises(StoreError):
            await replace_cluster(one.config, None, one.typed)
        world.one.store.faults.unavailable = False

        def fails(config: AgentConfig, cluster: str) -> Identity:
            raise ConfigError("the disk is full")

        monkeypatch.setattr("node_agent.trust.founding.found_cluster", fails)
        with pytest.raises(ConfigError, match="full"):
            await replace_cluster(one.config, None, one.typed)
        assert await asyncio.to_thread(one.folder.load, "n1") == one.identity
        await one.trust.open()
