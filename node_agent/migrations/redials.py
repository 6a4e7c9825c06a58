"""Ways back to the peers of migrations that lost their connection.

Connections come back by being used, and a session that waits for its peer is silent.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from migrator.errors import FerryError
from migrator.model import NodeName
from node_agent.migrations.site import SEND_S
from node_agent.peers.hub import PeerHub

REDIAL_S: Final = 0.5
"""Between tries to reach a peer."""


class Redials:
    """One task a peer, as long as somebody waits for it (`wanted`)."""

    def __init__(self, hub: PeerHub, wanted: Callable[[NodeName], bool]) -> None:
        self._hub = hub
        self._wanted = wanted
        self.tasks: dict[NodeName, asyncio.Task[None]] = {}

    def begin(self, node: NodeName) -> None:
        """Idempotent."""
        if node in self.tasks or not self._wanted(node):
            return
        task = asyncio.create_task(self._redial(node), name=f"migrations-redial-{node}")
        self.tasks[node] = task
        task.add_done_callback(lambda _: self.tasks.pop(node, None))

    def close(self) -> None:
        for task in self.tasks.values():
            task.cancel()

    async def _redial(self, node: NodeName) -> None:
        while self._wanted(node):
            with contextlib.suppress(FerryError):
                await self._hub.reach(node, timeout_s=SEND_S)
                return
            await asyncio.sleep(REDIAL_S)
