"""Tells the operator that this node's wall clock differs from the others'.

    heartbeats, as read each second ──► ClockWatch.saw() ──► clock-differs, clock-agrees

Each agent looks at its own clock alone, beside the middle one of all, so that one node whose clock
is wrong is told of once, by itself (of two nodes each tells: nobody knows which is wrong).
Nothing is decided by it: what depends on wall clocks between nodes is in docs/cluster.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

from migrator.model import NodeName, NodeState
from node_agent.clock_words import DIFFERS_S, offset_text
from node_agent.events import EventKind, EventLog
from node_agent.nodes import NodeView

AGREES_S: Final = 5.0
REMIND_S: Final = 86_400.0


def own_offset_s(node: NodeName, views: Mapping[NodeName, NodeView]) -> float | None:
    """How far this node's clock is ahead of most nodes'; None: nobody else is heard.

    By the middle one of all clocks, this node's included. Where two are in the middle that differ,
    as of two nodes, nobody knows which is right: the further one counts, and each tells.
    """
    others = [
        view.clock_offset_s
        for name, view in views.items()
        if name != node
        and view.clock_offset_s is not None
        and view.state is not NodeState.UNREACHABLE
    ]
    if not others:
        return None
    all_s = sorted([0.0, *others])
    middle = (all_s[(len(all_s) - 1) // 2], all_s[len(all_s) // 2])
    return -max(middle, key=abs)


class ClockWatch:
    """See the module."""

    def __init__(
        self, node: NodeName, events: EventLog, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._node = node
        self._events = events
        self._monotonic = monotonic
        self._told_at: float | None = None
        """When it was last told that the clock differs; None: it agrees."""

    def saw(self, views: Mapping[NodeName, NodeView]) -> None:
        """The heartbeats as they were just read. Never waits."""
        offset_s, now = own_offset_s(self._node, views), self._monotonic()
        if offset_s is None:
            return
        if abs(offset_s) < AGREES_S and self._told_at is not None:
            self._told_at = None
            self._events.emit(
                EventKind.CLOCK_AGREES,
                f"the clock of {self._node} agrees with the other nodes' again",
                node=self._node,
            )
        elif abs(offset_s) > DIFFERS_S and (
            self._told_at is None or now - self._told_at >= REMIND_S
        ):
            self._told_at = now
            than = "the other nodes': set it, and run chrony or another NTP client on every node"
            self._events.emit(
                EventKind.CLOCK_DIFFERS,
                f"the clock of {self._node} is {offset_text(offset_s, than)}",
                node=self._node,
                offset_s=round(offset_s, 1),
            )
