"""What each command does in the simulated world, when, and what its agent hears of it.

A command has its effect some time after it was given, also if its agent died meanwhile. Each driver
is a lane: what was given first happens first. The hypervisor's monitor is one lane for the life of
its process: a restarted agent's commands queue behind those of the dead one. The ownership store
and the volume keep no such order: what timed out there may be applied seconds later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from migrator.model import PassKind, PassReport, Role
from migrator.ports import AbortOutcome, DomainEventKind
from migrator.session import vocabulary as v
from tests.simulation import checkers, post_copy
from tests.simulation.guests import CONDITIONS, PAGES, G, Guest
from tests.simulation.world import HANG_S, STALL_S, STORE_LATE_S

if TYPE_CHECKING:
    from tests.simulation.node import Node

_K = DomainEventKind
TIMEOUT_S = 1.0
"""Of the agent's calls: then it hears CommandFailed, and the effect comes later all the same."""
_LANES: dict[type[object], str] = {
    v.SwapRecord: "record",
    v.ReadRecord: "record",
    v.Fence: "volume",
    v.StartEngine: "engine",
    v.ConnectEngine: "engine",
    v.RunPass: "engine",
    v.StopEngine: "engine",
    v.PrepareIncoming: "process",
    v.DestroyGuest: "process",
}


def begin(node: Node, command: v.Command) -> None:
    """Give `command`: schedule its effect, and what the agent hears."""
    world = node.world
    kind = type(command)
    lane = _LANES.get(kind, "monitor")
    hang_s = world.delay(HANG_S) if lane == "monitor" and world.chance(world.faults.hang) else 0.0
    due_s = world.now_s + 0.0002 + world.delay(0.003) + hang_s
    due_s = node.lanes[lane] = max(due_s, node.lanes.get(lane, 0.0))
    late = due_s - world.now_s > TIMEOUT_S
    if late:
        node.soon_at(_failed(kind, "timeout"), world.now_s + TIMEOUT_S)
    failing = _fails(node, command)
    incarnation, session = node.incarnation, node.session
    effect = _effect(node, command)

    def act() -> None:
        alive = node.up and node.incarnation == incarnation and node.session is session
        if lane == "engine" and not alive:
            return
        happens = not failing or world.random.random() < 0.5
        events = effect() if happens else []
        if late or not alive:
            return
        if failing:
            node.soon(_failed(kind, "simulated"))
            return
        for event in events:
            node.soon(event)

    world.after(due_s - world.now_s, act)


def _failed(kind: type[object], error: str, *, without_effect: bool = False) -> v.CommandFailed:
    return v.CommandFailed(command=kind.__name__, error=error, without_effect=without_effect)


def _fails(node: Node, command: v.Command) -> bool:
    faults = node.world.faults
    match command:
        case v.StopEngine() | v.SwapRecord() | v.ReadRecord():
            return False  # The first can't fail; the others have their own ways to.
        case v.Fence():
            return node.world.chance(max(faults.fence_failure, faults.command_failure))
        case v.ResumeGuest():
            return node.world.chance(max(faults.resume_failure, faults.command_failure))
        case _:
            return node.world.chance(faults.command_failure)


def _effect(node: Node, command: v.Command) -> Callable[[], list[v.Event]]:
    """What `command` will do; bound to what it was given to, e.g. to the hypervisor process."""
    guest = node.world.guests.get(node.name)
    match command:
        case v.SwapRecord():
            return partial(_swap, node, command)
        case v.ReadRecord():
            return partial(_read, node)
        case v.Fence():
            node.fence_token = command.token
            return partial(_fence, node, command.token)
        case v.StartEngine():
            return partial(_start_engine, node, command)
        case v.ConnectEngine():
            return partial(_connect_engine, node, command)
        case v.StopEngine():
            return partial(_stop_engine, node)
        case v.RunPass():
            return partial(_run_pass, node, command)
        case v.PrepareIncoming():
            return partial(_prepare_incoming, node)
        case v.DestroyGuest():
            return partial(_destroy, node)
        case v.ResumeGuest():
            return partial(_resume, node, guest, node.fence_token)
        case v.BeginSwitchover():
            return partial(_begin_switchover, node, guest)
        case v.ContinueSwitchover():
            return partial(_continue_switchover, node, guest)
        case v.AbortSwitchover():
            return partial(_abort, node, guest)
        case v.InspectGuest():
            return partial(_inspect, node)
        case v.AskLeave():
            return partial(_leave, node)
        case v.PrepareSwitchover() | v.PullPages():
            return list
        case _:
            raise AssertionError(f"the simulation doesn't know {command}")


def _leave(node: Node) -> list[v.Event]:
    """Without the store nobody may leave."""
    if node.world.store_down:
        return [v.LeaveRefused(reason="the store is down")]
    return [v.LeaveGiven()]


# --- the store and the volume ---


