"""All agents are away, and come back one by one: until a node is heard its heartbeat is old."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from node_agent.nodes import SETTLE_S

if TYPE_CHECKING:
    from tests.simulation.drains.world import World


class Outages:
    """Of one world. Nothing is dead in them: each node is heard within `SETTLE_S`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._until: dict[str, float] = {}
        """Nodes that aren't heard, and until when that says nothing."""

    def __contains__(self, node: object) -> bool:
        return node in self._until

    def begin(self) -> None:
        world = self._world
        world.seen["outage"] += 1
        for name in world.nodes:
            self._until[name] = world.now + SETTLE_S
            world.later(world.dice.uniform(0.0, SETTLE_S), partial(self._is_heard, name))

    def _is_heard(self, node: str) -> None:
        self._until.pop(node, None)

    def unheard(self) -> dict[str, float]:
        """As a coordinator is told."""
        return {name: until - self._world.now for name, until in self._until.items()}
