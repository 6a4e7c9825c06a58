"""What each command of a session does in the simulated world, when, and what its side hears of it.

The record, the volumes and the processes are reached through the agent's production code
(`StoreOwnership`, `NodeSite`), in the lanes that the production runner uses. The rest goes to the
hypervisor's monitor or to the engine: a command has its effect some time after it was given, also
if its agent died meanwhile, and what was given first happens first. The monitor is one lane for the
life of its process: a restarted agent's commands queue behind those of the dead one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrator.errors import FerryError, RefusedError
from migrator.model import FencingToken, PassKind, PassReport, Role
from migrator.ports import AbortOutcome, DomainEventKind
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from migrator.session.source import SourceSession
from tests.simulation import post_copy, stand_ins
from tests.simulation.checkers import memory, writes
from tests.simulation.guests import CONDITIONS, PAGES, G, Guest
from tests.simulation.world import HANG_S, STALL_S

if TYPE_CHECKING:
    from tests.simulation.agent import Agent
    from tests.simulation.side import NodeSession, Side

_K = DomainEventKind
TIMEOUT_S = 1.0
"""Of the monitor's commands: then CommandFailed is heard, and the effect comes all the same."""
STEP_S = 10.0
"""Of what goes through the agent's own code."""
SLOW_S = 1.5
"""That the device state may be on its way, on a stalled channel."""
_ENGINE = (v.StartEngine, v.ConnectEngine, v.RunPass, v.EndPass, v.StopEngine)


def begin(side: Side, command: v.Command) -> None:
    """Give `command`: schedule its effect, and what the side hears."""
    agent, session = side.node.agent, side.session
    assert agent is not None
    assert session is not None
    match command:
        case v.SwapRecord() | v.ReadRecord():
            side.record_lane.put(_step(side, command, partial(_on_record, side, agent, command)))
        case v.AskLeave():
            agent.spawn(_ask_leave(side, agent, command.part))
        case v.PrepareIncoming():
            side.guest_lane.put(
                _step(side, command, partial(_prepare_incoming, side, session, agent))
            )
        case v.Fence():
            side.fence_token = command.token
            side.guest_lane.put(
                _step(side, command, partial(_fence, session, agent, command.token))
            )
        case v.DestroyGuest():
            side.guest_lane.clear()
            side.guest_lane.put(_step(side, command, partial(_destroy, session, agent)))
        case v.AbortSwitchover():
            side.guest_lane.clear()
            _give(side, command)
        case _:
            _give(side, command)


# --- through the agent's own code ---


async def _step(
    side: Side, command: v.Command, work: Callable[[], Coroutine[Any, Any, v.Event]]
) -> None:
    """As the runner's: its failure is an event."""
    session, kind = side.session, type(command)
    event: v.Event
    try:
        async with asyncio.timeout(STEP_S):
            event = await work()
    except RefusedError as error:
        event = v.CommandFailed(command=kind.__name__, error=str(error), reasons=error.reasons)
    except (FerryError, TimeoutError) as error:
        event = _failed(kind, str(error) or "timeout")
    except Exception as error:
        side.world.loop.failures.append(error)
        raise
    try:
        if side.session is session:
            side.feed(event)
    except Exception as error:  # The lane would only note it.
        side.world.loop.failures.append(error)
        raise


async def _on_record(side: Side, agent: Agent, command: v.SwapRecord | v.ReadRecord) -> v.Event:
    try:
        if isinstance(command, v.SwapRecord):
            won = await agent.ownership.compare_and_set(command.expected, command.new)
            return v.RecordSwapped(won=won)
        return v.RecordRead(known=True, record=await agent.ownership.read(side.domain.name))
    except FerryError:
        if isinstance(command, v.SwapRecord):
            return v.RecordSwapped(won=None)
        return v.RecordRead(known=False)


async def _ask_leave(side: Side, agent: Agent, part: v.LeavePart) -> None:
    """Hooks take their time, and it waits for the store; the session's timers bound it."""
    session = side.session
    assert isinstance(session, SourceSession)
    if side.world.chance(side.world.faults.stall):
        await agent.trip(SLOW_S)
    event: v.Event
    try:
        event = v.LeaveGiven(detail=await agent.site.leave(session, part))
    except FerryError as error:
        event = v.LeaveRefused(reason=str(error))
    if side.session is session:
        side.feed(event)