def _swap(node: Node, command: v.SwapRecord) -> list[v.Event]:
    world = node.world

    def apply() -> bool:
        if world.record != command.expected:
            world.log("{}: compare-and-set lost", node.name)
            return False
        world.record = command.new
        world.log("record: token {}, owner {}", command.new.token, command.new.owner)
        return True

    unknown = world.chance(world.faults.store_unknown)
    if world.store_down or unknown:
        if world.chance(world.faults.store_late):
            world.after(world.delay(STORE_LATE_S), lambda: (apply(), None)[1])
        elif not world.store_down and world.random.random() < 0.5:
            apply()
        return [v.RecordSwapped(won=None)]
    return [v.RecordSwapped(won=apply())]


def _read(node: Node) -> list[v.Event]:
    world = node.world
    if world.store_down or world.chance(world.faults.store_unknown):
        return [v.RecordRead(known=False)]
    return [v.RecordRead(known=True, record=world.record)]


def _fence(node: Node, token: int) -> list[v.Event]:
    """Older tokens than one that fenced change nothing, so a late one does no harm."""
    world = node.world

    def apply() -> None:
        world.volume.fenced_token = max(world.volume.fenced_token, token)

    if world.chance(world.faults.fence_failure):
        world.after(world.delay(STORE_LATE_S), apply)
        return [_failed(v.Fence, "unconfirmed")]
    if token < world.volume.fenced_token:
        return [_failed(v.Fence, "a newer token has fenced")]
    apply()
    return [v.Fenced(token=token)]


# --- engines ---


def _start_engine(node: Node, command: v.StartEngine) -> list[v.Event]:
    destination = node.session is not None and node.session.role is Role.DESTINATION
    if command.post_copy and destination:
        return post_copy.start_successor(node)
    node.served = None  # Whatever an earlier engine had open goes with it.
    node.engine_serial += 1
    node.engine = node.engine_serial
    return [post_copy.listening(node)] if destination else []


def _connect_engine(node: Node, command: v.ConnectEngine) -> list[v.Event]:
    if command.post_copy:
        return post_copy.connect_successor(node, command)
    guest = node.world.guests.get(node.name)
    if guest is None or not (node.engine and node.other.engine):
        return [v.EngineLost(reason="can't connect")]
    node.pending = set(range(PAGES))
    guest.dirty.clear()  # The dirty log begins.
    node.linked, node.served = node.other.engine, guest
    return [v.EngineConnected(pages_in_use=PAGES, round_trip_ms=0.1)]


def _stop_engine(node: Node) -> list[v.Event]:
    node.kill_engine("stopped", told=False)
    return []


