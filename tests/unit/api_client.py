"""The HTTP API as a test asks it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.test_utils import TestClient

from node_agent.resources import Problem
from tests.unit.agent_world import spec_of

Client = TestClient[web.Request, web.Application]
SPEC = msgspec.to_builtins(spec_of())


async def ask(client: Client, method: str, path: str, body: Any = None, *, status: int) -> Any:
    """The JSON of an answer with the expected status; errors must be problem documents."""
    async with client.request(method, path, json=body) as response:
        text = await response.text()
        assert response.status == status, text
        if status >= 400:
            assert response.content_type == "application/problem+json"
            problem = msgspec.json.decode(text, type=Problem)
            assert problem.status == status
            assert problem.instance == path.partition("?")[0]
            assert problem.type.endswith(problem.code)
        return json.loads(text) if text else None


async def running(client: Client, node: str = "a") -> None:
    await ask(client, "POST", "/v1/domains", SPEC, status=201)
    await ask(client, "POST", "/v1/domains/web/start", {"node": node}, status=200)
