"""What an agent knows of the other nodes: who is silent, and what each has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from migrator.errors import PeerError
from migrator.model import DomainStatus, HypervisorCapabilities, NodeInfo, NodeName, NodeState
from node_agent.nodes import NodeView
from tests.simulation.guests import STATES

if TYPE_CHECKING:
    from tests.simulation.agent import Agent

CALL_S: Final = 0.001
SILENT_S: Final = 5.0
CAPABILITIES: Final = HypervisorCapabilities(
    driver="simulated",
    version="1",
    accelerator="none",
    machine_types=("q35",),
    cpu_models=("qemu64",),
)


class Neighbours:
    """One agent's."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def heartbeats(self) -> Mapping[NodeName, NodeView]:
        """Who is silent, as this node sees it: by what the store was told."""
        await self._agent.trip(CALL_S)
        now_s = self._agent.world.now_s
        return {
            node.name: NodeView(
                info=_info(node.name),
                state=NodeState.READY
                if node.heard_for_s(now_s) <= SILENT_S
                else NodeState.UNREACHABLE,
                heartbeat_age_s=node.heard_for_s(now_s),
            )
            for node in self._agent.node.cluster.nodes.values()
        }

    async def guests_of(self, name: NodeName) -> Sequence[DomainStatus]:
        """PeerError: its agent is dead, or stopped."""
        node = self._agent.node.cluster.nodes[name]
        await self._agent.trip(CALL_S)
        if not node.up or node.held is not None:
            raise PeerError("it doesn't answer")
        return [
            DomainStatus(name=each.name, state=STATES[each.guests[name].state])
            for each in node.cluster.domains.values()
            if name in each.guests
        ]


def _info(name: str) -> NodeInfo:
    return NodeInfo(
        name=name,
        api_address="",
        peer_address="",
        migration_address="",
        memory_bytes=1 << 40,
        cpus=2,
        capabilities=CAPABILITIES,
        heartbeat_at_s=0.0,
        agent_version="simulated",
    )
