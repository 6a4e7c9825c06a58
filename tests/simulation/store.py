"""The simulated state store: one for the cluster, and each agent's way to it, which may fail.

A request that timed out may have been applied, may be applied seconds later, or never. An answer
may be late: what it says was true when it was given. And the store may go back: somebody restores
an older copy, which is put right after a while, and takes no writes until then.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, ClassVar

from migrator.errors import StoreError
from node_agent.state.port import Change, Entry, StateStore, Swap, Written
from tests.simulation.world import STORE_LATE_S, STORE_SLOW_S, World

if TYPE_CHECKING:
    from tests.simulation.agent import Agent

CALL_S = 0.003
TAKEOVER: ContextVar[bool] = ContextVar("takeover", default=False)
"""Set where a takeover goes on: what it writes deposes whoever runs the domain."""


class StoreData:
    """What is stored. `on_write(key, value, takeover)` is called after each write."""

    def __init__(self, world: World, on_write: Callable[[str, bytes | None, bool], None]) -> None:
        self.world = world
        self.entries: dict[str, Entry] = {}
        self.revision = 0
        self.down = False
        self.went_back = False
        """What is read is its older copy."""
        self.flips = 0
        """Counts the times that it went back, and was put right."""
        self.restored = 0
        """Counts the times that it was restored from an older copy for good."""
        self.older: Mapping[str, Entry] = {}
        """What it may go back to."""
        self._on_write = on_write

    @property
    def outdated(self) -> bool:
        """Agents can't tell; operators can, and begin nothing."""
        return self.went_back and not self.world.healed

    @property
    def readable(self) -> Mapping[str, Entry]:
        return self.older if self.outdated else self.entries

    def write(self, key: str, value: bytes | None, takeover: bool = False) -> int:
        self.revision += 1
        if value is None:
            del self.entries[key]
        else:
            self.entries[key] = Entry(key=key, value=value, revision=self.revision)
        self._on_write(key, value, takeover)
        return self.revision

    def restore(self, snapshot: Mapping[str, Entry]) -> None:
        """For good. No revision is given a second time."""
        self.entries = dict(snapshot)
        self.restored += 1

    def compare_and_write(
        self, key: str, value: bytes | None, expected: int | None, takeover: bool
    ) -> int | None:
        entry = self.entries.get(key)
        if (None if entry is None else entry.revision) != expected:
            return None
        return self.write(key, value, takeover)


class SimulatedStore(StateStore):
    """One agent's access."""

    name: ClassVar[str] = "simulated"

    def __init__(self, agent: Agent, data: StoreData) -> None:
        self._agent = agent
        self._data = data

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def get(self, key: str) -> Entry | None:
        await self._read()
        entry = self._data.readable.get(key)
        await self._answer()
        return entry

    async def list_prefix(self, prefix: str) -> Sequence[Entry]:
        await self._read()
        entries = self._data.readable
        found = [entries[key] for key in sorted(entries) if key.startswith(prefix)]
        await self._answer()
        return found

    async def list_written(self, prefix: str, since_revision: int) -> Written:
        """Who restores an older copy starts all members anew, and so a leader's term."""
        await self._read()
        entries = self._data.readable
        found = [entries[key] for key in sorted(entries) if key.startswith(prefix)]
        written = Written(
            entries=[entry for entry in found if entry.revision > since_revision],
            count=len(found),
            revision=self._data.revision,
            era=self._data.flips + self._data.restored,
        )
        await self._answer()
        return written

    async def put_if(self, key: str, value: bytes, expected_revision: int | None) -> int | None:
        return await self._write(key, value, expected_revision)

    async def delete_if(self, key: str, expected_revision: int) -> bool:
        return await self._write(key, None, expected_revision) is not None

    async def put(self, key: str, value: bytes) -> int:
        raise NotImplementedError

    async def append(self, prefix: str, value: bytes, *, keep: int) -> int:
        raise NotImplementedError

    async def append_if(self, prefix: str, value: bytes, *, keep: int, swap: Swap) -> bool:
        raise NotImplementedError

    def watch(self, prefix: str, since_revision: int | None = None) -> AsyncIterator[Change]:
        raise NotImplementedError

    @property
    def _unreachable(self) -> bool:
        return (self._data.down or self._agent.node.store_cut) and not self._data.world.healed

    async def _read(self) -> None:
        world = self._data.world
        await self._agent.trip(CALL_S)
        if self._unreachable or world.chance(world.faults.store_unknown):
            await self._agent.trip(0.2)
            raise StoreError("the store doesn't answer")

    async def _answer(self) -> None:
        world = self._data.world
        if world.chance(world.faults.store_slow):
            await self._agent.trip(STORE_SLOW_S)

    async def _write(self, key: str, value: bytes | None, expected: int | None) -> int | None:
        """Applied on its way, also if the agent dies meanwhile."""
        data, world, faults = self._data, self._data.world, self._data.world.faults
        unreachable, takeover = self._unreachable, TAKEOVER.get()
        if data.outdated:
            await self._agent.trip(CALL_S)
            raise StoreError("the store takes no writes")
        if unreachable or world.chance(faults.store_unknown):
            restored = data.restored

            def apply() -> None:
                if data.restored == restored:
                    data.compare_and_write(key, value, expected, takeover)

            if world.chance(faults.store_late):
                world.after(world.delay(STORE_LATE_S), apply)
            elif not unreachable and world.random.random() < 0.5:
                world.after(world.delay(CALL_S), apply)
            await self._agent.trip(0.2)
            raise StoreError("the store's answer was lost: the outcome is unknown")
        return await self._agent.call(
            lambda: data.compare_and_write(key, value, expected, takeover), world.delay(CALL_S)
        )
