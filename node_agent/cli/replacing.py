"""What `ferry cluster init --replace` does: without an agent, by the store itself."""

from __future__ import annotations

import asyncio
import importlib
import socket
from contextlib import closing
from pathlib import Path

from migrator.errors import ConflictError
from node_agent.config import AgentConfig
from node_agent.state.typed import TypedStore
from node_agent.trust.files import Identity
from node_agent.trust.founding import replace_cluster


def replace_authority(config: AgentConfig, cluster: str | None) -> tuple[Identity, Path | None]:
    """See `replace_cluster`. ConflictError: this node's agent runs."""
    if _answers(config.api.socket):
        raise ConflictError(
            f"an agent answers on {config.api.socket}: stop the agents of all nodes first "
            "(systemctl stop ferry-agent); guests run on"
        )
    return asyncio.run(_replace(config, cluster))


async def _replace(config: AgentConfig, cluster: str | None) -> tuple[Identity, Path | None]:
    store = importlib.import_module("node_agent.drivers").make_store(config)
    await store.open()
    try:
        return await replace_cluster(config, cluster, TypedStore(store))
    finally:
        await store.close()


def _answers(path: str) -> bool:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(path)
        except OSError:
            return False
        return True
