"""What a node tells of its domains and its link when a drain is planned: `drain.figures`.

Known figures cost nothing (`migrations.forecast`: a sample or a migration of the last hour). For a
domain of which nothing is known its dirty log is sampled for a moment, two at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from migrator.errors import FerryError
from migrator.figures import DirtyRate, LinkOrigin, LinkSpeed
from migrator.model import DomainName, NodeName
from migrator.ports import Struct
from migrator.prediction import Figures, dirtied_bytes
from node_agent.migrations.forecast import Forecaster
from node_agent.peers.hub import PeerHub

FIGURES: Final = "drain.figures"
FIGURES_S: Final = 60.0
_SAMPLED_AT_ONCE: Final = 2
_PROBE_KNOWN_S: Final = 600.0
_NO_LINK: Final = LinkSpeed(bytes_per_s=1.0, origin=LinkOrigin.PROBE)


class FiguresParams(Struct, frozen=True, kw_only=True):
    """`sample_s` 0: only what is known. `towards`: the node that the link is measured to."""

    domains: tuple[str, ...]
    sample_s: float
    towards: str | None


class DomainFigures(Struct, frozen=True, kw_only=True):
    domain: str
    content_bytes: int
    dirty_bytes_per_s: float
    working_set_bytes: int


class NodeFigures(Struct, frozen=True, kw_only=True):
    domains: tuple[DomainFigures, ...]
    """Those of which something is known now."""
    link_bytes_per_s: float | None
    link_known_by: str
    overhead_s: float | None
    """Of a migration beside its iterations; None: not known."""
    move_bytes_per_s: float | None = None
    """How fast its last migrations were, each alone and without a cap; None: not known."""


class FiguresService:
    """This node's answer. `register` once."""

    def __init__(
        self,
        forecaster: Forecaster,
        interface: Callable[[], Awaitable[LinkSpeed | None]],
        probe: Callable[[NodeName], Awaitable[LinkSpeed]],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._forecaster = forecaster
        self._interface = interface
        self._probe = probe
        self._monotonic = monotonic
        self._probed: tuple[float, LinkSpeed] | None = None

    def register(self, hub: PeerHub) -> None:
        hub.handle(FIGURES, FiguresParams, self._answer)

    async def _answer(self, _: NodeName, params: FiguresParams) -> NodeFigures:
        gate = asyncio.Semaphore(_SAMPLED_AT_ONCE)

        async def one(domain: str) -> DomainFigures | None:
            try:
                return await self._domain(DomainName(domain), params.sample_s, gate)
            except FerryError:  # It has gone, or is migrating: the plan assumes the worst.
                return None

        found = await asyncio.gather(*(one(each) for each in params.domains))
        link, known = await self._link(params.towards)
        return NodeFigures(
            domains=tuple(each for each in found if each is not None),
            link_bytes_per_s=None if link is None else link.bytes_per_s,
            link_known_by="" if link is None else f"{link.origin}: {link.detail}",
            overhead_s=None if known is None else known.overhead_s,
            move_bytes_per_s=None if known is None else known.bytes_per_s,
        )

    async def _domain(
        self, domain: DomainName, sample_s: float, gate: asyncio.Semaphore
    ) -> DomainFigures | None:
        figures = await self._forecaster.known_figures(domain, _NO_LINK)
        if figures is None and sample_s > 0.0:
            async with gate:
                rate = await self._forecaster.dirty_rate(domain, sample_s)
            return _of_rate(rate)
        return None if figures is None else _of_figures(str(domain), figures)

    async def _link(self, towards: str | None) -> tuple[LinkSpeed | None, LinkSpeed | None]:
        """The link, by what has been seen to pass over it, and what migrations say of it.

        Busy nodes' migrations, and a probe between busy agents, come out too slow, never too fast.
        """
        own = await self._interface()
        if towards is None:
            return own, None
        known = await self._forecaster.known_link(NodeName(towards))
        if known is not None and known.origin is not LinkOrigin.MIGRATIONS:
            known = None
        if own is not None:
            return own, known
        now = self._monotonic()
        if self._probed is None or now - self._probed[0] > _PROBE_KNOWN_S:
            try:
                self._probed = (now, await self._probe(NodeName(towards)))
            except FerryError:
                return known, known
        probed = self._probed[1]
        if known is not None and known.bytes_per_s > probed.bytes_per_s:
            return known, known
        return probed, known


def _of_rate(rate: DirtyRate) -> DomainFigures:
    return DomainFigures(
        domain=rate.domain,
        content_bytes=int(rate.memory_in_use_bytes * (1.0 - rate.zero_share)),
        dirty_bytes_per_s=rate.bytes_per_s,
        working_set_bytes=rate.working_set_bytes,
    )


def _of_figures(domain: str, figures: Figures) -> DomainFigures:
    memory = figures.memory_in_use_bytes
    points: Sequence[int] = [point.bytes for point in figures.curve]
    return DomainFigures(
        domain=domain,
        content_bytes=int(memory * (1.0 - figures.zero_share)),
        dirty_bytes_per_s=float(dirtied_bytes(figures.curve, 1.0, memory)),
        working_set_bytes=max(points, default=0),
    )
