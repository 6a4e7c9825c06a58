"""What a node knows of the moves whose network it handles, until their grace time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from migrator.ports import FirstFrames, Tunnel
from migrator.steady_clock import SteadyClock
from node_agent.migrations.tunnel_trial import Trial
from node_agent.migrations.witnesses import Move


@dataclass(slots=True)
class Arriving:
    """A guest that comes here, or has come."""

    move: Move
    problems: list[str] = field(default_factory=list)
    resumed_at_s: float | None = None
    announced_at_s: float | None = None
    learnt: tuple[tuple[str, ...], ...] = ()
    trial: Trial | None = None
    watching: asyncio.Task[FirstFrames] | None = None
    followed: bool = False
    left_early: str = ""
    """How it went from here again: what the network does from then on says nothing of this move."""
    stands_still: bool = False
    """It was paused here, by a disk's error, say. That it answers nobody isn't the network's."""


@dataclass(slots=True)
class Leaving:
    """A guest that leaves this node."""

    move: Move
    arrived: Arriving | None = None
    """How it had come, where that isn't long ago."""
    problems: list[str] = field(default_factory=list)
    tunnel: Tunnel | None = None
    expected: bool = False
    """The destination's port is open: the guest's frames are not for this node any more."""

    def paused(self) -> None:
        """It is gone from here, unless it stays."""
        if self.arrived is not None and not self.arrived.left_early:
            self.arrived.left_early = f"moved on to {self.move.destination}"

    def stays(self) -> None:
        """It runs here again."""
        if self.arrived is not None:
            self.arrived.left_early = ""


class Since:
    """How long ago a moment was. The wall clock may be set meanwhile, by an hour maybe."""

    def __init__(self, at_s: float, wall: Callable[[], float]) -> None:
        """`at_s`: just now, by a wall clock that may be another one than `wall` by now."""
        self._clock = SteadyClock(wall)
        self._at_s = self._clock.heard(at_s)

    @property
    def seconds(self) -> float:
        return self._clock.now_s - self._at_s
