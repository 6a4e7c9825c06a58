"""What each link carried of late, for engines to begin with: their own look takes 20 ms and more.

Only that. A prediction goes by the store, which outlives this agent (`node_agent.migrations`).
"""

from __future__ import annotations

from typing import Final

BYTES_MIN: Final = 16 * 1024 * 1024
"""A pass that has sent less may never have filled its link."""


class LinkRates:
    """Of this agent's lifetime, by the node at the other end."""

    def __init__(self) -> None:
        self._bytes_per_s: dict[str, float] = {}

    def note(self, node: str, bytes_per_s: float | None, bytes_sent: int) -> None:
        """A pass to `node` has sent so much. None: the link wasn't what held it up."""
        if bytes_per_s is not None:
            self._bytes_per_s[node] = bytes_per_s
        elif bytes_sent >= BYTES_MIN:
            self._bytes_per_s.pop(node, None)

    def to(self, node: str) -> float | None:
        """Bytes a second, on the wire; None: not known, or faster than engines are."""
        return self._bytes_per_s.get(node)
