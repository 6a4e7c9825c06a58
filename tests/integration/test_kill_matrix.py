"""SIGKILL of each process of a migration, at each phase: one copy runs, and its memory is right.

Before the handoff the guest goes on on the source, whatever died. In the handoff it depends on how
far the ownership record was; the expected side is written down for each moment.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from deploy.lab.processes import Process
from hypervisor.qemu.config import MONITORS, monitor_path
from migrator.model import Migration, MigrationState
from node_agent.events import EventKind
from tests.integration.cluster import inventory
from tests.integration.cluster.client import PacketWatch
from tests.integration.cluster.world import Cluster, Guest, Load, describe, eventually

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

ANSWER_S = 10.0
WITNESS = "n3"
"""Asked about what goes on: its agent has no part in the migrations and isn't killed."""
SLOW_BYTES_PER_S = 4_000_000
"""A pre-copy that lasts some ten seconds."""
PHASES = ("setup", "arrival", "precopy", "switchover")
VICTIMS = (
    "source agent",
    "destination agent",
    "source engine",
    "destination engine",
    "destination hypervisor",
)
HOLDS = {
    # Both engines are there, and the destination's hypervisor starts; the source doesn't know yet.
    "setup": ("destination", "Prepared"),
    # Pages come, and the destination's hypervisor has just come up.
    "arrival": ("destination", "arrive"),
    # The guest stands still, its last page is in place, its device state isn't sent.
    "switchover": ("source", "ContinueSwitchover"),
}


@pytest.fixture(scope="module")
def guest(cluster: Cluster) -> Iterator[Guest]:
    with cluster.guest("victim", load=Load(udp_per_s=500)) as guest:
        for node in ("n2", "n1"):  # What is made once and kept, connections between agents, is.
            cluster.move("victim", node)
        yield guest


@dataclass(frozen=True, slots=True)
class Scene:
    """One migration in the moment before something is killed."""

    cluster: Cluster
    guest: Guest
    source: str
    destination: str

    def victim(self, name: str) -> Process:
        """The one process that is called so, once it is the only one: a fresh spare engine looks
        for a moment like one that was taken.
        """
        side, kind = name.split()
        node = self.source if side == "source" else self.destination

        def find() -> Process | None:
            if kind == "agent":
                return self.cluster.agent(node)
            if kind == "engine":
                found = self.cluster.engines(node)
            else:
                found = self.cluster.qemus(node, self.guest.name)
            return found[0] if len(found) == 1 else None

        return eventually(f"there is one {name}", find)


def scene_of(cluster: Cluster, guest: Guest) -> Scene:
    return Scene(cluster, guest, guest.node, guest.other_node())


def kill(scene: Scene, name: str) -> None:
    """Kill it; where an agent watches it, until that agent has seen its end."""
    cluster, began_s = scene.cluster, time.time()
    cluster.kill(scene.victim(name))
    if name.endswith("hypervisor"):
        node = scene.source if name.startswith("source") else scene.destination
        eventually(
            f"the agent of {node} notices",
            lambda: any(
                event.kind == EventKind.DOMAIN_EXITED
                and event.node == node
                and event.at_s >= began_s
                for event in cluster.events(WITNESS)
            ),
        )


def wait_loaded(scene: Scene) -> None:
    """Until the destination's hypervisor has all of the device state, by its own word.

    The source's hypervisor says that it is out some ms earlier: it is on its way then.
    """
    state = scene.cluster.plan.node(scene.destination).state_path
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(ANSWER_S)
        monitor.connect(str(monitor_path(state / "qemu" / "run" / scene.guest.name, MONITORS - 1)))
        with monitor.makefile("rw", encoding="utf-8") as talk:
            talk.readline()  # The greeting.

            def answer(command: str) -> Any:
                talk.write(json.dumps({"execute": command}) + "\n")
                talk.flush()
                while "return" not in (line := json.loads(talk.readline())):
                    assert "event" in line, line
                return line["return"]

            answer("qmp_capabilities")
            eventually(
                "the device state is loaded",
                lambda: answer("query-status")["status"] != "inmigrate",
            )


def owned_by(scene: Scene, node: str) -> bool:
    """By the record."""
    return scene.cluster.domain(scene.guest.name, WITNESS).node == node


