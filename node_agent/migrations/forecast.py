"""Dirty rates and predictions on the node that runs the domain.

    dirty_rate   sample the dirty log for some seconds (`migrator.dirty_sampler`)
    predict      sample, look up or measure the link, `migrator.prediction.predict`: for a dry run
    at_start     the same from what is known already: costs a migration no time, and may be None

A sampling doesn't lock its domain: whatever is done with it goes on. A migration ends it
(`interrupt`), and it is refused while one runs, because the dirty log has one user at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from migrator.engine_messages import DirtySampled
from migrator.errors import ConflictError, FerryError, WrongStateError
from migrator.figures import DirtyRate, LinkSpeed, Prediction
from migrator.model import (
    PAGE_SIZE_BYTES,
    DomainName,
    DomainState,
    EngineKind,
    Migration,
    MigrationRequest,
    MigrationState,
    NodeName,
    PassKind,
)
from migrator.ports import HypervisorDriver
from migrator.prediction import (
    PLAIN,
    Figures,
    PackedShares,
    curve_of_passes,
    packed_shares_of_passes,
    predict,
    zero_share_of_passes,
)
from node_agent.domain_locks import DomainLocks
from node_agent.migrations import link_speed

KNOWN_FOR_S: Final = 3600.0
"""A dirty rate older than this says nothing of the guest any more."""
KNOWN_MAX: Final = 1_000
_HISTORY_MAX: Final = 200
_CLOSE_S: Final = 5.0
INTERRUPT_S: Final = 5.0
"""It takes milliseconds; where an engine had to be killed, as long as another one takes."""
_AT_START_S: Final = 1.0


class Forecaster:
    """See the module. `close` ends the samplings."""

    def __init__(
        self,
        node: NodeName,
        *,
        hypervisor: HypervisorDriver,
        locks: DomainLocks,
        sample: Callable[[DomainName, float], Awaitable[DirtySampled]],
        history: Callable[[], Awaitable[Sequence[Migration]]],
        interface: Callable[[], Awaitable[LinkSpeed | None]],
        probe: Callable[[NodeName], Awaitable[LinkSpeed]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`history`: the cluster's migrations, newest first. `interface`, `probe`: link speeds."""
        self._node = node
        self._hypervisor = hypervisor
        self._locks = locks
        self._sample = sample
        self._read_history = history
        self._interface = interface
        self._probe = probe
        self._clock = clock
        self._sampling: dict[DomainName, asyncio.Task[DirtyRate]] = {}
        self._rates: dict[DomainName, DirtyRate] = {}
        self._history: list[Migration] | None = None

    async def close(self) -> None:
        """End what is being sampled."""
        tasks = list(self._sampling.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_S)

    # --- dirty rates -------------------------------------------------------------------------

    async def dirty_rate(self, domain: DomainName, seconds: float) -> DirtyRate:
        """Sample a guest that runs here, for `seconds`.

        WrongStateError if it isn't running, ConflictError if it is migrating, begins to, or is
        sampled already. The guest is never disturbed beyond the tracking, which is gone then.
        """
        await self._locks.settle(domain)
        await self._refuse_not_running(domain)
        capabilities = await self._hypervisor.capabilities()
        if not capabilities.paged_engine:
            raise ConflictError(
                f"{self._node} can't track writes: {capabilities.paged_engine_reason}"
            )
        # From here to the entry in `_sampling` nothing may be awaited: see `interrupt`.
        migration = self._locks.migration_of(domain)
        if migration is not None:
            raise ConflictError(
                f"domain {domain} is being migrated (migration {migration}), which has its dirty "
                "log; its dirty rate was not sampled"
            )
        if domain in self._sampling:
            raise ConflictError(f"the dirty rate of domain {domain} is being sampled already")
        task = asyncio.create_task(self._run(domain, seconds), name=f"dirty-rate-{domain}")
        self._sampling[domain] = task
        task.add_done_callback(lambda _: self._sampling.pop(domain, None))
        try:
            await asyncio.wait([task])
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=_CLOSE_S)
        if task.cancelled():
            raise ConflictError(
                f"the sampling of domain {domain} ended for the sake of a migration"
            )
        return task.result()

    async def interrupt(self, domain: DomainName) -> None:
        """End the sampling of a domain that has been claimed by a migration: none begins then.

        ConflictError: it takes too long to end. Until it has the log isn't free: whoever shares it
        misses what the other one has taken note of.
        """
        task = self._sampling.get(domain)
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task], timeout=INTERRUPT_S)
        if not task.done():
            raise ConflictError(
                f"the sampling of domain {domain} doesn't end; it isn't migrated until it has"
            )

    async def _refuse_not_running(self, domain: DomainName) -> None:
        state = (await self._hypervisor.inspect(domain)).state
        if state is not DomainState.RUNNING:
            raise WrongStateError(f"domain {domain}", state, "running")

    async def _run(self, domain: DomainName, seconds: float) -> DirtyRate:
        try:
            sampled = await self._sample(domain, seconds)
        except FerryError:
            await self._refuse_not_running(domain)  # A guest that ended meanwhile is the reason.
            raise
        rate = DirtyRate(
            domain=domain,
            node=self._node,
            sampled_at_s=self._clock(),
            seconds=sampled.seconds,
            pages_per_s=sampled.fresh_bytes / PAGE_SIZE_BYTES / sampled.seconds,
            bytes_per_s=sampled.fresh_bytes / sampled.seconds,
            working_set_bytes=sampled.curve[-1].bytes if sampled.curve else 0,
            memory_in_use_bytes=sampled.memory_in_use_bytes,
            zero_share=sampled.zero_share,
            packed_share=sampled.packed_share,
            dirtied_packed_share=sampled.dirtied_packed_share,
            curve=sampled.curve,
        )
        while len(self._rates) >= KNOWN_MAX:
            del self._rates[next(iter(self._rates))]
        self._rates[domain] = rate
        return rate

    # --- predictions -------------------------------------------------------------------------

    async def predict(
        self, domain: DomainName, request: MigrationRequest, sample_seconds: float
    ) -> Prediction:
        """How a migration would go now. Errors as `dirty_rate`; PeerError: the link is unknown."""
        rate = await self.dirty_rate(domain, sample_seconds)
        destination = NodeName(request.destination)
        await self._learn_history()
        link = await self._known_link(destination) or await self._probe(destination)
        packed = self._packed_shares(domain)
        origin = f"sampled over {rate.seconds:.1f} s"
        return predict(_figures_of(rate, link, origin, packed=packed), request)

    async def at_start(self, domain: DomainName, request: MigrationRequest) -> Prediction | None:
        """A prediction from what is known; None if that doesn't suffice. Never fails."""
        with contextlib.suppress(FerryError, TimeoutError):
            async with asyncio.timeout(_AT_START_S):
                return await self._from_what_is_known(domain, request)
        return None

    async def _learn_history(self) -> None:
        self._history = list(await self._read_history())[:_HISTORY_MAX]

    def ended(self, migration: Migration) -> None:
        """Learn from a migration of this node."""
        if self._history is not None:
            self._history = [migration, *self._history[: _HISTORY_MAX - 1]]

    async def _from_what_is_known(
        self, domain: DomainName, request: MigrationRequest
    ) -> Prediction | None:
        if self._history is None:
            await self._learn_history()
        link = await self._known_link(NodeName(request.destination))
        figures = None if link is None else await self.known_figures(domain, link)
        return None if figures is None else predict(figures, request)

    async def known_figures(self, domain: DomainName, link: LinkSpeed) -> Figures | None:
        """What is known of a domain that runs here, without looking; None: too little, too old."""
        if self._history is None:
            await self._learn_history()
        in_use = (await self._hypervisor.inspect(domain)).memory_in_use_bytes
        if not in_use:
            return None
        rate = self._rates.get(domain)
        age_s = self._clock() - rate.sampled_at_s if rate is not None else 0.0
        last = self._last_migration(domain)
        if rate is not None and age_s <= KNOWN_FOR_S and not _newer(last, rate):
            origin, packed = f"sampled {age_s:.0f} s before", self._packed_shares(domain)
            return _figures_of(rate, link, origin, in_use, packed=packed)
        if last is not None:
            return Figures(
                memory_in_use_bytes=in_use,
                curve=curve_of_passes(last.iterations),
                link=link,
                zero_share=_zero_share_after(last, in_use),
                packed=self._packed_shares(domain) or PLAIN,
                dirty_rate_origin=f"the iterations of migration {last.id}",
            )
        return None

    def _last_migration(self, domain: DomainName) -> Migration | None:
        oldest_s = self._clock() - KNOWN_FOR_S
        for each in self._history or ():
            if (
                each.domain == domain
                and each.state is MigrationState.COMPLETED
                and each.iterations
                and each.created_at_s >= oldest_s
            ):
                return each
        return None

    def _packed_shares(self, domain: DomainName) -> PackedShares | None:
        """What the page engine left of a byte in the domain's last migration; None: not known."""
        last = self._last_migration(domain)
        if last is None or last.request.engine is EngineKind.NATIVE:
            return None
        return packed_shares_of_passes(last.iterations)

    async def known_link(self, destination: NodeName) -> LinkSpeed | None:
        """How fast the way to another node is, without measuring it; None: not known."""
        if self._history is None:
            await self._learn_history()
        return await self._known_link(destination)

    async def _known_link(self, destination: NodeName) -> LinkSpeed | None:
        measured = link_speed.of_migrations(self._history or (), self._node, destination)
        return measured or await self._interface()


