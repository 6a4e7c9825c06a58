"""Users, roles and tokens: every route of the table, over real HTTPS and the unix socket."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import ClientResponse, ClientSession, TCPConnector, UnixConnector

from migrator.errors import ConflictError, NotFoundError, StoreError, UnauthenticatedError
from migrator.model import MigrationRequest
from node_agent.api.routes import ROUTES
from node_agent.events import HEARTBEAT, EventKind
from node_agent.resources import Problem
from node_agent.state.memory import SimulatedStore
from node_agent.state.typed import TypedStore
from node_agent.trust.records import (
    API_TOKENS,
    USERS,
    ApiTokenCreate,
    ApiTokenRecord,
    Role,
    UserCreate,
    UserRecord,
)
from node_agent.trust.users import TOKENS_MAX, Caller, Users
from tests.unit.trust_world import Clock, TrustWorld, trust_world

pytestmark = pytest.mark.allow_blocking("what the command line does runs in a thread")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[TrustWorld]:
    async with trust_world(tmp_path) as opened:
        yield opened


@pytest.fixture
async def session(world: TrustWorld) -> AsyncIterator[ClientSession]:
    """Towards n1's HTTPS, with the cluster's authority as the only one."""
    context = ssl.create_default_context(cafile=world.one.folder.files.authority_path)
    async with ClientSession(
        f"https://{world.server}", connector=TCPConnector(ssl=context)
    ) as opened:
        yield opened


async def token_of(world: TrustWorld, name: str, role: Role) -> str:
    users = world.one.trust.users
    await users.create(UserCreate(name=name, role=role))
    return (await users.issue(name, ApiTokenCreate())).token


async def ask(
    session: ClientSession, method: str, path: str, token: str | None, body: Any = None
) -> tuple[int, Problem | None]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with session.request(method, path, headers=headers, json=body) as response:
        if response.status == 401:
            assert response.headers["WWW-Authenticate"].startswith("Bearer")
        if response.status < 400:
            return response.status, None
        assert response.content_type == "application/problem+json"
        return response.status, msgspec.json.decode(await response.read(), type=Problem)


def path_of(route: Any) -> str:
    """A path that leads to this route and to nothing that exists."""
    for name in route.parameters:
        route = msgspec.structs.replace(route, path=route.path.replace(f"{{{name}}}", "nobody"))
    return str(route.path)


async def test_every_route_asks_for_its_role(world: TrustWorld, session: ClientSession) -> None:
    tokens = {role: await token_of(world, role.value, role) for role in Role}
    refused = 0
    for route in ROUTES:
        path = path_of(route)
        if route.public:
            status, _ = await ask(session, route.method, path, None)
            assert status not in (401, 403), path
            continue
        if route.streams:  # It would not end by itself.
            path += "?limit=1&after=x"
        status, problem = await ask(session, route.method, path, None)
        assert status == 401, path
        assert problem is not None and f"role {route.needed_role} is needed" in problem.detail
        for role, token in tokens.items():
            if not role.allows(route.needed_role):
                status, problem = await ask(session, route.method, path, token)
                assert (status, problem and problem.code) == (403, "forbidden"), (path, role)
                assert problem is not None
                assert problem.detail == (
                    f"the role {route.needed_role} is needed; user {role} has the role {role}"
                )
                refused += 1
    assert refused > len(ROUTES) / 2


def test_who_may_what() -> None:
    needed = {(route.method, route.path): route.needed_role for route in ROUTES}
    assert needed["GET", "/v1/domains"] is Role.VIEWER
    assert needed["POST", "/v1/domains/{name}/migrations"] is Role.OPERATOR
    for method, path in needed:
        about_trust = path.startswith(("/v1/users", "/v1/cluster/tokens"))
        of_a_node = {("DELETE", "/v1/nodes/{name}"), ("POST", "/v1/nodes/{name}/shutdown-guests")}
        if about_trust or (method, path) in of_a_node:
            assert needed[method, path] is Role.ADMIN
    public = {route.path for route in ROUTES if route.public}
    assert public == {"/healthz", "/v1/cluster/authority", "/v1/cluster/join"}


async def test_each_role_may_what_it_may(world: TrustWorld, session: ClientSession) -> None:
    tokens = {role: await token_of(world, role.value, role) for role in Role}
    assert (await ask(session, "GET", "/v1/domains", tokens[Role.VIEWER]))[0] == 200
    stop = "/v1/domains/nobody/stop"
    assert (await ask(session, "POST", stop, tokens[Role.OPERATOR]))[0] == 404
    body = {"name": "new", "role": "viewer"}
    assert (await ask(session, "POST", "/v1/users", tokens[Role.OPERATOR], body))[0] == 403
    assert (await ask(session, "POST", "/v1/users", tokens[Role.ADMIN], body))[0] == 201
    assert (await ask(session, "POST", "/v1/cluster/tokens", tokens[Role.ADMIN]))[0] == 201
    async with session.get("/openapi.json") as response:
        assert response.status == 200


async def test_it_is_kept_who_cancelled_a_migration(
    world: TrustWorld, session: ClientSession
) -> None:
    agent = world.agents.a
    token = await token_of(world, "alice", Role.OPERATOR)
    begun = await agent.migrations.create("web", MigrationRequest(destination="b"))
    assert (await ask(session, "DELETE", f"/v1/migrations/{begun.id}", token))[0] == 202
    by = (await agent.migrations.get(begun.id)).cancelled_by
    assert by == f"user alice (operator, token {token.split('-')[1]})"
    async with ClientSession(connector=UnixConnector(str(world.folder / "api.sock"))) as local:
        begun = await agent.migrations.create("web", MigrationRequest(destination="b"))
        async with local.delete(f"http://ferry/v1/migrations/{begun.id}") as response:
            assert response.status == 202
    assert (await agent.migrations.get(begun.id)).cancelled_by == "root on a"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("Basic dXNlcjpwdw==", "must be: Bearer TOKEN"),
        ("Bearer nonsense", "not a token of Ferry's API"),
        (f"Bearer ferryapi-{'0' * 16}-{'0' * 64}", "wrong, or was removed"),
        ("Bearer ferry1-AAAA", "not a token of Ferry's API"),
    ],
)
async def test_a_wrong_header_is_refused_with_a_reason_and_logged(
    session: ClientSession, header: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with session.get("/v1/nodes", headers={"Authorization": header}) as response:
        assert response.status == 401
        assert reason in (await response.json())["detail"]
    assert "n1 refused 127.0.0.1: GET /v1/nodes: " in caplog.text
    assert reason in caplog.text


async def test_a_removed_token_and_a_removed_user_are_refused_at_once(
    world: TrustWorld, session: ClientSession
) -> None:
    users = world.one.trust.users
    first = await token_of(world, "bob", Role.VIEWER)
    second = (await users.issue("bob", ApiTokenCreate(label="laptop"))).token
    await users.revoke("bob", first.split("-")[1])
    assert (await ask(session, "GET", "/v1/nodes", first))[0] == 401
    assert (await ask(session, "GET", "/v1/nodes", second))[0] == 200
    await users.remove("bob")
    assert (await ask(session, "GET", "/v1/nodes", second))[0] == 401
    await users.create(UserCreate(name="bob", role=Role.ADMIN))
    assert (await ask(session, "GET", "/v1/nodes", second))[0] == 401


@pytest.mark.parametrize("ending", ["removed", "expired"])
async def test_a_stream_ends_with_its_token_and_no_other_does(
    world: TrustWorld, session: ClientSession, ending: str
) -> None:
    users = world.one.trust.users
    first = await token_of(world, "bob", Role.VIEWER)
    if ending == "expired":
        first = (await users.issue("bob", ApiTokenCreate(ttl_s=60.0))).token
    headers = {"Authorization": f"Bearer {await token_of(world, 'eve', Role.VIEWER)}"}
    async with (
        asyncio.timeout(30),
        session.get("/v1/events", headers={"Authorization": f"Bearer {first}"}) as bobs,
        session.get("/v1/events", headers=headers) as eves,
    ):
        await _heartbeat(bobs)
        if ending == "removed":
            await users.revoke("bob", first.split("-")[1])
        else:
            world.clock.ahead_s += 61.0
        await bobs.content.read()
        assert bobs.content.at_eof()
        await _heartbeat(eves)
        await _heartbeat(eves)
    assert (await ask(session, "GET", "/v1/events", first))[0] == 401


async def test_a_stream_goes_on_while_the_store_cannot_tell(
    world: TrustWorld, session: ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who could follow what happens wants to most of all then."""
    users = world.one.trust.users
    headers = {"Authorization": f"Bearer {await token_of(world, 'bob', Role.VIEWER)}"}
    asked = asyncio.Event()

    async def away(token: str) -> Caller:
        asked.set()
        raise StoreError("the store is away")

    async with asyncio.timeout(30), session.get("/v1/events", headers=headers) as bobs:
        await _heartbeat(bobs)
        monkeypatch.setattr(users, "authenticate", away)
        await asked.wait()
        for _ in range(3):
            await _heartbeat(bobs)


