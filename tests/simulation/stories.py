"""What operators do in a simulated cluster, as stories that go on beside each other.

A story is begun with the cluster and works by its clock. To simulate something new (a drain, say),
write another one: `Operator.run` gives it an agent's production parts, `Operator.migrate` begins a
migration, whose sides tell how they `ended`; both fail as they do when an agent dies.
"""

from __future__ import annotations

import abc
import random
from collections.abc import Awaitable, Callable
from functools import partial

from migrator.model import (
    MigrationMode,
    MigrationRequest,
    MigrationState,
    OnTimeout,
    OwnershipState,
)
from migrator.session import vocabulary as v
from migrator.session.source import SourceSession
from tests.simulation.agent import Agent
from tests.simulation.cluster import Cluster, Domain
from tests.simulation.guests import G
from tests.simulation.node import Node
from tests.simulation.side import Migration
from tests.simulation.store import TAKEOVER
from tests.simulation.world import InvariantViolation

CANCEL_S = 1.0
"""With nothing else broken, a cancel before HANDOFF ends within this."""
LAST_S = 200.0
"""Nothing is begun later, so that it has time to end."""
_CANCEL = v.CancelRequested(reason="cancelled by an operator", by="an operator")


class Operator:
    """How stories act on a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.world = cluster.world

    def run(self, node: Node, work: Callable[[Agent], Awaitable[object]]) -> bool:
        """Let `work` be done by the agent of `node`. False: it has none now, or that is stopped."""
        if not node.up or node.agent is None or node.held is not None:
            return False
        node.agent.spawn(self._work(node.agent, work))
        return True

    async def _work(self, agent: Agent, work: Callable[[Agent], Awaitable[object]]) -> None:
        await work(agent)

    def migrate(
        self,
        domain: Domain,
        source: Node,
        destination: Node,
        request: MigrationRequest,
        begun: Callable[[Migration], None] = lambda _: None,
    ) -> bool:
        """Begin a migration. `begun` is called if it is accepted."""

        async def create(_: Agent) -> None:
            begun(await source.migrate(domain, destination, request))

        return self.run(source, create)


class Story(abc.ABC):
    """See the module."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.cluster = operator.cluster
        self.world = operator.world

    @abc.abstractmethod
    def start(self) -> None: ...

    @property
    def done(self) -> bool:
        """It has done what it wanted; the verdict needn't wait for it."""
        return True


class GuestsWork(Story):
    """Whatever guest runs dirties some pages, and writes to its volume."""

    def start(self) -> None:
        self.world.after(0.0, self._work)

    def _work(self) -> None:
        world, cluster = self.world, self.cluster
        r = world.random
        copying = {
            migration.domain.name
            for migration in cluster.migrations.values()
            if migration.source.engine and migration.source.session is not None
        }
        for domain in cluster.domains.values():
            busy = domain.name in copying or len(domain.guests) > 1
            if not busy and r.random() < 0.8:
                continue
            for guest in tuple(domain.guests.values()):
                if guest.state is G.RUNNING:
                    for _ in range(r.randrange(3)):
                        guest.write(r.randrange(len(guest.memory)))
                    if r.random() < 0.3:
                        cluster.nodes[guest.node].guest_writes(domain, guest)
        world.after(0.003 + world.delay(0.02) if copying else 0.5, self._work)