def _zero_share_after(migration: Migration, in_use_bytes: int) -> float:
    """Of what is in use at its destination now. The page engine leaves pages of zeros out there;
    QEMU's own migration brings them into being, so that no less is in use than before."""
    found = sum(
        each.pages + each.zero_pages for each in migration.iterations if each.kind is PassKind.FIRST
    )
    if in_use_bytes < found * PAGE_SIZE_BYTES:
        return 0.0
    return zero_share_of_passes(migration.iterations)


def _newer(migration: Migration | None, rate: DirtyRate) -> bool:
    return migration is not None and migration.created_at_s > rate.sampled_at_s


def _figures_of(
    rate: DirtyRate,
    link: LinkSpeed,
    origin: str,
    in_use_bytes: int | None = None,
    *,
    packed: PackedShares | None,
) -> Figures:
    """`packed`: as a migration has shown it, which knows the host's cores, too."""
    return Figures(
        memory_in_use_bytes=in_use_bytes or rate.memory_in_use_bytes,
        curve=rate.curve,
        link=link,
        zero_share=rate.zero_share,
        packed=_packed_shares_of(rate) if packed is None else packed,
        dirty_rate_origin=origin,
    )


def _packed_shares_of(rate: DirtyRate) -> PackedShares:
    memory, dirtied = rate.packed_share, rate.dirtied_packed_share
    return PackedShares(memory=memory, dirtied=memory if dirtied is None else dirtied)
