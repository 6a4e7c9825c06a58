"""What each command does in the simulated world. Returns the events that its agent hears."""

from __future__ import annotations

from migrator.model import PassKind
from migrator.ports import AbortOutcome, DomainEventKind
from migrator.session import vocabulary as v
from tests.simulation.node import Node
from tests.simulation.world import DESTINATION, PAGES, SOURCE, Guest

_K = DomainEventKind


def effect(node: Node, command: v.Command, alive: bool) -> list[v.Event]:
    """Perform `command`. `alive` False: its agent is dead by now; only what outlives it happens."""
    match command:
        case v.SwapRecord():
            return _swap(node, command)
        case v.ReadRecord():
            known = not node.world.chance(node.world.faults.store_unknown)
            return [v.RecordRead(known=known, record=node.world.record if known else None)]
        case v.Fence():
            volume = node.world.volume
            volume.fenced_token = max(volume.fenced_token, command.token)
            return [v.Fenced(token=command.token)]
        case v.StartEngine() | v.ConnectEngine() | v.RunPass() | v.StopEngine():
            return _engine(node, command) if alive else []
        case _:
            return _hypervisor(node, command)


def _swap(node: Node, command: v.SwapRecord) -> list[v.Event]:
    world = node.world

    def apply() -> bool:
        if world.record != command.expected:
            return False
        world.record = command.new
        world.log(f"record: token {command.new.token} owner {command.new.owner}")
        return True

    if world.chance(world.faults.store_unknown):
        if world.chance(world.faults.store_late):
            world.after(world.delay(3.0), lambda: (apply(), None)[1])
        elif world.chance(0.5):
            apply()
        return [v.RecordSwapped(won=None)]
    return [v.RecordSwapped(won=apply())]


def _engine(node: Node, command: v.Command) -> list[v.Event]:
    world = node.world
    match command:
        case v.StartEngine():
            node.engine = True
            if node.name == DESTINATION:
                return [v.EngineListening(host="10.0.0.2", port=7000, secret=b"s" * 32)]
            return []
        case v.ConnectEngine():
            if not (node.engine and node.other.engine):
                return [v.EngineLost(reason="can't connect")]
            node.pending = set(range(PAGES))
            return [v.EngineConnected(pages_in_use=PAGES, round_trip_ms=0.1)]
        case v.StopEngine():
            node.kill_engine("stopped", told=False)
            return []
        case v.RunPass():
            return _run_pass(node, command)
        case _:
            world.log(f"unexpected {command}")
            return []


def _run_pass(node: Node, command: v.RunPass) -> list[v.Event]:
    world = node.world
    source, destination = world.guests.get(SOURCE), world.guests.get(DESTINATION)
    if not (node.engine and node.other.engine and source and destination):
        return []
    # The dirty log is exact here: pages whose versions differ. What the real one must achieve.
    wanted = set(range(PAGES)) if command.kind is PassKind.FINAL else set(node.pending)
    for page in wanted:
        destination.memory[page] = source.memory[page]
    node.pending = {p for p in range(PAGES) if source.memory[p] != destination.memory[p]}
    node.pending |= {world.random.randrange(PAGES) for _ in range(world.random.randrange(3))}
    return [v.PassFinished(report=node.pass_report(command.number, command.kind, len(wanted)))]


def _hypervisor(node: Node, command: v.Command) -> list[v.Event]:
    world = node.world
    guest = world.guests.get(node.name)
    match command:
        case v.PrepareIncoming():
            world.guests[node.name] = Guest(
                node=node.name, token=2, state="incoming", memory=[-1] * PAGES
            )
            return [v.IncomingReady()]
        case v.DestroyGuest():
            if guest is not None:
                world.guests.pop(node.name)
                world.log(f"{node.name}: guest destroyed in {guest.state}")
                if guest.state == "running":
                    raise AssertionError("a running guest was destroyed")
            return [v.GuestDestroyed()]
        case v.InspectGuest():
            return [v.GuestInspected(condition=_condition(guest))]
        case v.AbortSwitchover():
            return [v.SwitchoverAborted(outcome=_abort(node, guest))]
        case v.BeginSwitchover() if guest is not None and guest.state == "running":
            if not node.engine:
                node.guest_event(_K.MIGRATION_FAILED)
                return []
            guest.state = "pre-switchover"
            world.paused_memory = None
            node.guest_event(_K.PAUSED)
            node.guest_event(_K.PRE_SWITCHOVER)
            return []
        case v.ContinueSwitchover() if guest is not None and guest.state == "pre-switchover":
            return _send_device_state(node, guest)
        case v.ResumeGuest() if guest is not None:
            token = _token_of(node)
            world.log(f"{node.name}: cont under token {token}")
            world.resume(guest, token)
            return [v.GuestResumed(at_s=world.now_s)]
        case v.ResumeGuest():
            return [v.CommandFailed(command="ResumeGuest", error="no such domain")]
        case _:
            return []


def _token_of(node: Node) -> int:
    """The token that the agent would give: the newest one that it fenced with."""
    return node.world.volume.fenced_token


def _send_device_state(node: Node, guest: Guest) -> list[v.Event]:
    world = node.world
    guest.state = "sending"
    world.paused_memory = list(guest.memory)

    def loaded() -> None:
        if guest.state not in ("sending", "postmigrate") or not node.engine:
            return
        guest.state = "postmigrate"
        node.guest_event(_K.DEVICE_STATE_SENT)
        destination = world.guests.get(DESTINATION)
        if destination is not None and destination.state == "incoming" and node.other.engine:
            destination.state = "loaded"
            node.other.guest_event(_K.DEVICE_STATE_LOADED)

    world.after(0.001 + world.delay(0.005), loaded)
    return []


def _abort(node: Node, guest: Guest | None) -> AbortOutcome:
    if guest is None:
        return AbortOutcome.GONE
    if guest.state == "pre-switchover":
        guest.state = "running"
        node.guest_event(_K.RESUMED)
        return AbortOutcome.RESUMED
    if guest.state in ("sending", "postmigrate"):
        return AbortOutcome.SENT
    return AbortOutcome.RESUMED


def _condition(guest: Guest | None) -> v.GuestCondition:
    if guest is None:
        return v.GuestCondition.GONE
    return {
        "running": v.GuestCondition.RUNNING,
        "pre-switchover": v.GuestCondition.SWITCHING,
        "sending": v.GuestCondition.SENT,
        "postmigrate": v.GuestCondition.SENT,
        "incoming": v.GuestCondition.INCOMING,
        "loaded": v.GuestCondition.LOADED,
    }[guest.state]