async def _prepare_incoming(side: Side, session: NodeSession, agent: Agent) -> v.Event:
    assert isinstance(session, DestinationSession)

    def begin_early() -> None:
        if side.session is session:
            side.feed(v.IncomingReady(early=True))

    await agent.site.prepare_incoming(session, Path("/simulated"), begin_early)
    return v.IncomingReady()


async def _fence(session: NodeSession, agent: Agent, token: int) -> v.Event:
    await agent.site.fence(session, FencingToken(token))
    return v.Fenced(token=token)


async def _destroy(session: NodeSession, agent: Agent) -> v.Event:
    await agent.site.destroy(session)
    await agent.site.release(session)
    return v.GuestDestroyed()


# --- to the monitor and the engine ---


def _give(side: Side, command: v.Command) -> None:
    world, guest = side.world, side.guest
    kind = type(command)
    engine = isinstance(command, _ENGINE)
    hang_s = 0.0 if engine or not world.chance(world.faults.hang) else world.delay(HANG_S)
    due_s = world.now_s + 0.0002 + world.delay(0.003) + hang_s
    if engine:
        due_s = side.engine_due_s = max(due_s, side.engine_due_s)
    elif guest is not None:
        due_s = guest.monitor_due_s = max(due_s, guest.monitor_due_s)
    late = due_s - world.now_s > TIMEOUT_S
    if late:
        side.soon_at(_failed(kind, "timeout"), world.now_s + TIMEOUT_S)
    failing = _fails(side, command)
    session = side.session
    effect = _effect(side, guest, command)

    def act() -> None:
        alive = side.session is session
        if engine and not alive:
            return
        happens = not failing or world.random.random() < 0.5
        events = effect() if happens else []
        if late or not alive:
            return
        if failing:
            side.soon(_failed(kind, "simulated"))
            return
        for event in events:
            side.soon(event)

    world.after(due_s - world.now_s, act)


def _failed(kind: type[object], error: str, *, without_effect: bool = False) -> v.CommandFailed:
    return v.CommandFailed(command=kind.__name__, error=error, without_effect=without_effect)


def _fails(side: Side, command: v.Command) -> bool:
    faults = side.world.faults
    match command:
        case v.StopEngine() | v.EndPass():
            return False
        case v.ResumeGuest():
            return side.world.chance(max(faults.resume_failure, faults.command_failure))
        case _:
            return side.world.chance(faults.command_failure)


def _effect(side: Side, guest: Guest | None, command: v.Command) -> Callable[[], list[v.Event]]:
    """What `command` will do; bound to what it was given to, e.g. to the hypervisor process."""
    match command:
        case v.StartEngine():
            return partial(_start_engine, side, command)
        case v.ConnectEngine():
            return partial(_connect_engine, side, command)
        case v.StopEngine():
            return partial(_stop_engine, side)
        case v.RunPass():
            return partial(_run_pass, side, command)
        case v.EndPass():
            return partial(_end_pass, side, command)
        case v.ResumeGuest():
            return partial(_resume, side, guest, side.fence_token)
        case v.BeginSwitchover():
            return partial(_begin_switchover, side, guest)
        case v.ContinueSwitchover():
            return partial(_continue_switchover, side, guest)
        case v.AbortSwitchover():
            return partial(_abort, side, guest)
        case v.InspectGuest():
            return partial(_inspect, side)
        case v.PrepareSwitchover() | v.PullPages():
            return list
        case _:
            raise AssertionError(f"the simulation doesn't know {command}")


# --- engines ---


def _start_engine(side: Side, command: v.StartEngine) -> list[v.Event]:
    destination = side.session is not None and side.session.role is Role.DESTINATION
    if command.post_copy and destination:
        return post_copy.start_successor(side)
    side.served = None  # Whatever an earlier engine had open goes with it.
    side.engine_serial += 1
    side.engine = side.engine_serial
    return [post_copy.listening(side)] if destination else []