def settle(scene: Scene, migration: Migration, at: str | None) -> Migration:
    """With every agent up again: the migration ends, the guest is sound, and runs `at` alone."""
    cluster, guest = scene.cluster, scene.guest
    cluster.restart_missing_agents()
    ended = cluster.ended(migration.id, WITNESS)
    client = cluster.plan.namespace("client")
    if at is None:
        at = scene.destination if ended.state is COMPLETED else scene.source
    assert guest.node == at, describe(ended)
    with PacketWatch(client, guest.udp_port) as packets:
        packets.wait_packets(100)
    eventually("one copy is left", lambda: guest.copies() == [at])
    guest.verify()
    # A rollback's end is told before its engine's, and who gives up waits for that 3 s at most.
    eventually("its writes are as fast again", lambda: not inventory.tracked(cluster, at))
    return ended


def test_a_killed_process_leaves_the_guest_on_its_source(
    cluster: Cluster, guest: Guest, phase: str, victim: str
) -> None:
    scene = scene_of(cluster, guest)
    before = inventory.take_settled(cluster)
    bandwidth = SLOW_BYTES_PER_S if phase == "precopy" else None
    with ExitStack() as stack:
        point = stack.enter_context(cluster.held(*HOLDS[phase])) if phase in HOLDS else None
        begun = cluster.migrate(
            guest.name, scene.destination, via=scene.source, bandwidth_bytes_per_s=bandwidth
        )
        if point is not None:
            point.wait_reached()
        else:
            eventually("pages are sent", lambda: sending(cluster, begun, scene.source))
        kill(scene, victim)
        if phase == "switchover" and victim != "source agent":
            # Its next step is the handoff, which goes well without any of these.
            eventually(
                "the source has seen it",
                lambda: (
                    cluster.migration(begun.id, scene.source).state is not MigrationState.SWITCHOVER
                ),
            )
    ended = settle(scene, begun, at=scene.source)
    assert ended.state is MigrationState.FAILED, describe(ended)
    assert ended.error, describe(ended)
    inventory.assert_nothing_left(cluster, before, connections_change=True)
    cluster.move(guest.name, scene.destination, via=WITNESS)
    guest.verify()
    print(f"{victim} killed in {phase}: {ended.error}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "phase" in metafunc.fixturenames:
        cases = [(phase, victim) for phase in PHASES for victim in VICTIMS]
        ids = [f"{phase}-{victim.replace(' ', '-')}" for phase, victim in cases]
        metafunc.parametrize(("phase", "victim"), cases, ids=ids)


def sending(cluster: Cluster, migration: Migration, via: str) -> bool:
    now = cluster.migration(migration.id, via)
    assert not now.ended, describe(now)
    return now.state is MigrationState.PRECOPY and now.progress.bytes_sent > 0


@dataclass(frozen=True, slots=True)
class Handoff:
    """Who is killed at which step of the handoff, and where the guest is then expected."""

    role: str
    step: str
    victims: tuple[str, ...]
    at: str
    state: MigrationState | None

    @property
    def keeps_source(self) -> bool:
        """From taking back, a second later, what the destination is still to take."""
        return self.at == "destination" and self.step in ("Commit", "SwapRecord")

    @property
    def name(self) -> str:
        victims = "-and-".join(victim.replace(" ", "-") for victim in self.victims)
        return f"{self.role}-{self.step}-{victims}"


FAILED, COMPLETED = MigrationState.FAILED, MigrationState.COMPLETED
BOTH_AGENTS = ("source agent", "destination agent")
HANDOFFS = (
    # The device state is there, the destination hasn't been told that it may take the record.
    Handoff("source", "Commit", ("source agent",), "source", FAILED),
    Handoff("source", "Commit", BOTH_AGENTS, "source", FAILED),
    Handoff("source", "Commit", ("destination hypervisor",), "source", FAILED),
    # What the destination has loaded is whole: it needs neither the source nor the engines.
    Handoff("source", "Commit", ("source hypervisor",), "destination", COMPLETED),
    Handoff("source", "Commit", ("source engine",), "destination", COMPLETED),
    Handoff("source", "Commit", ("destination engine",), "destination", COMPLETED),
    # It may, and hasn't.
    # The source waits a second before it takes the guest back; an agent that is up again by then,
    # and finds the guest loaded and the source willing, goes on. Either is right, if both agree.
    Handoff("destination", "SwapRecord", ("destination agent",), "either", None),
    Handoff("destination", "SwapRecord", ("destination hypervisor",), "source", FAILED),
    Handoff("destination", "SwapRecord", ("source agent",), "destination", COMPLETED),
    # It has won the record; the guest has never run there.
    Handoff("destination", "Fence", ("destination agent",), "destination", COMPLETED),
    Handoff("destination", "Fence", ("source agent",), "destination", COMPLETED),
    Handoff("destination", "Fence", BOTH_AGENTS, "destination", COMPLETED),
    Handoff("destination", "Fence", ("destination hypervisor",), "source", FAILED),
    Handoff("destination", "Fence", ("source hypervisor",), "destination", COMPLETED),
    # Its resume is journalled, and about to be issued.
    Handoff("destination", "ResumeGuest", ("destination hypervisor",), "source", FAILED),
    Handoff("destination", "ResumeGuest", ("destination agent",), "destination", COMPLETED),
    # The guest runs there; the source still has its stale copy.
    Handoff("source", "DestroyGuest", ("source agent",), "destination", COMPLETED),
    Handoff("source", "DestroyGuest", BOTH_AGENTS, "destination", COMPLETED),
    Handoff("source", "DestroyGuest", ("destination agent",), "destination", COMPLETED),
    Handoff("source", "DestroyGuest", ("source hypervisor",), "destination", COMPLETED),
)


@pytest.mark.parametrize("handoff", HANDOFFS, ids=lambda handoff: handoff.name)
def test_a_kill_in_the_handoff_leaves_one_copy(
    cluster: Cluster, guest: Guest, handoff: Handoff
) -> None:
    scene = scene_of(cluster, guest)
    before = inventory.take_settled(cluster)
    with ExitStack() as stack:
        if handoff.keeps_source:
            stack.enter_context(cluster.held("source", "SwapRecord"))
        with cluster.held(handoff.role, handoff.step) as point:
            begun = cluster.migrate(guest.name, scene.destination, via=scene.source)
            point.wait_reached()
            if handoff.step == "Commit":
                wait_loaded(scene)
            for victim in handoff.victims:
                kill(scene, victim)
        if handoff.keeps_source:
            eventually("the destination has taken it", lambda: owned_by(scene, scene.destination))
    at = {"source": scene.source, "destination": scene.destination}.get(handoff.at)
    ended = settle(scene, begun, at)
    assert handoff.state in (ended.state, None), describe(ended)
    inventory.assert_nothing_left(cluster, before, connections_change=True)
    cluster.move(guest.name, guest.other_node(), via=WITNESS)
    guest.verify()
    print(f"{handoff.name}: {ended.state}, {ended.error}")


def test_a_source_that_dies_in_its_rollback_hands_over_once_more(
    cluster: Cluster, guest: Guest
) -> None:
    """It has won the record back, and its hypervisor dies right before `cont`."""
    scene = scene_of(cluster, guest)
    before = inventory.take_settled(cluster)
    with (
        cluster.held("destination", "SwapRecord") as late,
        cluster.held("source", "ResumeGuest") as rollback,
    ):
        begun = cluster.migrate(guest.name, scene.destination, via=scene.source)
        late.wait_reached()
        rollback.wait_reached()
        kill(scene, "source hypervisor")
    ended = settle(scene, begun, at=scene.destination)
    assert ended.state is COMPLETED, describe(ended)
    assert "rollback failed" in [phase.name for phase in ended.timeline], describe(ended)
    inventory.assert_nothing_left(cluster, before, connections_change=True)
    cluster.move(guest.name, guest.other_node(), via=WITNESS)
    guest.verify()


@pytest.mark.parametrize("state", [MigrationState.PRECOPY, MigrationState.SWITCHOVER], ids=str)
def test_a_cancel_outlives_the_agent_that_was_asked(
    cluster: Cluster, guest: Guest, state: MigrationState
) -> None:
    """Its answer was given, and the guest is about to be brought back."""
    scene = scene_of(cluster, guest)
    before = inventory.take_settled(cluster)
    paused = state is MigrationState.SWITCHOVER
    with ExitStack() as stack:
        point = stack.enter_context(cluster.held(*HOLDS["switchover"])) if paused else None
        undoing = stack.enter_context(cluster.held("source", "AbortSwitchover"))
        begun = cluster.migrate(
            guest.name,
            scene.destination,
            via=scene.source,
            bandwidth_bytes_per_s=None if paused else SLOW_BYTES_PER_S,
        )
        if point is not None:
            point.wait_reached()
        else:
            eventually("pages are sent", lambda: sending(cluster, begun, scene.source))
        cluster.cancel(begun.id, scene.source)
        undoing.wait_reached()
        kill(scene, "source agent")
    ended = settle(scene, begun, at=scene.source)
    assert ended.state is MigrationState.CANCELLED, describe(ended)
    assert ended.cancelled_by, describe(ended)
    inventory.assert_nothing_left(cluster, before, connections_change=True)
    cluster.move(guest.name, scene.destination, via=WITNESS)
    guest.verify()
