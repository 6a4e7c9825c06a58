"""One seed's story: its cluster, its faults, what its operators do, and the verdict.

Kinds of seeds: no fault at all (every migration must complete), nothing but cancels (each must end
within CANCEL_S), nothing but reorderings and skew, and every mix of faults.
"""

from __future__ import annotations

import random

from migrator.model import MigrationState
from tests.simulation.checkers import liveness, recovery
from tests.simulation.cluster import Cluster
from tests.simulation.faults import Injector, faults_of
from tests.simulation.node import Node
from tests.simulation.restores import Restores
from tests.simulation.side import Sessions
from tests.simulation.stories import (
    GuestsWork,
    Migrations,
    Operator,
    StartsAndStops,
    Story,
    Takeovers,
)
from tests.simulation.world import Faults, InvariantViolation, World

SETTLE_S = 600.0
QUIET_S = 25.0
"""After all ended: longer than any message, write or sweep may be late."""


class Scenario:
    """See the module. `play` raises InvariantViolation."""

    def __init__(
        self,
        seed: int,
        *,
        faults: Faults | None = None,
        sessions: Sessions | None = None,
        make_node: type[Node] = Node,
    ) -> None:
        self.seed = seed
        self.world = World(seed, faults_of(seed) if faults is None else faults)
        shape = random.Random(f"shape {seed}")
        self.cluster = Cluster(
            self.world,
            nodes=shape.choice((3, 3, 3, 4, 5, 7)),
            domains=shape.choice((1, 1, 2, 3)),
            sessions=sessions,
            make_node=make_node,
        )
        self.faultless = self.world.faults == Faults()
        cancels = self.faultless and seed % 10 == 1
        operator = Operator(self.cluster)
        self.migrations = Migrations(operator, seed=seed, calm=self.faultless, cancels=cancels)
        self.stories: list[Story] = [GuestsWork(operator), self.migrations]
        if not self.faultless:
            self.stories.append(StartsAndStops(operator, leaves_lost=seed // 10 % 2 == 0))
        if self.world.faults.takeover:
            self.stories.append(Takeovers(operator))
        if self.world.faults.store_restored:
            self.stories.append(Restores(operator))
        self._must_complete = self.faultless and not cancels
        self._quiet_since_s: float | None = None

    def play(self) -> dict[str, str]:
        """Where each domain ended: the node's name, or how it was lost ("died", "unprovable")."""
        world = self.world
        world.log("{}", world.faults)
        try:
            Injector(self.cluster).start()
            for story in self.stories:
                story.start()
            world.after(1.0, self._watch)
            world.run(SETTLE_S)
            ends = liveness.check_end(self.cluster)
            recovery.check_end(self.cluster)
            if self._must_complete:
                self._check_completed()
            return ends
        finally:
            world.wind_up()

    def _watch(self) -> None:
        """Stop once all has been quiet for long enough, healed, with every story told."""
        world = self.world
        quiet = all(
            node.up and not node.sides() and not node.open_entries()
            for node in self.cluster.nodes.values()
        )
        if quiet and world.healed and all(story.done for story in self.stories):
            self._quiet_since_s = self._quiet_since_s or world.now_s
            if world.now_s - self._quiet_since_s >= (5.0 if self.faultless else QUIET_S):
                world.stopped = True
        else:
            self._quiet_since_s = None
        world.after(1.0, self._watch)

    def _check_completed(self) -> None:
        ends = {
            each.id: (each.source.ended, each.destination.ended)
            for each in self.cluster.migrations.values()
        }
        wanted = (MigrationState.COMPLETED, MigrationState.COMPLETED)
        if len(ends) != 2 * len(self.cluster.domains) or set(ends.values()) != {wanted}:
            raise InvariantViolation(f"4: no fault, and it didn't complete: {ends}")


def play(
    seed: int,
    *,
    faults: Faults | None = None,
    sessions: Sessions | None = None,
    make_node: type[Node] = Node,
) -> Scenario:
    """Play one seed. On a violation the error carries the transcript."""
    scenario = Scenario(seed, faults=faults, sessions=sessions, make_node=make_node)
    try:
        scenario.play()
        return scenario
    except Exception as error:
        transcript = "\n".join(scenario.world.transcript()[-600:])
        text = str(error) or repr(error)
        raise InvariantViolation(f"{text}\nseed {seed}\n{transcript}") from error
