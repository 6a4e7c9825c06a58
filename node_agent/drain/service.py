"""Drains, undrains and cordons, as the API has them. Whichever agent is asked coordinates.

What becomes of a drain whose agent dies: `watch`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from migrator.errors import (
    ConflictError,
    FerryError,
    NotFoundError,
    RefusedError,
    StoreError,
)
from migrator.model import Migration, NodeName, NodeState
from node_agent.drain import departures, experience, neighbours, undrain
from node_agent.drain.balancing import moves_of_balance, plan_balance, shown_balance
from node_agent.drain.coordinator import Coordinator
from node_agent.drain.cordons import PASSING, Cordons
from node_agent.drain.hooks import NodeHooks, NoHooks
from node_agent.drain.node_cordons import NodeCordons
from node_agent.drain.records import DrainRecords, LostError
from node_agent.drain.resources import (
    BalancePlan,
    CancelMode,
    Drain,
    DrainPlan,
    DrainRequest,
    DrainState,
    Operation,
    PlanBlocker,
    UndrainRequest,
    timeout_of,
)
from node_agent.drain.survey import Survey, moves_of, one_way_moves, shown_plan, with_policy
from node_agent.drain.watch import LOOK_S, SILENT_S, DrainWatch
from node_agent.drain.world import DrainWorld
from node_agent.events import EventLog
from node_agent.nodes import not_yet
from node_agent.peers.hub import PeerHub
from node_agent.planner.model import Plan, PlanOptions
from node_agent.state.typed import TypedStore, Versioned

log = logging.getLogger(__name__)

DRY_RUN_SAMPLE_S: Final = 0.5
SAMPLE_S: Final = 0.25
_LOOKS_MAX: Final = 3
"""At what is leaving, while users go on to migrate what is planned."""
_FROM_OUTSIDE: Final = (
    "its domains can't be moved from outside; if it is dead, `ferry domain takeover` starts them "
    "elsewhere"
)
_EXCLUDED: Final = "it is excluded; the node isn't called drained while it is there"


class DrainService:
    """See the module. `close` leaves the drains of this agent to others.

    `open` makes it look after the drains of agents that have fallen silent.
    """

    def __init__(
        self,
        node: NodeName,
        *,
        store: TypedStore,
        world: DrainWorld,
        hub: PeerHub,
        events: EventLog,
        hooks: NodeHooks | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        silent_s: float = SILENT_S,
        look_s: float = LOOK_S,
    ) -> None:
        self.node = node
        self.world = world
        self._hub = hub
        self.events = events
        self._hooks = hooks or NoHooks()
        self._clock = clock
        self.cordons = NodeCordons(
            node,
            Cordons(store),
            must_exist=self._must_exist,
            events=events,
            hooks=self._hooks,
            clock=clock,
        )
        self._records = DrainRecords(store)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._planning: set[str] = set()
        self._coordinators: dict[str, Coordinator] = {}
        self._watch = DrainWatch(
            self, store, self._records, silent_s, look_s, clock=clock, monotonic=monotonic
        )

    async def open(self) -> None:
        self._watch.open()

    async def close(self) -> None:
        await self._watch.close()
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- drains ------------------------------------------------------------------------------

    async def plan(self, node: NodeName, request: DrainRequest) -> DrainPlan:
        """What `drain` would do, and what stands in its way. Changes nothing."""
        await self._must_speak(node)
        survey, plan, leaving = await self._plan(node, request, DRY_RUN_SAMPLE_S)
        left = [
            PlanBlocker(domain=each, reason=_EXCLUDED, remedy="")
            for each in sorted(set(request.exclude))
        ]
        shown = shown_plan(node, survey, plan, left)
        return msgspec.structs.replace(
            shown,
            leaving=departures.shown(leaving),
            left_out=survey.left_out(node),
            remarks=tuple(one_way_moves(survey, plan, await self.world.views())),
            timeout_s=timeout_of(plan.makespan_s, request.timeout_s),
        )

    async def drain(self, node: NodeName, request: DrainRequest, by: str = "") -> Drain:
        """Cordon the node and begin to empty it. RefusedError names every blocker: then nothing
        was changed. `by`: who wants it."""
        await self._must_speak(node)
        await self._refuse_second(node)
        with self._planned() as name:
            return await self._drain(node, request, name, by)

    async def _drain(self, node: NodeName, request: DrainRequest, name: str, by: str) -> Drain:
        before = await self.cordons.claim(node, NodeState.DRAINING, name, by, request.reason)
        cordoned_by = None if before is None else before.drain
        try:
            survey, plan, leaving = await self._plan(node, request, SAMPLE_S)
            if plan.blockers:
                reasons = [
                    f"{each.domain}: {each.reason}; what would help: {each.remedy}"
                    for each in plan.blockers
                ]
                raise RefusedError(
                    f"node {node} can't be drained: {len(reasons)} of its domains can't leave; "
                    f"nothing was moved",
                    reasons,
                )
            drain = self._made(name, Operation.DRAIN, node, survey, plan, request)
            earlier = undrain.continued(await self._records.list_drains(), node, cordoned_by)
            moves = departures.moves(leaving, survey, request.policy, drain.started_at_s)
            drain = msgspec.structs.replace(
                drain,
                moves=drain.moves + moves,
                planned_s=max(drain.planned_s, departures.longest_s(leaving)),
                continues=earlier,
                asked_by=by,
                reason=request.reason,
            )
            entry = await self._records.add(drain)
        except BaseException:
            await asyncio.shield(self.cordons.put_back(node, before))
            raise
        self.begin(entry)
        return entry.value

    async def undrain(self, node: NodeName, request: UndrainRequest, by: str = "") -> Drain:
        """Open the node again, and bring back what its last drain took away."""
        if request.restore:
            await self._must_speak(node, "nothing can be brought back to it; --no-restore opens it")
        else:
            await self._must_exist(node)
        await self._refuse_second(node)
        drained = await self._to_undo(node) if request.restore else ()
        with self._planned() as name:
            return await self._undrain(node, drained, name, by)

    async def _undrain(self, node: NodeName, drained: Sequence[Drain], name: str, by: str) -> Drain:
        before = await self.cordons.claim(node, NodeState.RESTORING, name, by)
        try:
            survey, plan, left = await undrain.plan(
                self.world,
                node,
                drained,
                SAMPLE_S,
                learned=await self._experience(Operation.UNDRAIN),
                others=await self._records.list_drains(),
            )
            drain = self._made(name, Operation.UNDRAIN, node, survey, plan, None)
            drain = undrain.complete(drain, drained, left)
            drain = msgspec.structs.replace(drain, asked_by=by)
            entry = await self._records.add(drain)
            for each in drained:
                await self._records.mark_restored(each.id, name)
        except BaseException:
            await asyncio.shield(self.cordons.put_back(node, before))
            raise
        self.begin(entry)
        return entry.value

    async def plan_undrain(self, node: NodeName) -> DrainPlan:
        """What `undrain` would bring back, and what it would leave. Changes nothing."""
        await self._must_exist(node)
        survey, plan, left = await undrain.plan(
            self.world,
            node,
            await self._to_undo(node),
            0.0,
            learned=await self._experience(Operation.UNDRAIN),
            others=await self._records.list_drains(),
            ask=False,
        )
        return shown_plan(node, survey, plan, left)

    # --- balancing ---------------------------------------------------------------------------

    async def plan_balance(self) -> BalancePlan:
        """The moves that would even the nodes out. Changes nothing."""
        survey, found = await plan_balance(self.world, self._hub, self._clock)
        return msgspec.structs.replace(shown_balance(found), left_out=survey.left_out())

    async def balance(self) -> Drain:
        """Make those moves, one after the other. ConflictError: a drain is under way."""
        busy = [drain for drain in await self._records.list_drains() if not drain.ended]
        if busy:
            raise ConflictError(
                f"{busy[0].operation} {busy[0].id} is under way; nothing was evened out"
            )
        survey, found = await plan_balance(self.world, self._hub, self._clock)
        now, planned_s = self._clock(), sum(each.cost_s for each in found.moves)
        drain = Drain(
            id=secrets.token_hex(6),
            operation=Operation.BALANCE,
            node="",
            state=DrainState.RUNNING,
            created_at_s=now,
            started_at_s=now,
            at_s=now,
            written_at_s=now,
            coordinator=self.node,
            term=1,
            moves=moves_of_balance(found),
            links=survey.shares(PlanOptions()),
            planned_s=planned_s,
            timeout_s=timeout_of(planned_s),
        )
        self.begin(await self._records.add(drain))
        return drain

    async def _to_undo(self, node: NodeName) -> tuple[Drain, ...]:
        return undrain.to_undo(await self._records.list_drains(), node)

    async def cancel(self, id: str, mode: CancelMode, by: str = "") -> Drain:
        """Begin no more moves, and let those under way end, or cancel them. WrongStateError.

        `by`: who wants it.
        """
        return await self._records.ask_cancel(id, mode, by)

    async def cancel_of(self, node: NodeName, mode: CancelMode, by: str = "") -> Drain:
        """The same, of the drain or undrain of a node that is under way."""
        await self._must_exist(node)
        for drain in await self._records.list_drains():
            if drain.node == node and not drain.ended:
                return await self.cancel(drain.id, mode, by)
        why = f"no drain or undrain of node {node} is under way"
        cordon = await self.cordons.read(node)
        if cordon is not None and cordon.planned_by and cordon.state in PASSING:
            why = (
                f"drain {cordon.drain} of node {node} is still being planned by "
                f"{cordon.planned_by}; if that has died, the node is {cordon.was} again soon"
            )
        if cordon is not None and cordon.state is NodeState.DRAINED:
            why += f": it is drained, which `ferry undrain {node}` undoes"
        raise ConflictError(f"{why}; nothing was changed")

    async def get(self, id: str) -> Drain:
        """As its coordinator sees it, if that is this agent; else as it was saved last."""
        stored = (await self._records.get(id)).value
        coordinator = self._coordinators.get(id)
        return coordinator.shown if coordinator and not stored.ended else stored

    async def list_drains(self) -> Sequence[Drain]:
        """Newest first."""
        return await self._records.list_drains()

    # --- inside ------------------------------------------------------------------------------

    async def _plan(
        self, node: NodeName, request: DrainRequest, sample_s: float
    ) -> tuple[Survey, Plan, Sequence[Migration]]:
        """And what is leaving already. Anew where one has begun to while it was being planned."""
        leaving = await self.world.leaving(node)
        for _ in range(_LOOKS_MAX):
            survey, plan = await self._plan_beside(node, request, sample_s, leaving)
            known, leaving = leaving, await self.world.leaving(node)
            blocked = {each.domain for each in plan.blockers}
            if not blocked & (leaving.keys() - known.keys()):
                break
        waited = [each for name, each in known.items() if name not in request.exclude]
        return survey, plan, waited

    async def _plan_beside(
        self,
        node: NodeName,
        request: DrainRequest,
        sample_s: float,
        leaving: Mapping[str, Migration],
    ) -> tuple[Survey, Plan]:
        """Of the others than those that are `leaving`."""
        owned = await self.world.owned_by(node)
        unknown = sorted(set(request.exclude) - {*owned, *leaving})
        if unknown:
            raise NotFoundError(f"exclude: no domain {', '.join(unknown)} runs on node {node}")
        names = [name for name in owned if name not in {*request.exclude, *leaving}]
        places = neighbours.promised(await self._records.list_drains(), names)
        places |= departures.places(leaving)
        survey = await self.world.survey(
            {node: names}, sample_s=sample_s, closed=(node,), places=places
        )
        domains = with_policy(survey.domains, node, request.policy)
        survey = survey.experienced(*await self._experience(Operation.DRAIN))
        survey = msgspec.structs.replace(survey, domains=domains)
        options: PlanOptions = survey.options(parallel=request.parallel)
        return survey, await self.world.plan(survey, names, options)

    async def _experience(self, operation: Operation) -> tuple[float | None, float | None]:
        """By earlier drains: what a move takes beside its transfer, and what a stop takes."""
        drains, now = await self._records.list_drains(), self._clock()
        stop_s = experience.stop_s(drains, operation, now)
        return experience.overhead_s(drains, now), stop_s

    def _made(
        self,
        id: str,
        operation: Operation,
        node: str,
        survey: Survey,
        plan: Plan,
        request: DrainRequest | None,
    ) -> Drain:
        now = self._clock()
        request, options = request or DrainRequest(), survey.options()
        return Drain(
            id=id,
            operation=operation,
            node=node,
            state=DrainState.RUNNING,
            created_at_s=now,
            started_at_s=now,
            at_s=now,
            written_at_s=now,
            coordinator=self.node,
            term=1,
            moves=moves_of(plan, {each.name: each.priority for each in survey.domains}),
            parallel=request.parallel or plan.parallel,
            lanes=dict(plan.lanes),
            links=survey.shares(PlanOptions()),
            planned_s=plan.makespan_s,
            lower_bound_s=plan.lower_bound_s,
            overhead_s=options.setup_s + options.finish_s + options.late_s,
            timeout_s=timeout_of(plan.makespan_s, request.timeout_s),
            exclude=request.exclude,
            reboot_hint=request.reboot_hint,
        )

    async def _must_exist(self, node: NodeName) -> None:
        views = await self.world.views()
        if node not in views:
            known = ", ".join(sorted(views)) or "none"
            raise NotFoundError(f"there is no node {node}; known: {known}")

    async def _must_speak(self, node: NodeName, because: str = _FROM_OUTSIDE) -> None:
        await self._must_exist(node)
        view = (await self.world.views()).get(node)
        if view is not None and view.state is NodeState.UNREACHABLE:
            if self.world.trouble:  # Of the agent that was asked: then all seem to be silent.
                raise StoreError(f"{self.node} can't write to the store: {self.world.trouble}")
            raise ConflictError(f"node {node} is unreachable{not_yet(view)}: {because}")

    async def _refuse_second(self, node: NodeName) -> None:
        for drain in await self._records.list_drains():
            if drain.node == node and not drain.ended:
                raise ConflictError(
                    f"{drain.operation} {drain.id} of node {node} is under way: wait for it "
                    f"(`ferry drains watch {drain.id}`), or stop it (`ferry drains cancel "
                    f"{drain.id}`)"
                )

    @contextlib.contextmanager
    def _planned(self) -> Iterator[str]:
        """The name of a new drain, which this agent is known to be planning meanwhile."""
        name = secrets.token_hex(6)
        self._planning.add(name)
        try:
            yield name
        finally:
            self._planning.discard(name)

    def plans(self, name: str) -> bool:
        """Whether this agent is at that drain, planned or under way."""
        return name in self._planning or name in self._running

    def coordinates(self, name: str) -> bool:
        """Whether this agent coordinates that drain."""
        return name in self._running

    def begin(self, entry: Versioned[Drain]) -> None:
        """Coordinate a drain whose record names this agent."""
        name = entry.value.id
        if name in self._running:
            return
        task = asyncio.create_task(self._coordinate(entry), name=f"drain-{name}")
        self._running[name] = task
        task.add_done_callback(lambda _: self._running.pop(name, None))

    async def _coordinate(self, entry: Versioned[Drain]) -> None:
        coordinator = Coordinator(
            entry,
            records=self._records,
            world=self.world,
            events=self.events,
            hooks=self._hooks,
            settle=self.cordons.settle,
            drains=self._watch.drains,
            clock=self._clock,
        )
        self._coordinators[entry.value.id] = coordinator
        try:
            await coordinator.run()
        except LostError as error:
            log.warning("%s", error)
        except FerryError as error:
            log.error("drain %s: %s; it will be taken over", entry.value.id, error)
        except Exception:
            log.exception("drain %s: its coordinator failed", entry.value.id)
        finally:
            self._coordinators.pop(entry.value.id, None)
