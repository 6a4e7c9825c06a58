"""Who keeps which node free, and why: what operators and drains do to cordons."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from migrator.errors import ConflictError, FerryError
from migrator.model import NodeName, NodeState
from node_agent.drain.cordons import PASSING, Cordon, Cordons
from node_agent.drain.hooks import NodeHooks
from node_agent.drain.resources import Drain
from node_agent.events import EventKind, EventLog
from node_agent.hooks.model import HookPoint

_CORDONABLE: Final = frozenset({NodeState.READY, NodeState.CORDONED, NodeState.RESTORING})
_UNCORDONABLE: Final = frozenset({NodeState.READY, NodeState.CORDONED, NodeState.DRAINED})
CLAIMABLE: Final = _UNCORDONABLE
"""By a drain, or an undrain."""


class NodeCordons:
    """See the module. Errors: NotFoundError (no such node), ConflictError (its state forbids it).

    `must_exist` raises the first.
    """

    def __init__(
        self,
        node: NodeName,
        cordons: Cordons,
        *,
        must_exist: Callable[[NodeName], Awaitable[None]],
        events: EventLog,
        hooks: NodeHooks,
        clock: Callable[[], float],
    ) -> None:
        self._node = node
        self._cordons = cordons
        self._must_exist = must_exist
        self._events = events
        self._hooks = hooks
        self._clock = clock

    async def read(self, node: NodeName) -> Cordon | None:
        """None: it is open."""
        return await self._cordons.read(node)

    async def cordon(self, node: NodeName, by: str = "", reason: str = "") -> None:
        """Let nothing start or move there from now on. Idempotent."""
        await self._must_exist(node)
        cordon = Cordon(
            node=node, state=NodeState.CORDONED, since_s=self._clock(), by=by, reason=reason
        )
        await self._cordons.change(cordon, _CORDONABLE)
        self._events.emit(EventKind.NODE_CORDONED, f"node {node} is {cordon.told}")

    async def uncordon(self, node: NodeName, by: str = "") -> None:
        """Open it again; what a drain took away stays away. ConflictError while it is draining."""
        await self._must_exist(node)
        before = await self.change(node, NodeState.READY, _UNCORDONABLE)
        opened = f", opened by {by}" if by else ""
        self._events.emit(EventKind.NODE_UNCORDONED, f"node {node} takes domains again{opened}")
        if before is not None and before.drain is not None:
            with contextlib.suppress(FerryError):  # The event log has it.
                await self._hooks.run(HookPoint.NODE_OPENED, node)

    async def change(
        self, node: str, state: NodeState, allowed: frozenset[NodeState]
    ) -> Cordon | None:
        """Set it, by no drain, and return what was before."""
        cordon = Cordon(node=node, state=state, since_s=self._clock())
        return await self._cordons.change(cordon, allowed)

    async def claim(
        self, node: NodeName, state: NodeState, drain: str, by: str = "", reason: str = ""
    ) -> Cordon | None:
        """Keep it free for a drain that this agent is going to plan; returns what was before."""
        cordon = Cordon(
            node=node,
            state=state,
            drain=drain,
            since_s=self._clock(),
            planned_by=self._node,
            by=by,
            reason=reason,
        )
        return await self._cordons.change(cordon, CLAIMABLE)

    async def put_back(self, node: str, before: Cordon | None) -> None:
        """The drain that claimed it comes to nothing."""
        opened = Cordon(node=node, state=NodeState.READY, since_s=self._clock())
        await self._cordons.change(before or opened, PASSING)

    async def settle(self, drain: Drain, state: NodeState) -> None:
        """The cordon after a drain's end, unless an operator has changed it meanwhile; and of one
        that goes on, which its planner may have taken back as it didn't hear of the record."""
        cordon = Cordon(
            node=drain.node,
            state=state,
            drain=drain.id,
            since_s=self._clock(),
            by=drain.asked_by,
            reason=drain.reason,
        )
        allowed = CLAIMABLE if state is NodeState.DRAINING else PASSING
        with contextlib.suppress(ConflictError):
            await self._cordons.change(cordon, allowed)
