"""Which nodes a drain's coordinator may call silent.

Right after an outage of all agents, or of the store, all look silent (`NodeView.judged_in_s`). A
drain waits for longer than that: after a power cut hosts boot in their own time, and there is
nobody who waits for an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from migrator.model import NodeState
from node_agent.nodes import NodeView

OUTAGE_S: Final = 60.0
"""For so long a node is waited for that hasn't been heard since this agent was away itself."""


class Hearing:
    """Of one coordinator. `now` by any steady clock."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        """Of who hasn't been heard since an outage: until when that says nothing."""

    def look(
        self, views: Mapping[str, NodeView], now: float
    ) -> tuple[frozenset[str], dict[str, float]]:
        """Who is silent; and who may be heard yet, and for how many seconds that is waited for."""
        silent = {n: each for n, each in views.items() if each.state is NodeState.UNREACHABLE}
        begun = {name: now + OUTAGE_S for name, each in silent.items() if each.judged_in_s}
        known = {name: until for name, until in self._until.items() if name in silent}
        self._until = begun | known
        unheard = {name: until - now for name, until in self._until.items() if until > now}
        return frozenset(silent.keys() - unheard.keys()), unheard
