"""What a node says of itself, for tests that need one that is heard of."""

from __future__ import annotations

from typing import Final

import msgspec

from migrator.model import HypervisorCapabilities, NodeInfo

_CAPABILITIES: Final = HypervisorCapabilities(
    driver="simulated", version="1", accelerator="tcg", machine_types=(), cpu_models=()
)


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
