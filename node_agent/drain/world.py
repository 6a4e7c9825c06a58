"""What drains do to the cluster and ask of it, through the services that any agent has."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec

from migrator.errors import FerryError, NotFoundError
from migrator.model import (
    DomainName,
    Migration,
    NodeName,
    OwnershipState,
)
from migrator.ports import OwnershipStore
from node_agent.cluster import ClusterService
from node_agent.cluster_calls import (
    MIGRATION_CHECK,
    STATUSES,
    MigrationParams,
    Nothing,
    Reasons,
    Statuses,
)
from node_agent.domain_records import DomainRecords
from node_agent.drain.figures import FIGURES, FIGURES_S, FiguresParams, NodeFigures
from node_agent.drain.survey import Survey, make_survey
from node_agent.migrations.checks import said_of_destination
from node_agent.migrations.room import at_source
from node_agent.nodes import NodeRegistry, NodeView
from node_agent.peers.hub import PeerHub
from node_agent.planner.model import Blocker, Plan, PlanOptions
from node_agent.planner.plan import plan_moves
from node_agent.resources import Domain, MigrationCreate

CALL_S: Final = 10.0
_REPLANS_MAX: Final = 5
_REFUSALS_ALIKE: Final = 2
"""From so many on the others of a domain's possible nodes are asked at once: what it is refused for
(a storage that is away) is likely the same everywhere."""
_CHECKED_MAX: Final = 64
"""Moves that are put to their nodes at once; those of a plan that has more are checked when they
begin, as every migration is."""
_LINKS_MAX: Final = 8
"""Of an undrain's or a balancing's many sources; of the others it is assumed."""


class DrainWorld:
    """Errors of every method: FerryError."""

    def __init__(
        self,
        cluster: ClusterService,
        *,
        hub: PeerHub,
        nodes: NodeRegistry,
        records: DomainRecords,
        ownership: OwnershipStore,
    ) -> None:
        self.cluster = cluster
        self._hub = hub
        self._nodes = nodes
        self._records = records
        self._ownership = ownership

    # --- looking -----------------------------------------------------------------------------

    async def views(self) -> Mapping[str, NodeView]:
        return {str(name): view for name, view in (await self._nodes.read()).items()}

    @property
    def trouble(self) -> str:
        """Why this node's heartbeat can't be written, and so all seem to be silent; "": it can."""
        return self._nodes.trouble

    @property
    def judges_in_s(self) -> float:
        """For so long this agent must listen yet, before it holds a silence against anybody."""
        return self._nodes.judges_in_s

    async def owner(self, domain: str) -> str | None:
        """The node that runs it; None: nobody does, or it isn't defined any more."""
        try:
            await self._records.get(DomainName(domain))
        except NotFoundError:
            return None
        owned = await self._ownership.read(DomainName(domain))
        if owned is None or owned.state is not OwnershipState.RUNNING:
            return None
        return owned.owner

    async def owned_by(self, node: str) -> tuple[str, ...]:
        """The domains whose record says that they run there."""
        return tuple(sorted(await self._records.running_on(NodeName(node))))

    async def processes(self, node: str) -> tuple[str, ...]:
        """The domains that have a process there, whoever owns them. PeerError: it is silent."""
        answer = await self._hub.call(
            NodeName(node), STATUSES, Nothing(), Statuses, timeout_s=CALL_S
        )
        return tuple(sorted(status.name for status in answer.statuses))

    async def incoming(self, node: str) -> tuple[str, ...]:
        """The domains of migrations that are under way to it."""
        outlines = await self.cluster.list_outlines()
        return tuple(
            sorted(each.domain for each in outlines if each.destination == node and not each.ended)
        )

    async def leaving(self, node: str) -> dict[str, Migration]:
        """By domain, the migrations from it that are under way, as it says itself."""
        outlines = await self.cluster.list_outlines()
        mine = [each.id for each in outlines if each.source == node and not each.ended]
        found = await asyncio.gather(*map(self.cluster.get_migration, mine))
        return {each.domain: each for each in found if not each.ended}

    async def migration_of(self, domain: str, known: str | None) -> Migration | None:
        """The one that has hold of the domain now; else the known one; else None."""
        outlines = await self.cluster.list_outlines()
        for each in outlines:
            if each.domain == domain and not each.ended:
                return await self.cluster.get_migration(each.id)
        if known is None or all(each.id != known for each in outlines):
            return None
        try:
            return await self.cluster.get_migration(known)
        except NotFoundError:
            return None  # The store keeps the newest ones, and has dropped it just now.

    # --- planning ----------------------------------------------------------------------------

    async def survey(
        self,
        sources: Mapping[str, Collection[str]],
        *,
        sample_s: float,
        closed: Collection[str] = (),
        places: Mapping[str, str] | None = None,
    ) -> Survey:
        """The facts, with figures of the domains that each source has to send."""
        views = await self.views()
        domains: Sequence[Domain] = await self.cluster.list_domains()

        async def ask(source: str, names: Collection[str], towards: str | None) -> NodeFigures:
            params = FiguresParams(domains=tuple(names), sample_s=sample_s, towards=towards)
            return await self._hub.call(
                NodeName(source), FIGURES, params, NodeFigures, timeout_s=FIGURES_S
            )

        async def domains_of(source: str, names: Collection[str]) -> NodeFigures | None:
            try:
                return await ask(source, names, None)
            except FerryError:  # The plan assumes what it isn't told.
                return None

        answers = await asyncio.gather(*(domains_of(*each) for each in sources.items()))
        figures = {
            source: answer
            for source, answer in zip(sources, answers, strict=True)
            if answer is not None
        }
        # One link after the other: two probes at once would measure each other.
        for source in list(figures)[:_LINKS_MAX]:
            towards = next(
                (name for name, v in views.items() if v.state.admits and name != source), None
            )
            with contextlib.suppress(FerryError):
                link = await ask(source, (), towards)
                figures[source] = msgspec.structs.replace(link, domains=figures[source].domains)
        return make_survey(views, domains, figures, closed=closed, places=places)

    async def plan(
        self, survey: Survey, leaving: Collection[str], options: PlanOptions, *, ask: bool = True
    ) -> Plan:
        """A plan whose moves their nodes have agreed to: who refuses one is left out of the next.

        What its own node can't send is a blocker.

        Without `ask` by what is known alone: a dry run for a node that is still kept free.

        In a thread of its own: of a large cluster it takes some seconds.
        """
        forbidden = set(options.forbidden)
        refusals = dict(options.refusals)
        stuck: dict[str, Blocker] = {}
        for _ in range(_REPLANS_MAX):
            asked = msgspec.structs.replace(
                options, forbidden=frozenset(forbidden), refusals=refusals
            )
            free = [name for name in leaving if name not in stuck]
            plan = await asyncio.to_thread(plan_moves, survey.nodes, survey.domains, free, asked)
            asked_of = _to_ask(plan, survey, forbidden) if ask else []
            refused, held = await self._refused(asked_of)
            if not refused.keys() - forbidden and not held.keys() - stuck.keys():
                break
            forbidden |= refused.keys()
            refusals |= refused
            stuck |= held
        else:
            stuck |= _still_refused(plan, refusals)
        return msgspec.structs.replace(
            plan,
            moves=tuple(move for move in plan.moves if move.domain not in stuck),
            blockers=(*plan.blockers, *(stuck[name] for name in sorted(stuck))),
        )

    async def _refused(
        self, moves: Sequence[tuple[str, str, str]]
    ) -> tuple[dict[tuple[str, str], str], dict[str, Blocker]]:
        """(domain, node) of the moves that their nodes refuse now, and why; and what can't leave
        its own node, wherever to. `moves`: domain, source and destination."""
        refused: dict[tuple[str, str], str] = {}
        held: dict[str, Blocker] = {}

        async def ask(domain: str, source: str, destination: str) -> None:
            body = MigrationCreate(destination=destination).towards(destination)
            params = MigrationParams(domain=DomainName(domain), request=body)
            try:
                answer = await self._hub.call(
                    NodeName(source), MIGRATION_CHECK, params, Reasons, timeout_s=CALL_S
                )
            except FerryError:
                return
            here = [each for each in answer.reasons if each.startswith(at_source(source))]
            if here:
                remedy = f"mend that on {source}"
                held[domain] = Blocker(domain=domain, reason="; ".join(here), remedy=remedy)
            place, mark = NodeName(destination), f"node {destination}: "
            theirs = [each for each in answer.reasons if said_of_destination(place, each)]
            if theirs:
                said = "; ".join(each.removeprefix(mark) for each in theirs)
                refused[domain, destination] = said

        await asyncio.gather(*(ask(*move) for move in moves))
        return refused, held