async def _heartbeat(stream: ClientResponse) -> None:
    """Wait for the next one. AssertionError: the stream has ended."""
    while (line := await stream.content.readline()) != f"{HEARTBEAT}\n".encode():
        assert line


async def test_a_changed_role_holds_for_the_tokens_that_are_there(
    world: TrustWorld, session: ClientSession
) -> None:
    admin = await token_of(world, "alice", Role.ADMIN)
    token = await token_of(world, "bob", Role.VIEWER)
    path, stop = "/v1/users/bob", "/v1/domains/nobody/stop"
    assert (await ask(session, "POST", stop, token))[0] == 403
    assert (await ask(session, "PATCH", path, token, {"role": "admin"}))[0] == 403
    assert (await ask(session, "PATCH", path, admin, {"role": "operator"}))[0] == 200
    assert (await ask(session, "POST", stop, token))[0] == 404
    assert (await ask(session, "PATCH", path, admin, {"role": "viewer"}))[0] == 200
    assert (await ask(session, "POST", stop, token))[0] == 403
    assert (await ask(session, "PATCH", path, admin, {"role": "viewer"}))[0] == 200
    status, problem = await ask(session, "PATCH", path, admin, {"role": "king"})
    assert status == 400 and problem is not None and "role" in str(problem.fields)
    assert (await ask(session, "PATCH", "/v1/users/eve", admin, {"role": "viewer"}))[0] == 404
    told: list[str] = []
    async with asyncio.timeout(30):
        async for event in world.agents.a.events.tail(0):
            if event.kind == EventKind.USER_CHANGED:
                told.append(event.message)
                if len(told) == 2:  # What changed nothing isn't told.
                    break
    assert told == [
        "alice changed the role of user bob from viewer to operator",
        "alice changed the role of user bob from operator to viewer",
    ]


