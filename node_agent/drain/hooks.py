"""Where load balancers are told of a node that is drained: the cluster's hooks, by an adapter.

The points of one migration (before-migration, before-switchover, after-resume, after-migration,
on-failure) belong to its source; those of a node (node-draining, node-drained, node-opened) to the
drain's coordinator, which runs them here. They run at least once: again, if a coordinator dies
meanwhile.
"""

from __future__ import annotations

import abc

from migrator.errors import ConflictError
from node_agent.hooks.model import HookCall, HookPoint
from node_agent.hooks.service import HookService


class NodeHooks(abc.ABC):
    """What is told of a node that is drained."""

    @abc.abstractmethod
    async def run(self, point: HookPoint, node: str) -> None:
        """Tell, and wait for the acknowledgement, within the hooks' own deadlines.

        FerryError at `node-draining`: the drain is cancelled, before anything has moved; at the
        others it is noted.
        """


class NoHooks(NodeHooks):
    """A cluster without hooks."""

    async def run(self, point: HookPoint, node: str) -> None: ...


class ClusterHooks(NodeHooks):
    """The hooks that operators have added (`ferry hook`)."""

    def __init__(self, hooks: HookService) -> None:
        self._hooks = hooks

    async def run(self, point: HookPoint, node: str) -> None:
        report = await self._hooks.run(HookCall(point=point, node=node))
        if report.forbidden:
            raise ConflictError(report.forbidden)
