"""No two agents speak as one node: a cloned host, or another cluster's, with this node's name.

Both would take the node's domains for their own. What tells them apart is the boot of the host in
what the node says of itself, and that its heartbeat goes on while this agent is silent:

    nodes/NAME is of another boot ─► beats/NAME stands still: this host was rebooted ─► go on
                                   └► it changes: somebody else writes it ─► refuse

Looked at once, before anything of this node is touched, and only after a reboot of its host.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from migrator.errors import ConfigError
from migrator.model import NodeInfo, NodeName
from node_agent.nodes import HEARTBEAT_S, Heartbeat
from node_agent.resources import BEATS, NODES
from node_agent.state.typed import TypedStore

LOOK_S: Final = 2.5 * HEARTBEAT_S
LOOK_EVERY_S: Final = 0.25


async def refuse_namesake(
    store: TypedStore,
    node: NodeName,
    boot_id: str,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """ConfigError: an agent on another host speaks as this node in the store. StoreError."""
    said = await store.get(f"{NODES}{node}", NodeInfo)
    first = await store.get(f"{BEATS}{node}", Heartbeat)
    if said is None or first is None or said.value.boot_id in ("", boot_id):
        return
    for _ in range(round(LOOK_S / LOOK_EVERY_S)):
        await sleep(LOOK_EVERY_S)
        last = await store.get(f"{BEATS}{node}", Heartbeat)
        if last is not None and last.revision != first.revision:
            raise ConfigError(
                f"node.name: another agent speaks as {node} in this store, from "
                f"{said.value.peer_address}: is this host a clone of that one, or the store "
                "another cluster's? Nothing was touched. Give each node a name of its own, and "
                "each cluster a store.prefix (etcd) or store.path of its own"
            )
