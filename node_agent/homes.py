"""Where a domain starts or moves that nobody named a node for, and what is said of a wrong name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from migrator.errors import NoSuchNodeError, RefusedError
from migrator.model import DomainName, NodeName, NodeState
from node_agent.nodes import NodeView
from node_agent.resources import Node


async def choose_home(
    last: NodeName,
    views: Mapping[NodeName, NodeView],
    list_nodes: Callable[[], Awaitable[Sequence[Node]]],
) -> NodeName:
    """`last`, where it ran before; the open node with the most free memory if that is cordoned.

    `last` too where no node is open, or where it is unreachable: its answer says why not there.
    """
    view = views.get(last)
    if view is None or view.state.admits or view.state is NodeState.UNREACHABLE:
        return last
    open_nodes = [node for node in await list_nodes() if node.state.admits]
    if not open_nodes:
        return last
    return NodeName(max(open_nodes, key=lambda node: node.memory_free_bytes).name)


def choose_destination(source: NodeName, nodes: Sequence[Node]) -> NodeName:
    """The open node with the most free memory. RefusedError: none but the source is open."""
    ready = [node for node in nodes if node.state.admits and node.name != source]
    if not ready:
        reason = f"no node but {source} is ready"
        raise RefusedError(f"there is no destination: {reason}", [reason])
    return NodeName(max(ready, key=lambda node: node.memory_free_bytes).name)


def no_such_destination(
    domain: DomainName, node: NodeName, reasons: Sequence[str]
) -> NoSuchNodeError:
    """For a migration that was refused for `reasons`: that there is no such node is the first."""
    told = f"there is no node {node}"
    said = next((reason for reason in reasons if reason.startswith(told)), told)
    return NoSuchNodeError(f"domain {domain} was not migrated: {said}", reasons)