def _run_pass(node: Node, command: v.RunPass) -> list[v.Event]:
    """Half of the pages now, half at the end; what is dirtied meanwhile waits for the next pass."""
    if command.kind in (PassKind.STALE, PassKind.MISSING):
        post_copy.tell_missing(node, command)
        return []
    world = node.world
    source, destination = world.guests.get(node.name), world.guests.get(node.other.name)
    engines = (node.engine, node.other.engine)
    if not all(engines) or source is None or destination is None:
        return []
    if command.kind is PassKind.FINAL:
        node.pending |= source.dirty
        source.dirty.clear()
    wanted = sorted(node.pending)
    seconds = 0.002 + world.delay(0.02)
    stalled_s = world.delay(STALL_S) if world.chance(world.faults.stall) else 0.0

    def copy(pages: list[int]) -> None:
        for page in pages:
            destination.memory[page] = source.memory[page]

    def finish() -> None:
        if (node.engine, node.other.engine) != engines:
            return
        if world.pages_cut and not world.healed:
            world.after(0.2, finish)
            return
        copy(wanted[len(wanted) // 2 :])
        node.pending = set(source.dirty)
        source.dirty.clear()
        swollen = world.random.randrange(500, 5000) if world.faults.diverging else 0
        report = PassReport(
            number=command.number,
            kind=command.kind,
            seconds=seconds,
            pages=len(wanted),
            bytes_sent=len(wanted) * 4096,
            pending_pages=len(node.pending) + swollen,
        )
        node.soon(v.PassFinished(report=report))

    copy(wanted[: len(wanted) // 2])
    world.after(seconds + stalled_s, finish)
    return []


# --- hypervisors ---


def set_running(node: Node, guest: Guest) -> None:
    world = node.world
    world.epoch += 1
    guest.epoch = world.epoch
    guest.state = G.RUNNING
    guest.begun = False


def _prepare_incoming(node: Node) -> list[v.Event]:
    if node.name in node.world.guests:
        return [_failed(v.PrepareIncoming, "the domain is here")]
    node.world.guests[node.name] = Guest.waiting(node.name, node.token_before + 1)
    return [v.IncomingReady()]


def _destroy(node: Node) -> list[v.Event]:
    guest = node.world.guests.pop(node.name, None)
    if guest is not None:
        node.world.log("{}: guest destroyed in {}", node.name, guest.state.value)
        checkers.check_destroy(node.world, guest, node)
        if guest.state is G.POSTMIGRATE:
            post_copy.check_source_destroyed(node.world, node)
        other = node.world.guests.get(node.other.name)
        if other is not None and guest.state in (G.INCOMING, G.LOADED):
            channel_broke(node.other, other)
    return [v.GuestDestroyed()]


def _inspect(node: Node) -> list[v.Event]:
    guest = node.world.guests.get(node.name)
    condition = v.GuestCondition.GONE if guest is None else CONDITIONS[guest.state]
    return [v.GuestInspected(condition=condition)]


def _gone(node: Node, guest: Guest | None) -> bool:
    return guest is None or node.world.guests.get(node.name) is not guest


def _resume(node: Node, guest: Guest | None, token: int) -> list[v.Event]:
    if node.world.chance(node.world.faults.death_before_resume):
        node.kill_guest("right before cont")
    if guest is None or _gone(node, guest):
        return [_failed(v.ResumeGuest, "no such domain", without_effect=True)]
    if guest.state is not G.RUNNING:
        if guest.state is G.PRE_SWITCHOVER or guest.state is G.SENDING:
            return [_failed(v.ResumeGuest, "not finalized", without_effect=True)]
        token = max(token, guest.token)
        node.world.log("{}: cont under token {}", node.name, token)
        checkers.check_resume(node.world, guest, token)
        guest.token = token
        set_running(node, guest)
    return [v.GuestResumed(at_s=node.clock_s)]


def _begin_switchover(node: Node, guest: Guest | None) -> list[v.Event]:
    if guest is None or _gone(node, guest) or guest.state is not G.RUNNING or not node.engine:
        return [_failed(v.BeginSwitchover, "refused")]
    guest.begun = True

    def pause() -> None:
        if _gone(node, guest) or not guest.begun or guest.state is not G.RUNNING:
            return
        guest.begun = False
        guest.state = G.PRE_SWITCHOVER
        node.guest_event(_K.PAUSED)
        node.guest_event(_K.PRE_SWITCHOVER)

    node.world.after(node.world.delay(0.004), pause)
    return []


def _continue_switchover(node: Node, guest: Guest | None) -> list[v.Event]:
    """The device state goes out. When it is out, and when it is loaded: in any order."""
    world = node.world
    if guest is None or _gone(node, guest) or guest.state is not G.PRE_SWITCHOVER:
        return [_failed(v.ContinueSwitchover, "not in pre-switchover")]
    guest.state = G.SENDING
    world.paused_memory = list(guest.memory)
    epoch = guest.epoch
    engines = (node.engine, node.other.engine)
    destination = world.guests.get(node.other.name)

    def sent() -> None:
        if _gone(node, guest) or guest.state is not G.SENDING:
            return
        guest.state = G.POSTMIGRATE
        node.guest_event(_K.DEVICE_STATE_SENT)

    def loaded() -> None:
        if destination is None or _gone(node.other, destination):
            return
        if destination.state is G.INCOMING and node.other.engine == engines[1]:
            destination.state = G.LOADED
            destination.epoch = epoch
            node.other.guest_event(_K.DEVICE_STATE_LOADED)

    world.after(0.0005 + world.delay(0.004), sent)
    if all(engines):
        world.after(0.0005 + world.delay(0.004), loaded)
    return []


def channel_broke(node: Node, guest: Guest) -> None:
    """The device channel of `guest` is cut: what its hypervisor does then (FACTS.md)."""
    if guest.state is G.PRE_SWITCHOVER or (guest.state is G.RUNNING and guest.begun):
        _resume_by_itself(node, guest)
    elif guest.state is G.SENDING:
        _settle(node, guest)
    elif guest.state is G.INCOMING and node.world.random.random() < 0.5:
        node.kill_guest("device channel broke")


def _settle(node: Node, guest: Guest) -> None:
    """Sending, and broken off: by then it was all out, or it wasn't."""
    if node.world.random.random() < 0.5:
        guest.state = G.POSTMIGRATE
        node.guest_event(_K.DEVICE_STATE_SENT)
    else:
        _resume_by_itself(node, guest)


def _resume_by_itself(node: Node, guest: Guest) -> None:
    paused = guest.state is not G.RUNNING
    guest.begun = False
    if paused:
        node.world.log("{}: the source resumes by itself", node.name)
        set_running(node, guest)
    node.guest_event(_K.MIGRATION_FAILED)
    if paused:
        node.guest_event(_K.RESUMED)


def _abort(node: Node, guest: Guest | None) -> list[v.Event]:
    if guest is None or _gone(node, guest):
        return [v.SwitchoverAborted(outcome=AbortOutcome.GONE)]
    if guest.state is G.SENDING:
        _settle(node, guest)
    elif guest.state is G.PRE_SWITCHOVER or guest.begun:
        _resume_by_itself(node, guest)
    sent = guest.state is G.POSTMIGRATE
    return [v.SwitchoverAborted(outcome=AbortOutcome.SENT if sent else AbortOutcome.RESUMED)]
