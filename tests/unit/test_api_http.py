"""The HTTP API's outside: what HTTP itself gets wrong, its document, its sockets."""

from __future__ import annotations

import asyncio
import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestClient, TestServer
from openapi_spec_validator import validate

from migrator.errors import ConfigError
from migrator.model import END
from node_agent.api.openapi import document
from node_agent.api.routes import ROUTES
from node_agent.api.server import ApiServer, create_app
from tests.unit.agent_world import World
from tests.unit.api_client import SPEC, Client, ask

# --- what HTTP itself gets wrong -----------------------------------------------------------------


async def test_unknown_routes_and_methods_are_problems(client: Client) -> None:
    await ask(client, "GET", "/v1/nothing", status=404)
    problem = await ask(client, "PUT", "/v1/domains", status=405)
    assert "GET, POST" in problem["detail"]
    await ask(client, "GET", "/v1/domains/NOT%20A%20NAME", status=404)
    await ask(client, "GET", "/v1/domains/nobody", status=404)
    await ask(client, "GET", "/v1/migrations/..%2F..", status=404)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (SPEC | {"memory_bytes": 1}, "memory_bytes"),
        (SPEC | {"memory": 1}, "memory"),
        ({"name": "web"}, "memory_bytes"),
        (SPEC | {"name": "Web"}, "name"),
        (SPEC | {"nics": [{"mac": "x", "bridge": "br0"}]}, "nics[0].mac"),
        (SPEC | {"boot": {"kind": "floppy"}}, "boot.kind"),
        (SPEC | {"boot": {"kind": "kernel"}}, "boot.kernel"),
        (SPEC | {"disks": [{"volume": "../x"}]}, "disks[0].volume"),
        (SPEC | {"nics": [{"mac": "01:00:5e:00:00:01", "bridge": "br0"}]}, "nics[0].mac"),
    ],
)
async def test_a_wrong_body_names_the_field(client: Client, body: Any, field: str) -> None:
    problem = await ask(client, "POST", "/v1/domains", body, status=400)
    assert problem["code"] == "invalid-request"
    assert problem["fields"][field]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"\xff"', b"[" * 5000])
async def test_what_is_no_json_object_is_refused(client: Client, data: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    async with client.post("/v1/domains", data=data, headers=headers) as response:
        assert response.status == 400
        assert response.content_type == "application/problem+json"


async def test_other_content_types_and_large_bodies_are_refused(client: Client) -> None:
    async with client.post("/v1/domains", data={"a": "b"}) as response:
        assert response.status == 415
        assert (await response.json())["code"] == "unsupported-media-type"
    headers = {"Content-Type": "application/json"}
    async with client.post("/v1/domains", data=b" " * 300_000, headers=headers) as response:
        assert response.status == 413
        assert (await response.json())["code"] == "body-too-large"


async def test_a_bug_is_a_problem_without_details(world: World) -> None:
    @web.middleware
    async def broken(request: web.Request, handler: Any) -> web.StreamResponse:
        raise ZeroDivisionError("secret")

    app = create_app(world.a.cluster, middlewares=[broken])
    async with TestClient(TestServer(app)) as client:
        problem = await ask(client, "GET", "/v1/domains", status=500)
    assert "secret" not in json.dumps(problem)


# --- the document and the sockets ----------------------------------------------------------------


async def test_the_openapi_document_is_valid_and_complete(client: Client) -> None:
    served = await ask(client, "GET", "/openapi.json", status=200)
    validate(served)
    assert served["info"]["version"] == "1.2.3"
    documented = {
        (method.upper(), path) for path, methods in served["paths"].items() for method in methods
    }
    assert documented == {(route.method, route.path) for route in ROUTES}
    ids = [each["operationId"] for path in served["paths"].values() for each in path.values()]
    assert len(ids) == len(set(ids))
    assert served["components"] == document(ROUTES, "x")["components"]
    patterns = re.findall(r'"pattern": "((?:[^"\\]|\\.)*)"', json.dumps(served["components"]))
    assert len(patterns) > 10
    for pattern in patterns:
        assert json.loads(f'"{pattern}"').endswith(END), "a line break passes, too"


async def test_it_listens_on_tcp_and_on_a_private_socket(world: World, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    server = ApiServer(create_app(world.a.cluster), listen=("127.0.0.1", 0), socket_path=path)
    await server.start()
    assert server.address is not None
    mode = (await asyncio.to_thread(path.stat)).st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    async with ClientSession() as session:
        host, port = server.address
        async with session.get(f"http://{host}:{port}/healthz") as response:
            assert response.status == 200
    second = ApiServer(create_app(world.a.cluster), listen=None, socket_path=path)
    with pytest.raises(ConfigError, match="another agent"):
        await second.start()
    assert await asyncio.to_thread(path.exists), "the other agent's socket was left alone"
    taken = ApiServer(create_app(world.a.cluster), listen=server.address, socket_path=None)
    with pytest.raises(ConfigError, match=r"api\.listen"):
        await taken.start()
    await server.close()
    assert not await asyncio.to_thread(path.exists)
