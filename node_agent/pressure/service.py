"""What is reported, kept in the store, so that it counts whichever agent hears it.

At most one migration at a time is begun because of pressure in the whole cluster (`turn`), and none
while a node is being drained: drains know what they do with the links.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

import msgspec

from migrator.errors import (
    ConflictError,
    FerryError,
    InvalidRequest,
    NotFoundError,
    PeerError,
    StoreError,
)
from migrator.model import DomainName, Migration, NodeState
from node_agent.drain.world import DrainWorld
from node_agent.events import EventKind, EventLog
from node_agent.planner.model import DomainFacts, PlanOptions
from node_agent.pressure.policy import (
    COOLDOWN_S,
    REPORTS_MIN,
    SUSTAINED_S,
    History,
    PressureAnswer,
    PressureReport,
    Proposal,
    Standing,
    candidates,
    choose,
    weigh,
)
from node_agent.pressure.turn import Turns
from node_agent.resources import MigrationCreate
from node_agent.state.typed import TypedStore, Versioned

log = logging.getLogger(__name__)

PRESSURE: Final = "pressure/"
_TRIES: Final = 10
_CANDIDATES_MAX: Final = 8
"""Whose places are asked for: each is a plan of one move."""
_BUSY: Final = frozenset({NodeState.DRAINING, NodeState.RESTORING})
_BEGINNING: Final = "another move because of pressure is being begun: one at a time"


class PressureService:
    """See the module."""

    def __init__(
        self,
        store: TypedStore,
        world: DrainWorld,
        events: EventLog,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._world = world
        self._events = events
        self._clock = clock
        self._turns = Turns(store, clock)

    async def report(self, report: PressureReport) -> PressureAnswer:
        """Note it; when it is due, propose a move, or make it.

        InvalidRequest: not exactly one target; NotFoundError: there is no such domain or node.
        """
        if (report.domain is None) == (report.node is None):
            raise InvalidRequest(
                "pressure is of one domain or one node: name exactly one of domain and node",
                {"domain": "named, if node isn't", "node": "named, if domain isn't"},
            )
        source = await self._source(report)
        target = f"domain:{report.domain}" if report.domain else f"node:{report.node}"
        entry, standing = await self._note(f"{PRESSURE}{target}:{report.kind}", report)
        since_s = self._clock() - entry.value.since_s
        if standing is Standing.CALM:
            return PressureAnswer(
                standing=standing, reason=f"level {report.level:g} is no pressure"
            )
        if standing is Standing.NOTED:
            reason = (
                f"{entry.value.reports} of {REPORTS_MIN} reports, {since_s:.0f} of "
                f"{SUSTAINED_S:.0f} s: so long it has to last before anything is moved"
            )
            return PressureAnswer(standing=standing, reason=reason)
        if standing is Standing.RESTING:
            left_s = entry.value.moved_at_s + COOLDOWN_S - self._clock()
            reason = f"a domain was moved because of it; nothing more for {left_s:.0f} s"
            return PressureAnswer(standing=standing, reason=reason)
        proposal = await self._propose(report, source)
        if isinstance(proposal, str):
            return PressureAnswer(standing=Standing.NO_MOVE, reason=proposal)
        if not report.apply:
            return _answer(Standing.PROPOSED, proposal)
        return await self._apply(report, proposal, entry)

    async def _source(self, report: PressureReport) -> str:
        if report.domain is not None:
            domain = await self._world.cluster.get_domain(DomainName(report.domain))
            if domain.node is None:
                raise ConflictError(f"domain {report.domain} doesn't run")
            return domain.node
        assert report.node is not None
        if report.node not in (views := await self._world.views()):
            known = ", ".join(sorted(views))
            raise NotFoundError(f"there is no node {report.node}; known: {known}")
        return report.node

    async def _note(self, key: str, report: PressureReport) -> tuple[Versioned[History], Standing]:
        for _ in range(_TRIES):
            entry = await self._store.get(key, History)
            before = History() if entry is None else entry.value
            history, standing = weigh(before, report, self._clock())
            revision = await self._store.put_if(
                key, history, None if entry is None else entry.revision
            )
            if revision is not None:
                return Versioned(key, history, revision), standing
        raise ConflictError(f"{key} is written by others all the time; nothing was noted")

    async def _propose(self, report: PressureReport, source: str) -> Proposal | str:
        survey = await self._world.survey({source: ()}, sample_s=0.0, closed=(source,))
        if all(node.name != source for node in survey.nodes):
            return f"node {source} isn't known any more"
        options: PlanOptions = survey.options()
        places: dict[str, tuple[str, float] | str] = {}
        wanted = candidates(survey.domains, source, report.kind, report.domain)
        for each in wanted[:_CANDIDATES_MAX]:
            plan = await self._world.plan(survey, [each.name], options)
            move = next((move for move in plan.moves if move.destination), None)
            if move is not None and move.destination is not None:
                places[each.name] = (move.destination, move.seconds)
            else:
                blocker = next(iter(plan.blockers), None)
                places[each.name] = blocker.reason if blocker else "it has no place"

        def place(domain: DomainFacts) -> tuple[str, float] | str:
            return places.get(domain.name, "it wasn't looked at")

        return choose(survey.nodes, survey.domains, source, report.kind, report.domain, place)

    async def _apply(
        self, report: PressureReport, proposal: Proposal, entry: Versioned[History]
    ) -> PressureAnswer:
        turn = await self._turns.look()  # Before what others do: see `Turns`.
        resting = _BEGINNING if self._turns.taken(turn) else await self._others()
        if resting:
            return PressureAnswer(standing=Standing.RESTING, reason=resting)
        mine = await self._turns.take(turn)
        if mine is None:
            return PressureAnswer(standing=Standing.RESTING, reason=_BEGINNING)
        # By compare-and-set, too: of two agents that hear of the same pressure, one moves.
        moved = msgspec.structs.replace(entry.value, moved_at_s=self._clock())
        if await self._store.put_if(entry.key, moved, entry.revision) is None:
            await self._turns.end(mine)
            reason = "another report of it is being acted upon"
            return PressureAnswer(standing=Standing.RESTING, reason=reason)
        try:
            migration: Migration = await self._world.cluster.migrate(
                DomainName(proposal.domain), MigrationCreate(destination=proposal.destination)
            )
        except FerryError as error:
            if not isinstance(error, PeerError | StoreError):  # Then it may have begun.
                await self._turns.end(mine)
            return _answer(Standing.NO_MOVE, proposal, reason=f"the move was refused: {error}")
        await self._turns.end(mine)  # It is among the migrations now.
        said = f" ({report.source})" if report.source else ""
        self._events.emit(
            EventKind.PRESSURE_MOVE,
            f"domain {proposal.domain} moves from {proposal.source} to {proposal.destination} "
            f"because of {report.kind} pressure{said}: {proposal.reason}",
            domain=proposal.domain,
            migration=migration.id,
        )
        return _answer(Standing.MOVING, proposal, migration=migration.id)

    async def _others(self) -> str:
        """What is under way, beside which nothing is moved; "": nothing."""
        views = await self._world.views()
        busy = sorted(name for name, view in views.items() if view.state in _BUSY)
        if busy:
            return f"node {busy[0]} is being drained or restored: nothing else is moved meanwhile"
        outlines = await self._world.cluster.list_outlines()
        under_way = [each.id for each in outlines if not each.ended]
        return f"migration {under_way[0]} is under way: one at a time" if under_way else ""


def _answer(
    standing: Standing, proposal: Proposal, *, reason: str = "", migration: str | None = None
) -> PressureAnswer:
    return PressureAnswer(
        standing=standing,
        reason=reason or proposal.reason,
        domain=proposal.domain,
        source=proposal.source,
        destination=proposal.destination,
        seconds=proposal.seconds,
        migration=migration,
    )
