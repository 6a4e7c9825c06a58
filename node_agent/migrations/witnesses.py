"""Other nodes of the network, asked where they find a migrated guest.

destination ── probe ──► the old node, and a few others, each of which asks the network
            ◄── what answered, what was heard            (`netfabric.probing`)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Final

from migrator.errors import FerryError
from migrator.model import DomainName, NicSpec, NodeName, NodeState, Witness
from migrator.ports import FabricDriver, ProbeReport, Struct
from node_agent.nodes import NodeRegistry, NodeView
from node_agent.peers.hub import PeerHub

log = logging.getLogger(__name__)

PROBE: Final = "network.probe"
OTHERS: Final = 2
CALL_S: Final = 2.0


class ProbeParams(Struct, frozen=True, kw_only=True):
    nics: tuple[NicSpec, ...]
    timeout_s: float


class ProbeReports(Struct, frozen=True, kw_only=True):
    reports: tuple[ProbeReport, ...]


class Move(Struct, frozen=True, kw_only=True):
    """What of a session the network needs."""

    migration_id: str
    domain: DomainName
    source: NodeName
    destination: NodeName
    nics: tuple[NicSpec, ...]


class Witnesses:
    """Asks them, and is one for others. `register` before the hub starts."""

    def __init__(
        self, node: NodeName, *, hub: PeerHub, fabric: FabricDriver, nodes: NodeRegistry
    ) -> None:
        self.node = node
        self._hub = hub
        self._fabric = fabric
        self._nodes = nodes

    def register(self) -> None:
        """Serve the other nodes' questions."""
        self._hub.handle(PROBE, ProbeParams, self._on_probe)

    async def choose(self, move: Move) -> Sequence[NodeName]:
        """The old node first, then a few others that are well."""
        views: Mapping[NodeName, NodeView] = {}
        with contextlib.suppress(FerryError):
            views = await self._nodes.read()
        ready = sorted(name for name, view in views.items() if view.state is NodeState.READY)
        others = [name for name in ready if name not in (move.source, self.node)]
        return [move.source, *others[:OTHERS]]

    async def ask(
        self,
        migration_id: str,
        nics: Sequence[NicSpec],
        nodes: Sequence[NodeName],
        timeout_s: float,
    ) -> tuple[Witness, ...]:
        """What each of the nodes that answer found, NIC by NIC."""
        asked = tuple(nics)
        answers = await asyncio.gather(
            *(self._ask_one(node, migration_id, asked, timeout_s) for node in nodes)
        )
        return tuple(witness for answer in answers for witness in answer)

    async def _ask_one(
        self, node: NodeName, migration_id: str, nics: tuple[NicSpec, ...], timeout_s: float
    ) -> list[Witness]:
        params = ProbeParams(nics=nics, timeout_s=timeout_s)
        try:
            answer = await self._hub.call(
                node, PROBE, params, ProbeReports, timeout_s=timeout_s + CALL_S
            )
        except FerryError as error:  # It is no witness, then.
            log.info("migration %s: %s can't probe: %s", migration_id, node, error)
            return []
        return [
            Witness(
                node=node,
                mac=nic.mac,
                able=report.able,
                answered=report.answered,
                heard=report.heard,
                routed=report.routed,
            )
            for nic, report in zip(nics, answer.reports, strict=True)
        ]

    async def _on_probe(self, _: NodeName, params: ProbeParams) -> ProbeReports:
        timeout_s = min(params.timeout_s, CALL_S)
        probes = (self._fabric.probe(nic, timeout_s) for nic in params.nics)
        return ProbeReports(reports=tuple(await asyncio.gather(*probes)))
