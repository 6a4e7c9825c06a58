"""No router is told: somebody else does it (a routing daemon that reads the node's own table)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

from migrator.ports import RouteDriver


class NobodyRoutes(RouteDriver):
    """The node's own table is all there is; a daemon on the node may redistribute it."""

    name: ClassVar[str] = "none"

    async def open(self) -> None:
        pass

    def hold(self, addresses: Sequence[str]) -> None:
        pass

    async def prepare(self, addresses: Sequence[str]) -> None:
        pass

    def lead_here_now(self, addresses: Sequence[str]) -> float | None:
        return time.time() if addresses else None

    async def lead_here(self, addresses: Sequence[str]) -> None:
        pass

    async def leads_away(self, addresses: Sequence[str]) -> bool:
        return True  # Nobody was told, so nobody is waited for.

    async def withdraw(self, addresses: Sequence[str]) -> None:
        pass

    async def close(self) -> None:
        pass
