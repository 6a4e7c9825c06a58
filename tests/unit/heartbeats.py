"""What a node says of itself, for tests that need one that is heard of."""

from __future__ import annotations

from typing import Final

import msgspec

from migrator.model import HypervisorCapabilities, NodeInfo
from node_agent.nodes import Heartbeat, checksum
from node_agent.resources import BEATS, NODES
from node_agent.state.typed import TypedStore

_CAPABILITIES: Final = HypervisorCapabilities(
    driver="simulated", version="1", accelerator="tcg", machine_types=(), cpu_models=()
)


async def speak(store: TypedStore, info: NodeInfo) -> None:
    """As that node's agent does, at its `heartbeat_at_s`."""
    await store.put(f"{NODES}{info.name}", info)
    beat = Heartbeat(node=info.name, at_s=info.heartbeat_at_s, described=checksum(info))
    await store.put(f"{BEATS}{info.name}", beat)


def heartbeat(name: str, at_s: float = 0.0, **changes: object) -> NodeInfo:
    """A small node's; `changes` are its fields."""
    made = NodeInfo(
        name=name,
        api_address="192.0.2.1:7780",
        peer_address="192.0.2.1:7781",
        migration_address="192.0.2.1",
        memory_bytes=1 << 30,
        cpus=1,
        capabilities=_CAPABILITIES,
        heartbeat_at_s=at_s,
        agent_version="test",
    )
    return msgspec.structs.replace(made, **changes)
