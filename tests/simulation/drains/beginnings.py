"""What a simulated drain finds when it begins: guests, and migrations that others began."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from migrator.model import MaintenancePolicy
from node_agent.drain.resources import Move, MoveState, Operation
from node_agent.planner.model import DomainFacts
from tests.simulation.drains.checkers import SOURCE, Guest

if TYPE_CHECKING:
    from tests.simulation.drains.world import World

MIB = 2**20


def make_guests(world: World) -> None:
    """Of all sorts, on the node that is emptied; of an undrain, on the others."""
    for number in range(world.dice.randint(1, 8)):
        anti = ("app=a",) if world.dice.random() < 0.2 else ()
        label = frozenset({"app=a"}) if world.dice.random() < 0.3 else frozenset()
        stop = world.dice.random() < 0.2
        facts = DomainFacts(
            name=f"d{number}",
            node=SOURCE,
            memory_bytes=100 * MIB,
            content_bytes=50 * MIB,
            labels=label,
            anti_affinity=anti,
            policy=MaintenancePolicy.STOP if stop else MaintenancePolicy.LIVE,
            restart=world.dice.random() < 0.7,
        )
        where = SOURCE
        if world.operation is Operation.UNDRAIN:
            where = world.dice.choice(world.nodes[1:])
        world.guests[facts.name] = Guest(facts=facts, owner=where)


def leave_already(world: World) -> tuple[Move, ...]:
    """Guests that somebody has begun to migrate, to nodes that the rules allow."""
    if world.operation is not Operation.DRAIN or len(world.nodes) < 2:
        return ()
    found = []
    for name, guest in world.guests.items():
        ruled = guest.facts.anti_affinity or guest.facts.labels
        if ruled or not world.faulty(world.faults.leaving_already):
            continue
        world.seen["leaving already"] += 1
        destination = world.dice.choice(world.nodes[1:])
        migration = world.migrate(name, destination)
        found.append(
            Move(
                domain=name,
                source=SOURCE,
                destination=destination,
                policy=guest.facts.policy,
                state=MoveState.MOVING,
                migration=migration,
                started_at_s=0.0,
                already=True,
            )
        )
        if world.faulty(0.3):  # By whoever has begun it.
            world.later(world.dice.uniform(0.0, 5.0), partial(world.cancel, migration))
    return tuple(found)
