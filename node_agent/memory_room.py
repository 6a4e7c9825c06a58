"""Whether a node has room for one more domain, of the memory that it offers (`node.memory_bytes`).

A domain counts with all of its memory, whatever it has touched by now: what runs here, what is on
its way here, what is being started and has no process yet, and what waits here to be started again.
A start asks, a takeover, and a migration's destination. What ran here when its hypervisor died, or
its node, doesn't: it was let in once, and its users wait.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Final

from migrator.errors import RefusedError
from migrator.model import DomainName, DomainSpec, NodeName
from migrator.ports import HypervisorDriver
from node_agent.domain_records import DomainRecords
from node_agent.domain_restart import DomainRestarts

_MIB: Final = 2**20
_COUNTED: Final = "domains counted that come here, or wait to be started again"


class MemoryRoom:
    """See the module. `incoming` are asked for the domains on their way here, `restarts` knows
    which wait to be started again."""

    def __init__(
        self,
        node: NodeName,
        hypervisor: HypervisorDriver,
        records: DomainRecords,
        offered_bytes: int | None = None,
    ) -> None:
        """`offered_bytes`: to domains; None: there is always room."""
        self._node = node
        self._hypervisor = hypervisor
        self._records = records
        self._offered_bytes = offered_bytes
        self._starting: dict[str, int] = {}
        self._turn = asyncio.Lock()
        self.incoming: list[Callable[[], Iterable[DomainSpec]]] = []
        self.restarts: DomainRestarts | None = None

    @contextlib.asynccontextmanager
    async def held(self, domain: DomainName) -> AsyncIterator[None]:
        """While it is being started. RefusedError: there isn't enough; nothing was changed.

        Of starts at the same time each counts those that were let in before it.
        """
        if self._offered_bytes is None:
            yield
            return
        spec = (await self._records.get(domain)).spec
        async with self._turn:
            if fields := await self.troubles(spec):
                reasons = [f"{field}: {trouble}" for field, trouble in fields.items()]
                raise RefusedError(
                    f"domain {domain} was not started on {self._node}: {reasons[0]}",
                    reasons,
                    fields,
                )
            self._starting[spec.name] = spec.memory_bytes
        try:
            yield
        finally:
            del self._starting[spec.name]

    async def troubles(self, spec: DomainSpec) -> dict[str, str]:
        """By field of the spec, why it can't be taken in; {}: it can. Changes nothing."""
        if self._offered_bytes is None:
            return {}
        free_bytes = self._offered_bytes - await self._taken_bytes(without=spec.name)
        if spec.memory_bytes <= free_bytes:
            return {}
        trouble = (
            f"not enough memory: {spec.memory_bytes / _MIB:.0f} MiB needed, "
            f"{max(free_bytes, 0) / _MIB:.0f} MiB free of the {self._offered_bytes / _MIB:.0f} MiB "
            f"that the node offers ({_COUNTED})"
        )
        return {"memory_bytes": trouble}

    async def _taken_bytes(self, without: str) -> int:
        taken = {**await self._waiting_bytes(), **self._starting}
        taken |= {spec.name: spec.memory_bytes for each in self.incoming for spec in each()}
        for launched in await self._hypervisor.launched_all():
            taken[launched.name] = launched.memory_bytes
        taken.pop(without, None)
        return sum(taken.values())

    async def _waiting_bytes(self) -> dict[str, int]:
        """By domain, of what has no process now and is started again without being asked."""
        wanted = () if self.restarts is None else self.restarts.all_wanted()
        if self.restarts is None or not wanted:
            return {}
        records = await self._records.list_records()
        owned = await self._records.list_ownership()
        return {
            name: records[name].spec.memory_bytes
            for name in wanted
            if name in records and name in owned and self.restarts.due(owned[name])
        }
