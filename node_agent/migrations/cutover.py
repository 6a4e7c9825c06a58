"""The network's part of a migration: both nodes' fabrics in step, and proof that it has worked.

    source                                        destination
      │ (setup) the tunnel's end                    (setup) port closed, the tunnel's end
      │ ◄────── test frames by it? ──────────────── whether they came   (`tunnel_trial`)
      │ connections of stateful rules ──────────────► known there (`connections`)
      │ expect ─────────────────────────────────────► port open, frames for the guest wait in it
      │ divert: frames for the guest take the tunnel, if it passes any
      │ pause; the port is shut
      │                                              resume: announcement, in the same turn
      │◄──────────────────────────────────── probe   and other nodes: where do you find it?
      │ answers ────────────────────────────────────► again, with growing gaps, until verified
      │◄────────────────────────────────── outcome   into the migration's record
      │ (grace time) counts, tunnel's end goes       tunnel's end goes

Nothing here fails a migration, or holds it up for more than a moment: what can't be done becomes a
`problem` in its record. The guest's resume is heard from the hypervisor itself, before the session
hears of it, so that the first announcement doesn't wait for anybody's turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from migrator.errors import FerryError, WrongStateError
from migrator.model import Cutover, DomainName, NodeName
from migrator.ports import (
    ConnectionTracker,
    DomainEvent,
    DomainEventKind,
    FabricDriver,
    FirstFrames,
    HypervisorDriver,
    Struct,
    Tunnel,
)
from node_agent.background import Asides
from node_agent.cluster_calls import Done
from node_agent.events import EventKind, EventLog
from node_agent.migrations.connections import ConnectionMover
from node_agent.migrations.cutover_moves import Arriving, Leaving, Since
from node_agent.migrations.cutover_records import CutoverRecords, seen_by, with_first
from node_agent.migrations.cutover_settings import CutoverSettings
from node_agent.migrations.judgement import is_verified, suspects, to_prove, with_learnt
from node_agent.migrations.late_cutover import LateCutover
from node_agent.migrations.publisher import Publisher
from node_agent.migrations.tunnel_trial import Trial, TunnelTrial, TunnelTrials, closed, complaint
from node_agent.migrations.witnesses import Move, Witnesses
from node_agent.nodes import NodeRegistry
from node_agent.peers.hub import PeerHub

log = logging.getLogger(__name__)

EXPECT: Final = "network.expect"
OUTCOME: Final = "network.outcome"

EXPECT_S: Final = 0.5
"""The pause waits for the destination's port, but not longer."""
PREPARE_S: Final = 3.0
PROBE_GAPS_S: Final = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
PROBE_S: Final = 0.1
"""One question's wait for its answers, the first time; it doubles."""
PROBE_LONGEST_S: Final = 0.4
FIRST_FRAMES_S: Final = 0.1
"""Longer than the verification, a quiet guest's first frames aren't waited for."""
STANDS_STILL: Final = "the guest stands still, and answers nobody: `ferry domain show` says why"
_CALL_S: Final = 2.0
_CLOSE_S: Final = 3.0


class ExpectParams(Struct, frozen=True, kw_only=True):
    migration_id: str
    domain: DomainName
    learnt: tuple[tuple[str, ...], ...] = ()
    """The addresses that each NIC was seen to use."""


class Expected(Struct, frozen=True, kw_only=True):
    tunnels: tuple[TunnelTrial, ...] = ()
    """NIC by NIC; nothing: it isn't known."""


class OutcomeParams(Struct, frozen=True, kw_only=True):
    migration_id: str
    cutover: Cutover
    late: bool = False
    """It was verified after all, long after the migration's end."""


