"""Where a domain starts that nobody named a node for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from migrator.model import NodeName, NodeState
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
