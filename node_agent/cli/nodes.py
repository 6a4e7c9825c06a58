"""`ferry node show` and `ferry node rm`."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import typer

from node_agent.cli.output import facts, settings, show, size
from node_agent.resources import Node, NodeRemoved

_Name = Annotated[str, typer.Argument(help="The node.")]


def round_trip(milliseconds: float | None) -> str:
    """ "0.31 ms"; "-" where none was measured."""
    return "-" if milliseconds is None else f"{milliseconds:.2f} ms"


def show_node(name: _Name) -> None:
    """One node: what runs there, and how far it is from the others."""
    node = settings.client().get(f"/v1/nodes/{quote(name, safe='')}", Node)
    trips = ", ".join(f"{other} {round_trip(ms)}" for other, ms in node.round_trips_ms.items())
    text = facts(
        (
            ("name", node.name),
            ("state", node.state.value),
            ("kept free", node.kept_free),
            ("heartbeat", f"{node.heartbeat_age_s:.1f} s ago"),
            ("round trips", trips),
            ("api", node.api_address),
            ("peers", node.peer_address),
            ("migrations", node.migration_address),
            ("memory", f"{size(node.memory_committed_bytes)} of {size(node.memory_bytes)}"),
            ("cpus", str(node.cpus)),
            (
                "hypervisor",
                f"{node.capabilities.driver} {node.capabilities.version} "
                f"({node.capabilities.accelerator})",
            ),
            ("agent", node.agent_version),
            ("domains", ", ".join(node.domains) or "none"),
        )
    )
    show(node, text)


def remove_node(
    name: _Name,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Though domains are recorded there, if the node is unreachable."
        ),
    ] = False,
) -> None:
    """Remove a node from the cluster: its certificates are refused by everybody from then on."""
    path = f"/v1/nodes/{quote(name, safe='')}" + ("?force=true" if force else "")
    client = settings.client()
    removed = client.decoded(client.delete(path), NodeRemoved)
    text = f"node {name} is removed"
    if removed.domains:
        text += (
            f"; still recorded there, and nobody else may run them before a takeover: "
            f"{', '.join(removed.domains)}"
        )
    show(removed, text)