class CutoverService:
    """See the module. `register` before the hub starts; `close` ends its tasks, not the tunnels."""

    def __init__(
        self,
        node: NodeName,
        *,
        hub: PeerHub,
        hypervisor: HypervisorDriver,
        fabric: FabricDriver,
        tracker: ConnectionTracker,
        nodes: NodeRegistry,
        events: EventLog,
        publisher: Publisher,
        settings: CutoverSettings | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.node = node
        self._hub = hub
        self._fabric = fabric
        self._nodes = nodes
        self._witnesses = Witnesses(node, hub=hub, fabric=fabric, nodes=nodes)
        self._late = LateCutover(fabric, self._witnesses, events)
        self._connections = ConnectionMover(
            node, hub=hub, fabric=fabric, tracker=tracker, events=events, expected=self._expected
        )
        self._trials = TunnelTrials(hub, fabric, departing=self._departing)
        self._events = events
        self._records = CutoverRecords(publisher)
        self._settings = settings or CutoverSettings()
        self._clock = clock
        self._leaving: dict[DomainName, Leaving] = {}
        self._left: dict[DomainName, Move] = {}
        """The last that each has gone from here by."""
        self._arriving: dict[DomainName, Arriving] = {}
        self._asides = Asides(log)
        self._unsubscribe = hypervisor.subscribe(self._on_domain_event)

    def register(self) -> None:
        """Serve the other nodes' calls."""
        self._hub.handle(EXPECT, ExpectParams, self._on_expect)
        self._witnesses.register()
        self._connections.register()
        self._trials.register()
        self._hub.handle(OUTCOME, OutcomeParams, self._on_outcome)

    async def close(self) -> None:
        """End the tasks. Tunnels that are left are removed by the next agent's start."""
        self._unsubscribe()
        watching = [each.watching for each in self._arriving.values() if each.watching is not None]
        tasks = {*self._asides.tasks, *watching}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_S)

    # --- the source --------------------------------------------------------------------------

    async def prepare_departure(self, move: Move) -> None:
        """While the guest runs. Bounded; never fails."""
        self._late.forget(move.domain)
        arrived = self._arriving.pop(move.domain, None)
        leaving = self._leaving[move.domain] = Leaving(move, arrived)
        try:
            async with asyncio.timeout(PREPARE_S):
                tunnel = await self._tunnel(move.migration_id, move.destination)
                leaving.tunnel = tunnel
                await self._fabric.prepare_departure(move.domain, move.nics, tunnel)
        except (FerryError, TimeoutError) as error:
            self._problem(leaving.problems, move, f"frames won't be forwarded: {error}")

    async def depart(self, move: Move) -> None:
        """Just before the pause. Bounded by TELL_S, EXPECT_S and the kernel; never fails."""
        leaving = self._leaving.get(move.domain)
        if leaving is None or leaving.move.migration_id != move.migration_id or not move.nics:
            return
        learnt = tuple(self._fabric.learnt(move.domain, move.nics))
        problem = await self._connections.tell(move, learnt)
        if problem is not None:
            self._problem(leaving.problems, move, problem)
        params = ExpectParams(migration_id=move.migration_id, domain=move.domain, learnt=learnt)
        try:
            known = await self._hub.call(
                move.destination, EXPECT, params, Expected, timeout_s=EXPECT_S
            )
            leaving.expected = True
            await self._fabric.divert(move.domain, closed(known.tunnels))
        except FerryError as error:
            self._problem(leaving.problems, move, f"nothing was forwarded: {error}")
        else:
            self._complain_of_tunnels(leaving, known.tunnels)

    def _complain_of_tunnels(self, leaving: Leaving, trials: Sequence[TunnelTrial]) -> None:
        move, tunnel = leaving.move, leaving.tunnel
        text = complaint(move, trials, tunnel) if tunnel is not None else None
        if text is not None:
            self._problem(leaving.problems, move, text)
            self._events.emit(
                EventKind.FRAMES_NOT_FORWARDED,
                f"domain {move.domain} moves to {move.destination}: {text}",
                domain=move.domain,
                migration=move.migration_id,
            )

    async def stays(self, move: Move) -> None:
        """The guest goes on running here. Idempotent, also after a restart; never fails."""
        leaving = self._leaving.pop(move.domain, None)
        if leaving is not None:
            leaving.stays()
        self._connections.stays(move.domain)
        try:
            await self._fabric.reopen(move.domain, move.nics)
        except FerryError as error:
            log.error("domain %s: its ports can't be opened again: %s", move.domain, error)

    def left(self, move: Move) -> None:
        """The guest runs elsewhere and the migration's end is published: forward for a while."""
        leaving = self._leaving.pop(move.domain, None)
        if leaving is not None:
            leaving.paused()  # Where that wasn't heard.
        self._left[move.domain] = move
        self._asides.add(self._forward(move, leaving))

    async def _forward(self, move: Move, leaving: Leaving | None) -> None:
        record = self._records.of(move.migration_id)
        record.published = True
        record.connections = self._connections.figures(move.domain)
        record.problems = tuple(leaving.problems) if leaving is not None else ()
        try:
            await self._note(move)
            await asyncio.sleep(self._settings.grace_s)
            if self._is_over(move):
                record.forwarded = await self._fabric.end_departure(move.domain)
                record.connections = self._connections.figures(move.domain)
                if self._is_over(move):  # That may have taken a while.
                    await self._connections.left(move.domain)
                await self._note(move)
            await asyncio.sleep(self._settings.verify_limit_s + _CALL_S)  # It may yet be told.
        finally:
            if self._left.get(move.domain) is move:
                del self._left[move.domain]
            self._records.forget(move.migration_id)

    async def _note(self, move: Move) -> None:
        """What the store doesn't take keeps no tunnel up."""
        try:
            await self._records.amend(move.migration_id)
        except FerryError as error:
            log.warning("migration %s: its cutover is not noted: %s", move.migration_id, error)

    def _is_over(self, move: Move) -> bool:
        """The domain hasn't begun to come, or to leave, since; nor come, and left by another."""
        busy = move.domain in self._arriving or move.domain in self._leaving
        return not busy and self._left.get(move.domain) is move

    async def _on_outcome(self, _: NodeName, params: OutcomeParams) -> Done:
        if params.late:
            await self._records.verified_late(params.migration_id, params.cutover)
            return Done()
        self._records.of(params.migration_id).cutover = params.cutover
        await self._records.amend(params.migration_id)
        return Done()

    # --- the destination ---------------------------------------------------------------------

    async def prepare_arrival(self, move: Move) -> None:
        """After the taps were plugged, before the guest can run. Bounded; never fails."""
        self._late.forget(move.domain)
        arriving = self._arriving[move.domain] = Arriving(move)
        self._leaving.pop(move.domain, None)
        try:
            async with asyncio.timeout(PREPARE_S):
                tunnel = await self._tunnel(move.migration_id, move.source)
                await self._fabric.prepare_arrival(move.domain, move.nics, tunnel)
        except (FerryError, TimeoutError) as error:
            self._problem(arriving.problems, move, f"not all is ready for its frames: {error}")
        if move.nics:
            arriving.trial = Trial(move)
            self._asides.add(self._trials.run(arriving.trial))

    async def announce(self, move: Move) -> None:
        """The session's word that the guest runs here. FabricError: nothing could be sent."""
        arriving = self._arriving.setdefault(move.domain, Arriving(move))
        try:
            await self._fabric.announce(move.domain, with_learnt(move.nics, arriving.learnt))
        finally:
            self._follow(arriving)

    def gone(self, move: Move) -> None:
        """The destination's copy is destroyed."""
        arriving = self._arriving.get(move.domain)
        if arriving is not None and arriving.move.migration_id == move.migration_id:
            del self._arriving[move.domain]
            self._asides.add(self._connections.gone(move))

    def _on_domain_event(self, event: DomainEvent) -> None:
        leaving, arriving = self._leaving.get(event.domain), self._arriving.get(event.domain)
        if event.kind is DomainEventKind.PAUSED and leaving is not None:
            leaving.paused()
        if arriving is not None and event.kind in (DomainEventKind.PAUSED, DomainEventKind.RESUMED):
            arriving.stands_still = event.kind is DomainEventKind.PAUSED
        match event.kind:
            case DomainEventKind.RESUMED if arriving is not None and not arriving.resumed_at_s:
                arriving.announced_at_s = self._fabric.announce_now(event.domain)
                arriving.resumed_at_s = event.at_s
                self._watch(arriving)
            case DomainEventKind.PAUSED if leaving is not None and leaving.expected:
                self._asides.add(self._connections.rest(leaving.move))
                self._asides.add(self._fabric.shut(event.domain))
            case DomainEventKind.RESUMED if leaving is not None and leaving.expected:
                leaving.expected = False
                self._asides.add(self.stays(leaving.move))
            case DomainEventKind.EXITED:
                self._late.forget(event.domain)
                here = leaving.arrived if leaving is not None else arriving
                if here is not None:
                    here.left_early = here.left_early or "ended"
            case _:
                pass

    def _follow(self, arriving: Arriving) -> None:
        if not arriving.followed:
            arriving.followed = True
            self._asides.add(self._verify(arriving))

    async def _verify(self, arriving: Arriving) -> None:
        move, loop = arriving.move, asyncio.get_running_loop()
        started = loop.time()
        if arriving.resumed_at_s is None:  # Not heard: the agent restarted in the handoff.
            arriving.resumed_at_s = self._clock()
        watching = arriving.watching or self._watch(arriving)
        since = Since(arriving.resumed_at_s, self._clock)
        try:
            cutover = await self._ask_until_verified(arriving, since)
            if cutover.verified_ms is not None:
                await self._fabric.announce(move.domain, ())  # It is known: no more of them.
            elif not cutover.left_early:
                await self._complain(move, cutover)
            await asyncio.wait({watching}, timeout=FIRST_FRAMES_S)
            first = seen_by(watching)
        finally:
            watching.cancel()
            await asyncio.wait({watching}, timeout=_CALL_S)
        await self._report(move, with_first(cutover, first))
        await asyncio.sleep(max(0.0, self._settings.grace_s - (loop.time() - started)))
        if self._arriving.get(move.domain) is arriving:
            del self._arriving[move.domain]
            await self._fabric.end_arrival(move.domain)
            if cutover.verified_ms is None and not arriving.left_early:
                nics = to_prove(move.nics, arriving.learnt)
                found = await self._late.seek(move, nics)
                if found:
                    change = {"verified_ms": since.seconds * 1e3, "witnesses": found}
                    late = msgspec.structs.replace(cutover, **change)
                    await self._report(move, late, late=True)

    def _watch(self, arriving: Arriving) -> asyncio.Task[FirstFrames]:
        since_s, limit_s = arriving.resumed_at_s or self._clock(), self._settings.verify_limit_s
        work = self._fabric.first_frames(arriving.move.domain, since_s, limit_s)
        arriving.watching = asyncio.create_task(work)
        return arriving.watching

    async def _ask_until_verified(self, arriving: Arriving, since: Since) -> Cutover:
        move, resumed_at_s = arriving.move, arriving.resumed_at_s or self._clock()
        announced = arriving.announced_at_s
        cutover = Cutover(
            resumed_at_s=resumed_at_s,
            first_announcement_ms=None if announced is None else (announced - resumed_at_s) * 1e3,
            problems=tuple(arriving.problems),
        )
        nics = to_prove(move.nics, arriving.learnt)
        if not nics:
            return msgspec.structs.replace(cutover, verified_ms=0.0)
        others = await self._witnesses.choose(move)
        limit_s = self._settings.verify_limit_s
        for number, gap_s in enumerate(PROBE_GAPS_S):
            last_s = limit_s - since.seconds - PROBE_LONGEST_S
            await asyncio.sleep(min(gap_s, max(last_s, 0.0)))
            left_s = max(limit_s - since.seconds, 0.0)
            if arriving.left_early or (number and left_s < PROBE_S):
                break  # Nobody would answer in time, and that would look like evidence.
            timeout_s = min(PROBE_S * 2**number, PROBE_LONGEST_S, left_s)
            witnesses = await self._witnesses.ask(move.migration_id, nics, others, timeout_s)
            if arriving.left_early:
                break  # It may be its next place that was found, or none.
            cutover = msgspec.structs.replace(cutover, rounds=number + 1, witnesses=witnesses)
            if is_verified(nics, witnesses):
                return msgspec.structs.replace(cutover, verified_ms=since.seconds * 1e3)
        if arriving.left_early:
            return msgspec.structs.replace(cutover, left_early=arriving.left_early)
        suspect = STANDS_STILL if arriving.stands_still else suspects(nics, cutover.witnesses)
        return msgspec.structs.replace(cutover, suspect=suspect)

    async def _complain(self, move: Move, cutover: Cutover) -> None:
        """An event, and the announcements once more."""
        self._events.emit(
            EventKind.NETWORK_NOT_VERIFIED,
            f"domain {move.domain} runs on {move.destination}, but the network was not seen to"
            f" follow within {self._settings.verify_limit_s:g} s: {cutover.suspect}",
            domain=move.domain,
            migration=move.migration_id,
        )
        arriving = self._arriving.get(move.domain)
        if arriving is not None and arriving.move is move:  # Else it is on its way elsewhere.
            with contextlib.suppress(FerryError):
                await self._fabric.announce(move.domain, move.nics)

    async def _report(self, move: Move, cutover: Cutover, *, late: bool = False) -> None:
        params = OutcomeParams(migration_id=move.migration_id, cutover=cutover, late=late)
        try:
            await self._hub.call(move.source, OUTCOME, params, Done, timeout_s=_CALL_S)
        except FerryError as error:
            log.warning("migration %s: its cutover is not recorded: %s", move.migration_id, error)

    # --- for others --------------------------------------------------------------------------

    async def _on_expect(self, _: NodeName, params: ExpectParams) -> Expected:
        arriving = self._arriving.get(params.domain)
        if arriving is None or self._expected(params.domain) != params.migration_id:
            raise WrongStateError(f"domain {params.domain}", "not expected here", "expected")
        tunnels = await self._trials.verdict(arriving.trial)
        await self._fabric.open_arrival(params.domain, params.learnt)
        arriving.learnt = params.learnt
        return Expected(tunnels=tunnels)

    # --- inside ------------------------------------------------------------------------------

    def _departing(self, domain: DomainName) -> Move | None:
        leaving = self._leaving.get(domain)
        ready = leaving is not None and leaving.tunnel is not None and not leaving.expected
        return leaving.move if leaving is not None and ready else None

    def _expected(self, domain: DomainName) -> str | None:
        arriving = self._arriving.get(domain)
        return arriving.move.migration_id if arriving is not None else None

    async def _tunnel(self, migration_id: str, peer: NodeName) -> Tunnel:
        view = await self._nodes.get(peer)
        return Tunnel(
            name=migration_id,
            local=self._settings.address,
            remote=view.info.migration_address,
            port=self._settings.tunnel_port,
        )

    def _problem(self, problems: list[str], move: Move, text: str) -> None:
        problems.append(f"{self.node}: {text}")
        log.warning("migration %s of %s: %s", move.migration_id, move.domain, text)
