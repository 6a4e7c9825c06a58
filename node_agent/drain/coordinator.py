"""Carries one drain out: saves what its machine decides, then performs it.

    event ─► machine ─► record saved (compare-and-set) ─► commands performed, each in a task
      ▲                                                          │
      └───────────────────── what came of it ◄───────────────────┘

The record is written at least once a second, which is the coordinator's heartbeat. Nothing is done
that isn't in the record first; so whoever takes over knows what may have been done.

A drain's time is its own (`Drain.at_s`): a clock that is set, or another coordinator's that
differs, neither ends its time nor prolongs a wait. While nobody coordinates it, it stands still;
how long that was is kept beside it (`Drain.unattended_s`), to be told with how long the whole took.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, Final

import msgspec

from migrator.errors import ConflictError, FerryError, PeerError, RefusedError, StoreError
from migrator.model import DomainName, NodeName, NodeState, OnTimeout
from node_agent.drain import neighbours, outlook
from node_agent.drain import vocabulary as v
from node_agent.drain.hearing import Hearing
from node_agent.drain.hooks import NodeHooks
from node_agent.drain.machine import DrainMachine
from node_agent.drain.mishaps import after_error
from node_agent.drain.records import DrainRecords, LostError
from node_agent.drain.resources import STOP_S, CancelMode, Drain
from node_agent.drain.world import DrainWorld
from node_agent.events import EventKind, EventLog
from node_agent.hooks.model import HookPoint
from node_agent.migrations.checks import said_of_destination
from node_agent.nodes import LISTENS_ANEW, NodeView
from node_agent.resources import MigrationCreate
from node_agent.state.typed import Versioned

log = logging.getLogger(__name__)

TICK_S: Final = 0.5
SAVE_S: Final = 1.0
POLL_S: Final = 0.15
LOOK_S: Final = 5.0
"""How often a migration that doesn't change is held against the ownership record."""
RETRY_S: Final = 1.0
HOOK_S: Final = 3600.0
MOVE_S: Final = 600.0
MOVE_S_MIN: Final = 30.0
MOVE_S_MAX: Final = 86_400.0
_EVENTS_MAX: Final = 10_000


