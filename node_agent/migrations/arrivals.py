"""Pages come while the destination's hypervisor still starts; the pause waits until it is up.

source ── arrived(migration)? ──► destination: once nothing of it is being prepared there
       ◄── yes; or not yet, and the source asks again

It is asked while the guest runs, with the leave to pause it. A destination that knows nothing of
the migration has nothing to prepare for it: what is wrong there shows in the session.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Final

from migrator.errors import PeerError, RemoteProtocolError
from migrator.model import NodeName
from migrator.ports import Struct
from node_agent.peers.hub import PeerHub

ARRIVED: Final = "migration.arrived"
LOOK_S: Final = 1.0
"""How long the destination waits before it answers that it isn't yet."""
CALL_S: Final = 3.0
AGAIN_S: Final = 0.2
"""Before a destination that couldn't be reached is asked again."""


class ArrivalQuestion(Struct, frozen=True, kw_only=True):
    migration_id: str


class ArrivalAnswer(Struct, frozen=True, kw_only=True):
    arrived: bool


class Arrivals:
    """Asks as a source, and knows as a destination. `register` before the hub starts."""

    def __init__(self, hub: PeerHub) -> None:
        self._hub = hub
        self._under_way: dict[str, asyncio.Event] = {}

    def register(self) -> None:
        """Serve other nodes' questions."""
        self._hub.handle(ARRIVED, ArrivalQuestion, self._on_question)

    @contextlib.contextmanager
    def preparing(self, migration_id: str) -> Iterator[None]:
        """Here, while its hypervisor and what that needs are made."""
        done = self._under_way[migration_id] = asyncio.Event()
        try:
            yield
        finally:
            del self._under_way[migration_id]
            done.set()

    def is_preparing(self, migration_id: str) -> bool:
        return migration_id in self._under_way

    async def wait(self, destination: NodeName, migration_id: str) -> None:
        """Until `destination` has prepared all of it, or given up; the caller bounds it.

        Returns as well where the destination's release doesn't know the question: it answered the
        source only when it was ready.
        """
        question = ArrivalQuestion(migration_id=migration_id)
        while True:
            try:
                answer = await self._hub.call(
                    destination, ARRIVED, question, ArrivalAnswer, timeout_s=CALL_S
                )
            except RemoteProtocolError:
                return
            except PeerError:
                await asyncio.sleep(AGAIN_S)
                continue
            if answer.arrived:
                return

    async def _on_question(self, _: NodeName, question: ArrivalQuestion) -> ArrivalAnswer:
        done = self._under_way.get(question.migration_id)
        if done is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await done.wait()
        return ArrivalAnswer(arrived=not self.is_preparing(question.migration_id))