def _connect_engine(side: Side, command: v.ConnectEngine) -> list[v.Event]:
    if command.post_copy:
        return post_copy.connect_successor(side, command)
    guest = side.guest
    if guest is None or not (side.engine and side.other.engine):
        return [v.EngineLost(reason="can't connect")]
    side.pending = set(range(PAGES))
    guest.dirty.clear()  # The dirty log begins.
    side.linked, side.served = side.other.engine, guest
    return [v.EngineConnected(pages_in_use=PAGES, round_trip_ms=0.1)]


def _stop_engine(side: Side) -> list[v.Event]:
    side.kill_engine("stopped", told=False)
    return []


def _run_pass(side: Side, command: v.RunPass) -> list[v.Event]:
    """Half of the pages now, half at the end; what is dirtied meanwhile waits for the next pass."""
    if command.kind in (PassKind.STALE, PassKind.MISSING):
        post_copy.tell_missing(side, command)
        return []
    world = side.world
    source, there = side.guest, stand_ins.memory_of(side.other)
    engines = (side.engine, side.other.engine)
    if not all(engines) or source is None or there is None:
        return []
    if command.kind is PassKind.FINAL:
        side.pending |= source.dirty
        source.dirty.clear()
    wanted = sorted(side.pending)
    seconds = 0.002 + world.delay(0.02)
    stalled_s = world.delay(STALL_S) if world.chance(world.faults.stall) else 0.0

    def copy(pages: list[int]) -> None:
        for page in pages:
            there[page] = source.memory[page]

    def finish(*, whole: bool = True) -> None:
        if (side.engine, side.other.engine) != engines or side.running_pass is not running:
            return
        if not side.pages_flow:
            world.after(0.2, partial(finish, whole=whole))
            return
        side.running_pass = None
        rest = wanted[len(wanted) // 2 :]
        if whole:
            copy(rest)
        side.pending = set(source.dirty) | (set() if whole else set(rest))
        source.dirty.clear()
        swollen = world.random.randrange(500, 5000) if world.faults.diverging else 0
        report = PassReport(
            number=command.number,
            kind=command.kind,
            seconds=seconds,
            pages=len(wanted),
            bytes_sent=len(wanted) * 4096,
            pending_pages=len(side.pending) + swollen,
            cut_pages=0 if whole else len(rest),
        )
        side.soon(v.PassFinished(report=report))

    running = side.running_pass = (command.number, finish)
    copy(wanted[: len(wanted) // 2])
    world.after(seconds + stalled_s, finish)
    return []


def _end_pass(side: Side, command: v.EndPass) -> list[v.Event]:
    """What isn't copied yet stays pending."""
    number, finish = side.running_pass or (0, None)
    if finish is not None and number == command.number:
        finish(whole=False)
    return []


# --- hypervisors ---


def _inspect(side: Side) -> list[v.Event]:
    guest = side.guest
    condition = v.GuestCondition.GONE if guest is None else CONDITIONS[guest.state]
    return [v.GuestInspected(condition=condition)]


def _gone(side: Side, guest: Guest | None) -> bool:
    return guest is None or side.guest is not guest


def _resume(side: Side, guest: Guest | None, token: int) -> list[v.Event]:
    if side.world.chance(side.world.faults.death_before_resume):
        side.node.kill_guest(side.domain, "right before cont")
    if guest is None or _gone(side, guest):
        return [_failed(v.ResumeGuest, "no such domain", without_effect=True)]
    if guest.state is not G.RUNNING:
        if guest.state is G.PRE_SWITCHOVER or guest.state is G.SENDING:
            return [_failed(v.ResumeGuest, "not finalized", without_effect=True)]
        token = max(token, guest.token)
        side.world.log("{}: cont under token {}", side.name, token)
        if not guest.deposed:  # Else its agent was stopped: it computes until that is seen.
            memory.check_resume(side.domain, guest)
        guest.token = token
        if not guest.deposed:
            writes.check_start(side.domain, guest)
        side.domain.set_running(guest)
    return [v.GuestResumed(at_s=side.node.clock_s)]


def _begin_switchover(side: Side, guest: Guest | None) -> list[v.Event]:
    if guest is None or _gone(side, guest) or guest.state is not G.RUNNING or not side.engine:
        return [_failed(v.BeginSwitchover, "refused")]
    guest.begun = True

    def pause() -> None:
        if _gone(side, guest) or not guest.begun or guest.state is not G.RUNNING:
            return
        guest.begun = False
        guest.state = G.PRE_SWITCHOVER
        side.node.guest_event(side.domain, guest, _K.PAUSED)
        side.node.guest_event(side.domain, guest, _K.PRE_SWITCHOVER)

    side.world.after(side.world.delay(0.004), pause)
    return []


def _continue_switchover(side: Side, guest: Guest | None) -> list[v.Event]:
    """The device state goes out. When it is out, and when it is loaded: in any order."""
    world = side.world
    if guest is None or _gone(side, guest) or guest.state is not G.PRE_SWITCHOVER:
        return [_failed(v.ContinueSwitchover, "not in pre-switchover")]
    guest.state = G.SENDING
    side.domain.paused_memory = list(guest.memory)
    epoch = guest.epoch
    engines = (side.engine, side.other.engine)
    destination = side.other.guest

    def sent() -> None:
        if _gone(side, guest) or guest.state is not G.SENDING:
            return
        guest.state = G.POSTMIGRATE
        side.node.guest_event(side.domain, guest, _K.DEVICE_STATE_SENT)

    def loaded() -> None:
        if destination is None or _gone(side.other, destination):
            return
        whole = side.other.engine == engines[1] or destination.fed
        if destination.state is G.INCOMING and whole:
            destination.state = G.LOADED
            destination.epoch = epoch
            side.other.node.guest_event(side.domain, destination, _K.DEVICE_STATE_LOADED)

    slow_s = world.delay(SLOW_S) if world.chance(world.faults.stall) else 0.0
    world.after(0.0005 + world.delay(0.004) + slow_s, sent)
    if all(engines):
        world.after(0.0005 + world.delay(0.004 + slow_s), loaded)
    return []


def channel_broke(side: Side, guest: Guest) -> None:
    """The device channel of `guest` is cut: what its hypervisor does then (FACTS.md)."""
    if guest.state is G.PRE_SWITCHOVER or (guest.state is G.RUNNING and guest.begun):
        _resume_by_itself(side, guest)
    elif guest.state is G.SENDING:
        _settle(side, guest)
    elif guest.state is G.INCOMING:
        _lose_stream(side, guest)


def _lose_stream(side: Side, guest: Guest) -> None:
    """A destination loads what it was given, if that was all of it. It may need longer to notice
    that it wasn't than anybody waits."""
    chance, source = side.world.random.random(), side.other.guest
    if chance < 0.5:
        side.node.kill_guest(side.domain, "device channel broke")
    elif chance < 0.75:
        guest.fed = source is None or source.state is G.POSTMIGRATE


def _settle(side: Side, guest: Guest) -> None:
    """Sending, and broken off: by then it was all out, or it wasn't."""
    if side.world.random.random() < 0.5:
        guest.state = G.POSTMIGRATE
        side.node.guest_event(side.domain, guest, _K.DEVICE_STATE_SENT)
    else:
        _resume_by_itself(side, guest)


def _resume_by_itself(side: Side, guest: Guest) -> None:
    paused = guest.state is not G.RUNNING
    guest.begun = False
    if paused:
        side.world.log("{}: the source resumes by itself", side.node.name)
        side.domain.set_running(guest)
    side.node.guest_event(side.domain, guest, _K.MIGRATION_FAILED)
    if paused:
        side.node.guest_event(side.domain, guest, _K.RESUMED)


def _abort(side: Side, guest: Guest | None) -> list[v.Event]:
    if guest is None or _gone(side, guest):
        return [v.SwitchoverAborted(outcome=AbortOutcome.GONE)]
    if guest.state is G.SENDING:
        _settle(side, guest)
    elif guest.state is G.PRE_SWITCHOVER or guest.begun:
        _resume_by_itself(side, guest)
    sent = guest.state is G.POSTMIGRATE
    return [v.SwitchoverAborted(outcome=AbortOutcome.SENT if sent else AbortOutcome.RESUMED)]