class Coordinator:
    """See the module. `run` once; cancelling it leaves the record to the next coordinator."""

    def __init__(
        self,
        entry: Versioned[Drain],
        *,
        records: DrainRecords,
        world: DrainWorld,
        events: EventLog,
        hooks: NodeHooks,
        settle: Callable[[Drain, NodeState], Awaitable[None]],
        drains: Callable[[], Iterable[Drain]] = tuple,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`settle` sets the cordon of the drain's node. `drains`: all, as last heard of."""
        self._drains = drains
        self._machine = DrainMachine(entry.value)
        self._revision = entry.revision
        self._records = records
        self._world = world
        self._events = events
        self._hooks = hooks
        self._settle = settle
        self._clock = clock
        self._began_s = entry.value.at_s or clock()
        self._began_at: float | None = None
        """By the event loop's monotonic clock."""
        self._heard: asyncio.Queue[v.Event] = asyncio.Queue(_EVENTS_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._followed: dict[str, asyncio.Task[None]] = {}
        self._saved_changes = -1
        self._saved_at = 0.0
        self._beat = entry.value.beat
        self._saved = entry.value
        self._unsaved = ""
        """Why what it has decided can't be written down now."""
        self._hearing = Hearing()
        self._blind = ""
        """Why it doesn't know which nodes are silent, and what other drains do: a bug."""

    @property
    def drain(self) -> Drain:
        """As it is at this moment."""
        return msgspec.structs.replace(self._machine.drain, at_s=self.now_s)

    @property
    def shown(self) -> Drain:
        """The same, with what is left, and what it waits for."""
        drain = self.drain
        blind = "" if drain.ended else self._blind
        found = (self._machine.waits_for(drain.at_s), self._unsaved, blind)
        waits_for = "; ".join(each for each in found if each)
        left_s = outlook.left_s(drain, drain.at_s)
        return msgspec.structs.replace(drain, left_s=left_s, waits_for=waits_for)

    @property
    def now_s(self) -> float:
        """The drain's own time; see the module."""
        now = asyncio.get_running_loop().time()
        if self._began_at is None:
            self._began_at = now
        return self._began_s + (now - self._began_at)  # Never before it, as rounding had it.

    async def run(self) -> None:
        """Until the drain has ended. LostError: another agent has taken it over."""
        while not self.drain.ended:
            try:
                await self._go_on()
            except FerryError:
                raise
            except Exception as error:
                await self._begin_anew(error)

    async def _begin_anew(self, error: Exception) -> None:
        """From what was written down, after an error of its own; or give up."""
        log.error("drain %s: its coordinator failed", self._saved.id, exc_info=error)
        drain, text = after_error(self._saved, error, self.now_s)
        self._machine = DrainMachine(drain)
        self._heard = asyncio.Queue(_EVENTS_MAX)
        self._saved_changes = -1
        await self._save_if_due()
        self._events.emit(EventKind.DRAIN, text, drain=drain.id)
        if not drain.ended:
            await asyncio.sleep(RETRY_S)

    async def _go_on(self) -> None:
        self._hear(v.Took(unheard=(await self._looked_around()).unheard))
        if self.drain.cancel is not CancelMode.NO:
            self._hear(v.CancelAsked(mode=self.drain.cancel, by=self.drain.cancelled_by))
        ticker = asyncio.create_task(self._tick(), name=f"drain-{self.drain.id}-tick")
        self._tasks.add(ticker)
        try:
            while not self.drain.ended:
                event = await self._heard.get()
                commands = self._machine.handle(event, self.now_s)
                await self._save_if_due()
                for command in commands:
                    await self._perform(command)
        finally:
            tasks = [*self._tasks, *self._followed.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._tasks.clear()
            self._followed.clear()

    def _hear(self, event: v.Event) -> None:
        with contextlib.suppress(asyncio.QueueFull):  # Then the next tick looks again.
            self._heard.put_nowait(event)

    async def _tick(self) -> None:
        while True:
            self._hear(await self._looked_around())
            await asyncio.sleep(TICK_S)

    async def _looked_around(self) -> v.Tick:
        """Without it the drain would stand still: what fails in it is told, and it goes on."""
        try:
            tick, self._blind = await self._look_around(), ""
        except Exception as error:
            tick = v.Tick()
            self._tell_blind(error)
        return tick

    async def _look_around(self) -> v.Tick:
        views: Mapping[str, NodeView] = {}
        with contextlib.suppress(FerryError):
            views = await self._world.views()
        silent, unheard = self._hearing.look(views, asyncio.get_running_loop().time())
        others = neighbours.under_way(self._drains(), self.drain.id)
        return v.Tick(unreachable=silent, unheard=unheard, others=others)

    def _tell_blind(self, error: Exception) -> None:
        """The log has it once, however often it fails so."""
        blind = f"word of the nodes (an error inside the agent {self.drain.coordinator}: {error!r})"
        if blind != self._blind:
            log.error("drain %s: the nodes can't be looked at", self.drain.id, exc_info=error)
        self._blind = blind

    # --- the record --------------------------------------------------------------------------

    async def _save_if_due(self) -> None:
        decided = self._machine.changes != self._saved_changes
        if not decided and time.monotonic() - self._saved_at < SAVE_S:
            return
        while True:
            self._beat += 1
            drain = msgspec.structs.replace(self.shown, beat=self._beat, written_at_s=self._clock())
            try:
                self._revision, written = await self._records.save(drain, self._revision)
                self._unsaved, self._saved = "", drain
                break
            except LostError:
                raise
            except (StoreError, ConflictError) as error:
                # Until it is saved nothing may be done; the moves under way go on by themselves.
                log.warning("drain %s: %s; trying again", drain.id, error)
                self._unsaved = f"the store, to write down what is next ({error})"
                await asyncio.sleep(RETRY_S)
        self._saved_changes, self._saved_at = self._machine.changes, time.monotonic()
        if written.cancel is not drain.cancel:
            self._hear(v.CancelAsked(mode=written.cancel, by=written.cancelled_by))

    # --- commands ----------------------------------------------------------------------------

    async def _perform(self, command: v.Command) -> None:
        match command:
            case v.Tell(text=text, domain=domain):
                self._events.emit(EventKind.DRAIN, text, domain=domain, drain=self.drain.id)
            case v.SetCordon(state=state):
                await self._settled(state)
            case v.Follow(domain=domain, migration=migration):
                self._follow(domain, migration)
            case v.Begin():
                self._own(self._begin(command), command.domain)
            case v.Look():
                self._own(self._look(command), command.domain)
            case v.Seek():
                self._own(self._seek(command), command.domain)
            case v.PowerOff(domain=domain):
                self._own(self._power_off(domain), domain)
            case v.Boot():
                self._own(self._boot(command), command.domain)
            case v.Limit():
                self._own(self._limit(command), "")
            case v.CancelMigration():
                self._own(self._cancel(command), "")
            case v.Check():
                self._own(self._check(), "")
            case v.RunHook(point=point):
                self._own(self._hook(point), "")
            case _:
                raise AssertionError(f"nobody performs {command}")

    def _own(self, work: Coroutine[Any, Any, None], domain: str) -> None:
        """Run it in a task; what it doesn't expect makes its domain be looked at again."""

        async def guarded() -> None:
            try:
                await work
            except FerryError as error:
                log.warning("drain %s: %s", self.drain.id, error)
                if domain:
                    await asyncio.sleep(RETRY_S)
                    self._hear(v.Unclear(domain=domain, reason=str(error)))
            except Exception:
                log.exception("drain %s: a command failed", self.drain.id)
                if domain:
                    await asyncio.sleep(RETRY_S)
                    self._hear(v.Unclear(domain=domain, reason="an error inside the agent"))

        task = asyncio.create_task(guarded(), name=f"drain-{self.drain.id}-{domain}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # It may have been cancelled unbegun.

    async def _settled(self, state: NodeState) -> None:
        try:
            await self._settle(self.drain, state)
        except FerryError as error:  # Whoever looks at the ended drain next sets it.
            log.warning("the cordon of %s was not set: %s", self.drain.node, error)

    async def _begin(self, command: v.Begin) -> None:
        drain = self.drain
        move = next(each for each in drain.moves if each.domain == command.domain)
        owner = await self._world.owner(command.domain)
        if owner != move.source:  # It has waited for its turn; somebody may have moved it.
            self._hear(v.Looked(domain=command.domain, owner=owner))
            return
        left_s = drain.started_at_s + drain.timeout_s - self.now_s
        body = MigrationCreate(
            destination=command.destination,
            timeout_s=_time_of_move(move.planned_s, left_s),
            on_timeout=OnTimeout.CANCEL,
            bandwidth_bytes_per_s=command.bandwidth_bytes_per_s,
        )
        domain = command.domain
        try:
            migration = await self._world.cluster.migrate(DomainName(domain), body)
        except RefusedError as error:
            if any("is being migrated already" in reason for reason in error.reasons):
                self._hear(v.Unclear(domain=domain, reason=str(error)))
                return
            if any("is still held by migration" in reason for reason in error.reasons):
                await asyncio.sleep(RETRY_S)  # Which has ended: it lets go in a moment.
                self._hear(v.Unclear(domain=domain, reason=str(error)))
                return
            if any(LISTENS_ANEW in reason for reason in error.reasons):
                await asyncio.sleep(RETRY_S)
                self._hear(v.NotYet(domain=domain, reason=str(error)))
                return
            place = NodeName(command.destination)
            elsewhere = all(said_of_destination(place, reason) for reason in error.reasons)
            self._hear(v.Refused(domain=domain, reason=str(error), elsewhere=elsewhere))
            return
        self._hear(v.Accepted(domain=domain, migration=migration))
        self._follow(domain, migration.id)

    def _follow(self, domain: str, migration: str) -> None:
        if domain in self._followed:
            self._followed[domain].cancel()
        task = asyncio.create_task(
            self._watch(domain, migration), name=f"drain-{self.drain.id}-{migration}"
        )
        self._followed[domain] = task

    async def _watch(self, domain: str, migration: str) -> None:
        looked_at = time.monotonic()
        last: object = None
        while True:
            with contextlib.suppress(FerryError):
                seen = await self._world.cluster.get_migration(migration)
                if seen != last:
                    last, looked_at = seen, time.monotonic()
                    self._hear(v.Seen(domain=domain, migration=seen))
                if seen.ended:
                    return
                if time.monotonic() - looked_at > LOOK_S:  # Its source is silent, perhaps.
                    looked_at = time.monotonic()
                    owner = await self._world.owner(domain)
                    if owner is not None and owner != seen.source:
                        self._hear(v.Looked(domain=domain, owner=owner))
                        return
            await asyncio.sleep(POLL_S)

    async def _look(self, command: v.Look) -> None:
        migration = await self._world.migration_of(command.domain, command.migration)
        owner = await self._world.owner(command.domain)
        self._hear(v.Looked(domain=command.domain, owner=owner, migration=migration))

    async def _seek(self, command: v.Seek) -> None:
        domain, drain = command.domain, self.drain
        move = next(each for each in drain.moves if each.domain == domain)
        off = move.powered_off
        owner = await self._world.owner(domain)
        if owner != (None if off else drain.node):
            self._hear(v.Looked(domain=domain, owner=owner))
            return
        others = [each for each in self._drains() if each.id != drain.id]
        places = neighbours.promised((*others, drain), (domain,))
        if off:
            places[domain] = drain.node  # Else it wouldn't count as one that needs a place.
        survey = await self._world.survey(
            {drain.node: [] if off else [domain]},
            sample_s=0.0,
            closed=(drain.node,),
            places=places,
        )
        survey = survey.with_policy_of(domain, move.policy)
        if off:
            survey = survey.to_be_started(domain)
        forbidden = frozenset((domain, node) for node in command.tried)
        plan = await self._world.plan(survey, [domain], survey.options(forbidden=forbidden))
        if plan.moves:
            found = plan.moves[0]
            place, sent = found.destination, found.wire_bytes
            self._hear(v.Found(domain=domain, destination=place, wire_bytes=sent))
        else:
            reason = plan.blockers[0].reason if plan.blockers else "no node can take it"
            self._hear(v.NoPlace(domain=domain, reason=reason))

    async def _power_off(self, domain: str) -> None:
        if await self._world.owner(domain) is None:
            self._hear(v.PoweredOff(domain=domain))
            return
        try:
            stopped = await self._world.cluster.power_off(DomainName(domain), STOP_S)
        except PeerError:
            raise
        except FerryError as error:
            self._hear(v.Failed(domain=domain, error=str(error)))
            return
        self._hear(v.PoweredOff(domain=domain, forced=stopped.forced))

    async def _boot(self, command: v.Boot) -> None:
        try:
            await self._world.cluster.start(DomainName(command.domain), NodeName(command.node))
        except PeerError:
            raise
        except FerryError as error:
            self._hear(v.Failed(domain=command.domain, error=str(error), node=command.node))
            return
        self._hear(v.Booted(domain=command.domain, node=command.node))

    async def _limit(self, command: v.Limit) -> None:
        with contextlib.suppress(ConflictError):  # It has ended.
            await self._world.cluster.limit_migration(
                command.migration, command.bandwidth_bytes_per_s
            )

    async def _cancel(self, command: v.CancelMigration) -> None:
        drain = self.drain
        node = f" of {drain.node}" if drain.node else ""
        by = f"{drain.operation} {drain.id}{node}, {command.because}"
        with contextlib.suppress(ConflictError):  # Too late: then it completes.
            await self._world.cluster.cancel_migration(command.migration, by)

    async def _check(self) -> None:
        node = self.drain.node
        try:
            incoming = await self._world.incoming(node)  # First: it may have arrived just then.
            owned = await self._world.owned_by(node)
            processes = await self._world.processes(node)
            view = (await self._world.views()).get(node)
        except FerryError as error:
            self._hear(v.CheckFailed(reason=str(error)))
            return
        boot_id = "" if view is None else view.info.boot_id
        self._hear(v.Checked(owned=owned, processes=processes, incoming=incoming, boot_id=boot_id))

    async def _hook(self, point: HookPoint) -> None:
        error: str | None = None
        try:
            async with asyncio.timeout(HOOK_S):
                await self._hooks.run(point, self.drain.node)
        except FerryError as failure:
            error = str(failure)
        except TimeoutError:
            error = f"no answer within {HOOK_S:g} s"
        self._hear(v.HookDone(point=point, error=error))


def _time_of_move(planned_s: float, left_s: float) -> float:
    """After which a migration doesn't wait for convergence any more, and goes on by post-copy.

    `left_s`: of the drain. A large guest has its time all the same: three times what is planned.
    """
    return min(max(min(MOVE_S, left_s), MOVE_S_MIN, 3.0 * planned_s), MOVE_S_MAX)
