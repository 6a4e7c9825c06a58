"""Drains of a lab's nodes, as tests look at them."""

from __future__ import annotations

import contextlib
from typing import Final

from migrator.model import NodeState
from node_agent.cli.errors import ApiProblem
from node_agent.drain.resources import Drain, DrainList
from node_agent.resources import Node, NodeList
from tests.integration.cluster.world import Cluster, eventually

END_S: Final = 120.0
PASSING: Final = (NodeState.DRAINING, NodeState.RESTORING)


def open_all(cluster: Cluster) -> None:
    """Whatever a failed test has left: no drain, no cordon."""
    api = cluster.api()
    for drain in api.get("/v1/drains", DrainList).drains:
        if not drain.ended:
            with contextlib.suppress(ApiProblem):
                api.delete(f"/v1/drains/{drain.id}?abort_moves=true")
            ended(cluster, drain.id)
    for node in api.get("/v1/nodes", NodeList).nodes:
        if node.state in (NodeState.CORDONED, NodeState.DRAINED):
            api.post(f"/v1/nodes/{node.name}/uncordon", Node)


def node(cluster: Cluster, name: str, via: str = "n1") -> Node:
    found = cluster.api(via).get("/v1/nodes", NodeList).nodes
    return next(each for each in found if each.name == name)


def seen(cluster: Cluster, id: str, via: str = "n1") -> Drain:
    return cluster.api(via).get(f"/v1/drains/{id}", Drain)


def ended(cluster: Cluster, id: str, via: str = "n1") -> Drain:
    def find() -> Drain | None:
        found = seen(cluster, id, via)
        return found if found.ended else None

    over = eventually(f"drain {id} ends", find, END_S)
    if over.node:  # Its record says so a moment before the node's.
        eventually(f"{over.node} knows", lambda: node(cluster, over.node, via).state not in PASSING)
    return over


def told(drain: Drain) -> str:
    """For an assertion's message."""
    moves = "; ".join(f"{move.domain} {move.state}: {move.error}" for move in drain.moves)
    notes = "\n".join(note.text for note in drain.history)
    return f"{drain.state} {drain.error}: {moves}\n{notes}"