def _to_ask(
    plan: Plan, survey: Survey, forbidden: Collection[tuple[str, str]]
) -> list[tuple[str, str, str]]:
    """Domain, source and destination of what is planned; and all that is left of a domain that some
    have refused."""
    moves = [move for move in plan.moves if move.destination and move.rates]
    found = [(move.domain, move.source, move.destination or "") for move in moves]
    open_nodes = [node.name for node in survey.nodes if node.admits]
    for move in moves:
        no_places = {node for domain, node in forbidden if domain == move.domain}
        if len(no_places) >= _REFUSALS_ALIKE:
            no_places |= {move.source, move.destination or ""}
            found += [(move.domain, move.source, n) for n in open_nodes if n not in no_places]
    return found[:_CHECKED_MAX]


def _still_refused(plan: Plan, refusals: Mapping[tuple[str, str], str]) -> dict[str, Blocker]:
    """The moves that were refused when it had been planned often enough."""
    found: dict[str, Blocker] = {}
    for move in plan.moves:
        said = refusals.get((move.domain, move.destination or ""))
        if said is not None:
            count = sum(domain == move.domain for domain, _ in refusals)
            found[move.domain] = Blocker(
                domain=move.domain,
                reason=f"{count} nodes refuse it, {move.destination} because of this: {said}",
                remedy=f"mend that, or leave it there (--exclude {move.domain})",
            )
    return found
