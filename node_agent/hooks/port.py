"""What a hook's driver does: carry out one call within its time."""

from __future__ import annotations

import abc
from typing import Generic, TypeVar

from migrator.errors import FerryError
from node_agent.hooks.model import HookCall

S = TypeVar("S")


class HookError(FerryError):
    """A hook failed: it can't be reached, refused, or wasn't done in time. It may have acted."""

    code = "hook"
    http_status = 502


class HookDriver(abc.ABC, Generic[S]):
    """One kind of hook. `settings` is its part of the hook's definition."""

    @abc.abstractmethod
    async def run(self, settings: S, call: HookCall, *, deadline_s: float) -> str:
        """Carry it out; returns what was done, for people. HookError says why it wasn't.

        The caller cancels it when its time is over (`deadline_s`, and what more a webhook may ask
        for). Whether it ends, fails or is cancelled, it leaves no process or connection behind. The
        same call may come again: that changes nothing more.
        """
