"""Which engine moves a domain: `auto` is decided here, and what speaks against an engine is said.

auto     paged, where both hosts and the domain allow it; else native, with the reason; refused
         where the hypervisor's own migration is known to harm guests
paged    paged, or refused
native   native, or refused; without post-copy (`migrator.native_driver`). A known harm is told
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from migrator.errors import FerryError
from migrator.model import (
    DomainName,
    EngineKind,
    HypervisorCapabilities,
    MigrationMode,
    MigrationRequest,
    NodeName,
    Phase,
)
from migrator.native_driver import NO_POST_COPY
from migrator.ports import HypervisorDriver, Struct
from migrator.session.source import SourceSession
from node_agent.nodes import NodeRegistry


class EngineChoice(Struct, frozen=True, kw_only=True):
    """The engine, why it is that one ("": it's the usual one), and what speaks against it."""

    engine: EngineKind
    reason: str = ""
    refused: tuple[str, ...] = ()
    mode: MigrationMode

    def apply_to(self, request: MigrationRequest) -> MigrationRequest:
        """The request with what was left open decided."""
        return msgspec.structs.replace(request, engine=self.engine, mode=self.mode)

    def note_in(self, session: SourceSession) -> None:
        """Begin a migration's timeline with it, if there is something to say."""
        if self.reason:
            detail = f"{self.engine}: {self.reason}"
            phase = Phase(
                name="engine", started_at_s=session.created_at_s, seconds=0.0, detail=detail
            )
            session.timeline.append(phase)


def choose(
    request: MigrationRequest,
    *,
    not_paged: Sequence[str],
    not_native: Sequence[str],
    hazard: str = "",
) -> EngineChoice:
    """By what speaks against each engine (empty: nothing).

    `hazard`: what native would do to the guest; only who asks for native gets it all the same.
    """
    asked, mode = request.engine, request.mode
    if asked is EngineKind.PAGED or (asked is EngineKind.AUTO and not not_paged):
        return EngineChoice(engine=EngineKind.PAGED, refused=tuple(not_paged), mode=mode)
    refused = [*not_native]
    if asked is EngineKind.AUTO:
        why = f"the page engine can't be used: {'; '.join(not_paged)}"
        refused += [hazard] if hazard else []
        if refused:
            refused.insert(0, why)
    else:
        why = "asked for" + (f", but {hazard}" if hazard else "")
    if mode is MigrationMode.POSTCOPY:
        refused.append(NO_POST_COPY if asked is EngineKind.NATIVE else f"{why}; {NO_POST_COPY}")
    elif mode is MigrationMode.HYBRID:
        mode = MigrationMode.PRECOPY
        why += "; pre-copy alone instead of hybrid, because it has no post-copy"
    return EngineChoice(engine=EngineKind.NATIVE, reason=why, refused=tuple(refused), mode=mode)


class EngineChooser:
    """Finds out what speaks against each engine, at the source."""

    def __init__(
        self, node: NodeName, *, hypervisor: HypervisorDriver, nodes: NodeRegistry
    ) -> None:
        self._node = node
        self._hypervisor = hypervisor
        self._nodes = nodes

    async def choose(self, domain: DomainName, request: MigrationRequest) -> EngineChoice:
        """Never refuses for what the destination will be asked itself."""
        own = await self._hypervisor.capabilities()
        not_native: list[str] = []
        if self._hypervisor.native is None:
            not_native = [f"{self._node}: {own.driver} has no migration that Ferry can drive"]
        not_paged = _obstacles(self._node, own)
        if not not_paged and request.engine is not EngineKind.NATIVE:
            not_paged = await self._domain_obstacles(domain)
        if request.engine is EngineKind.AUTO:
            views = await self._nodes.read()
            view = views.get(NodeName(request.destination))
            if view is not None:
                not_paged += _obstacles(NodeName(view.info.name), view.info.capabilities)
        return choose(request, not_paged=not_paged, not_native=not_native, hazard=own.native_hazard)

    async def _domain_obstacles(self, domain: DomainName) -> list[str]:
        """A domain that Ferry didn't start, or on another kernel, may lack what it takes."""
        try:
            (await self._hypervisor.memory(domain)).close()
        except FerryError as error:
            if (await self._hypervisor.inspect(domain)).pid is None:
                return []  # It doesn't run: that is said elsewhere.
            return [f"its memory can't be tracked: {error}"]
        return []


def _obstacles(node: NodeName, capabilities: HypervisorCapabilities) -> list[str]:
    if capabilities.paged_engine:
        return []
    return [f"{node}: {capabilities.paged_engine_reason or 'no reason given'}"]
