"""Pinning a machine type: `q35` today must be the same machine on every node, and next year.

A domain defined with an alias (`q35`, `pc`) gets the newest versioned type that every reachable
node can run, so that it can be migrated to each of them.
"""

from __future__ import annotations

from hypervisor.machine_types import pin_machine
from migrator.errors import ConflictError
from migrator.model import NodeState
from node_agent.nodes import NodeRegistry


class MachinePinner:
    """`await pinner(machine)`: the versioned type. Give it to `DomainService`."""

    def __init__(self, nodes: NodeRegistry) -> None:
        self._nodes = nodes

    async def __call__(self, machine: str) -> str:
        """Over the nodes that speak, or may yet be heard (`NodeView.judged_in_s`).

        InvalidRequest (field `machine`) if they have none in common.
        ConflictError if no node speaks: then nobody knows what they have.
        """
        views = (await self._nodes.read()).values()
        offers = [
            frozenset(view.info.capabilities.machine_types)
            for view in views
            if view.state is not NodeState.UNREACHABLE or view.judged_in_s
        ]
        if not offers:
            raise ConflictError(
                "no node speaks, so which machine types they have is unknown: "
                "their heartbeats don't reach the cluster's store"
            )
        return pin_machine(machine, frozenset.intersection(*offers))
