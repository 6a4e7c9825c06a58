"""What most of the agent's tests begin with: two simulated nodes, their API, and `ferry`.

A module that needs another world has a fixture of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer

from node_agent.api.server import ApiServer, create_app
from tests.unit.agent_world import World, open_world
from tests.unit.api_client import Client
from tests.unit.ferry_command import Ferry, ferry_command


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as opened:
        yield opened


@pytest.fixture
async def client(world: World) -> AsyncIterator[Client]:
    """Of node a's API."""
    app = create_app(world.a.cluster, version="1.2.3", heartbeat_s=0.05)
    async with TestClient(TestServer(app)) as opened:
        yield opened


@pytest.fixture
async def ferry(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> AsyncIterator[Ferry]:
    """With node a's API on a unix socket."""
    path = tmp_path / "api.sock"
    server = ApiServer(create_app(world.a.cluster), listen=None, socket_path=path)
    await server.start()
    yield ferry_command(capfd, "--api", f"unix:{path}")
    await server.close()
