"""Which node of a migration says nothing: the reason why a figure stands still."""

from __future__ import annotations

from typing import Final

from migrator.model import Migration
from node_agent.cli.client import ApiClient
from node_agent.cli.errors import CliError
from node_agent.resources import NodeList

SILENT_AFTER_S: Final = 4.0
"""Of a node's heartbeat, which comes every second; a busy host's may be late."""


def silences(client: ApiClient) -> dict[str, float]:
    """Seconds of silence by node; nothing where it can't be asked now."""
    try:
        nodes = client.get("/v1/nodes", NodeList).nodes
    except CliError:
        return {}
    return {
        node.name: node.heartbeat_age_s for node in nodes if node.heartbeat_age_s >= SILENT_AFTER_S
    }


def silence_of(migration: Migration, silent: dict[str, float]) -> str:
    """About a migration that goes on; "" where both nodes speak."""
    if migration.ended:
        return ""
    source, destination = silent.get(migration.source), silent.get(migration.destination)
    said = []
    if source is not None:
        said.append(
            f"{migration.source}, which knows how it goes, has been silent for {source:.0f} s"
        )
    if destination is not None:
        said.append(f"{migration.destination} has been silent for {destination:.0f} s")
    return "; ".join(said)