class Migrations(Story):
    """Each domain is moved, and moved again as soon as that has ended, wherever it is then."""

    def __init__(self, operator: Operator, *, seed: int, calm: bool, cancels: bool) -> None:
        super().__init__(operator)
        self.seed = seed
        self.calm = calm
        self.cancels = cancels
        self.begun: dict[str, int] = dict.fromkeys(self.cluster.domains, 0)

    def start(self) -> None:
        for domain in self.cluster.domains.values():
            self.world.after(0.02 + self.world.delay(0.05), partial(self._next, domain))

    @property
    def done(self) -> bool:
        if self.world.elapsed_s >= LAST_S:
            return True
        return all(
            self.begun[domain.name] >= 2 or domain.running is None
            for domain in self.cluster.domains.values()
        )

    def _next(self, domain: Domain) -> None:
        """Begin one where the domain runs, as soon as that node has it for itself."""
        world, cluster = self.world, self.cluster
        if world.elapsed_s > LAST_S or self.begun[domain.name] >= 2:
            return
        guest = domain.running
        if guest is not None and not cluster.store.outdated:
            node = cluster.nodes[guest.node]
            busy = any(side.domain is domain for side in node.sides())
            others = [each for each in cluster.nodes.values() if each is not node]
            if node.up and not busy:
                destination = world.random.choice(others)
                request = self._request(domain, destination)
                self.operator.migrate(
                    domain, node, destination, request, partial(self._begun, domain)
                )
        world.after(0.2 + world.delay(1.0), partial(self._next, domain))

    def _request(self, domain: Domain, destination: Node) -> MigrationRequest:
        world = self.world
        return MigrationRequest(
            destination=destination.name,
            on_timeout=world.random.choice(list(OnTimeout)),
            mode=self._mode(domain),
            timeout_s=600.0 if self.calm else world.random.choice((0.05, 20.0, 600.0)),
        )

    def _mode(self, domain: Domain) -> MigrationMode:
        """Half of the seeds without post-copy, of the others each migration by a die of its own."""
        if self.seed % 2 == 0:
            return MigrationMode.PRECOPY
        die = random.Random(f"mode {self.seed} {domain.name} {self.begun[domain.name]}")
        return die.choice(list(MigrationMode))

    def _begun(self, domain: Domain, migration: Migration) -> None:
        world = self.world
        self.begun[domain.name] += 1
        if self.cancels:
            world.after(world.delay(0.15), partial(self._cancel, migration))
        elif not self.calm and world.random.random() < 0.3:
            most_s = world.random.choice((0.2, 3.0, 20.0))
            side = migration.source
            world.after(world.delay(most_s), lambda: side.feed(_CANCEL))

    def _cancel(self, migration: Migration) -> None:
        session = migration.source.session
        if not isinstance(session, SourceSession):
            return
        bound = session.cancellable
        migration.source.feed(_CANCEL)

        def check() -> None:
            if session.ended_at_s is None:
                raise InvariantViolation(f"cancel: {session.state.value} after {CANCEL_S} s")
            if session.state is not MigrationState.CANCELLED:
                raise InvariantViolation(f"cancel: {session.state.value}, {session.error}")

        if bound:
            self.world.after(CANCEL_S, check)


class StartsAndStops(Story):
    """Operators start what is stopped, anywhere, and now and then stop what runs.

    Those of every other seed leave what the agents have to start again to them.
    """

    def __init__(self, operator: Operator, *, leaves_lost: bool) -> None:
        super().__init__(operator)
        self.leaves_lost = leaves_lost

    def start(self) -> None:
        self.world.after(1.0 + self.world.delay(3.0), self._act)

    @property
    def done(self) -> bool:
        """Whatever was stopped, or died, runs again."""
        return all(
            domain.record is not None and domain.record.state is OwnershipState.RUNNING
            for domain in self.cluster.domains.values()
        )

    def _act(self) -> None:
        world, cluster = self.world, self.cluster
        for domain in cluster.domains.values():
            record = domain.record
            node = world.random.choice(list(cluster.nodes.values()))
            if record is None or cluster.store.outdated:
                continue
            if record.state is OwnershipState.STOPPED:
                if self.leaves_lost and domain.must_start:
                    continue
                self._run(node, domain, "start")
            elif world.random.random() < 0.2 and not world.healed:
                # A second start is refused with who owns it; a stop is done where it runs.
                if world.random.random() < 0.5:
                    self._run(node, domain, "start")
                else:
                    self._run(cluster.nodes[record.owner], domain, "stop")  # type: ignore[index]
        world.after(2.0 + world.delay(6.0), self._act)

    def _run(self, node: Node, domain: Domain, what: str) -> None:
        async def work(agent: Agent) -> None:
            self.world.log("{}: {} {}", node.name, what, domain.name)
            if what == "start":
                if domain.record is not None and domain.record.owner != agent.node.name:
                    domain.must_start = False  # Its owner is out of it, also if this fails.
                await agent.domains.start(domain.name)
            else:
                domain.must_start = False
                await agent.domains.stop(domain.name, timeout_s=1.0)

        self.operator.run(node, work)


class Takeovers(Story):
    """Operators take the domains of silent nodes over, by whichever node."""

    def start(self) -> None:
        self.world.after(1.0 + self.world.delay(10.0), self._act)

    def _act(self) -> None:
        world, cluster = self.world, self.cluster
        if world.healed:
            return
        for domain in cluster.domains.values():
            record = domain.record
            if record is None or record.state is not OwnershipState.RUNNING:
                continue
            if cluster.store.outdated:
                continue
            owner = cluster.nodes[record.owner]  # type: ignore[index]
            others = [node for node in cluster.nodes.values() if node is not owner and node.up]
            if owner.heard_for_s(world.now_s) > 5.0 and others:
                node = world.random.choice(others)
                self.operator.run(node, partial(self._take_over, node, domain))
        world.after(2.0 + world.delay(4.0), self._act)

    async def _take_over(self, node: Node, domain: Domain, agent: Agent) -> None:
        self.world.log("{}: takes {} over", node.name, domain.name)
        TAKEOVER.set(True)  # In this task.
        await agent.takeover.take_over(domain.name)