async def test_the_local_root_is_admin(world: TrustWorld) -> None:
    connector = UnixConnector(path=str(world.folder / "api.sock"))
    async with ClientSession("http://ferry", connector=connector) as session:
        async with session.get("/v1/whoami") as response:
            assert (await response.json())["role"] == "admin"
        assert (await ask(session, "GET", "/v1/users", None))[0] == 200


async def test_plain_http_is_not_answered(world: TrustWorld) -> None:
    reader, writer = await asyncio.open_connection(*world.server.split(":"))
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: n1\r\n\r\n")
    async with asyncio.timeout(30):
        assert b"200" not in await reader.read()
    writer.close()


async def test_a_store_that_is_away_is_no_open_door(
    world: TrustWorld, session: ClientSession
) -> None:
    token = await token_of(world, "bob", Role.ADMIN)
    world.one.store.faults.unavailable = True
    assert (await ask(session, "GET", "/v1/nodes", token))[0] == 503
    world.one.store.faults.unavailable = False
    assert (await ask(session, "GET", "/v1/nodes", token))[0] == 200


# --- the users themselves --------------------------------------------------------------------


@pytest.fixture
async def users() -> AsyncIterator[tuple[Users, TypedStore, Clock]]:
    store = SimulatedStore()
    await store.open()
    typed, clock = TypedStore(store), Clock()
    yield Users(typed, clock=clock), typed, clock
    await store.close()


async def test_tokens_are_kept_as_hashes_and_shown_once(
    users: tuple[Users, TypedStore, Clock],
) -> None:
    service, store, _ = users
    await service.create(UserCreate(name="bob", role=Role.OPERATOR))
    made = await service.issue("bob", ApiTokenCreate(label="ci"))
    assert (await service.authenticate(made.token)).role is Role.OPERATOR
    entries = await store.list_prefix(API_TOKENS, ApiTokenRecord)
    secret = made.token.rpartition("-")[2]
    assert secret.encode() not in b"".join(
        entry.value for entry in await store.store.list_prefix("")
    )
    assert len(entries[0].value.hash) == 32
    [user] = await service.list_users()
    assert [each.label for each in user.tokens] == ["ci"]
    tampered = made.token[:-1] + ("0" if made.token[-1] != "0" else "1")
    with pytest.raises(UnauthenticatedError, match="wrong"):
        await service.authenticate(tampered)


async def test_a_token_expires(users: tuple[Users, TypedStore, Clock]) -> None:
    service, _, clock = users
    await service.create(UserCreate(name="bob"))
    made = await service.issue("bob", ApiTokenCreate(ttl_s=60))
    await service.authenticate(made.token)
    clock.ahead_s = 61
    with pytest.raises(UnauthenticatedError, match="has expired"):
        await service.authenticate(made.token)


async def test_what_is_not_there_and_what_is_there_already(
    users: tuple[Users, TypedStore, Clock],
) -> None:
    service, _, _ = users
    await service.create(UserCreate(name="bob"))
    with pytest.raises(ConflictError, match="there is a user bob already"):
        await service.create(UserCreate(name="bob"))
    for missing in (service.get("eve"), service.remove("eve"), service.revoke("bob", "00")):
        with pytest.raises(NotFoundError):
            await missing
    for _ in range(TOKENS_MAX):
        await service.issue("bob", ApiTokenCreate())
    with pytest.raises(ConflictError, match="remove one first"):
        await service.issue("bob", ApiTokenCreate())


async def test_adding_a_user_again_takes_no_token_from_the_one_who_is_there(
    users: tuple[Users, TypedStore, Clock],
) -> None:
    """A refused request changes nothing: it had locked the user out."""
    service, store, _ = users
    await service.create(UserCreate(name="bob", role=Role.VIEWER))
    made = await service.issue("bob", ApiTokenCreate())
    with pytest.raises(ConflictError, match="there is a user bob already"):
        await service.create(UserCreate(name="bob", role=Role.OPERATOR))
    assert (await service.authenticate(made.token)).role is Role.VIEWER
    # Of a removal that broke off: the user is gone, the token isn't.
    entry = await store.get(f"{USERS}bob", UserRecord)
    assert entry is not None and await store.delete_if(entry.key, entry.revision)
    await service.create(UserCreate(name="bob", role=Role.ADMIN))
    with pytest.raises(UnauthenticatedError):
        await service.authenticate(made.token)
