"""One seed's story: its faults, a migration n1 -> n2, and a second one from wherever that ended.

The second one is given as soon as the first has ended where the domain runs, in the same world: so
late messages, late writes and dead agents' commands of the first may hit it.

Kinds of seeds: no fault at all (must complete, both times), nothing but a cancel (must end within
CANCEL_S), nothing but reorderings and skew, and every mix of faults.
"""

from __future__ import annotations

import random
from functools import partial

from migrator.model import MigrationMode, MigrationRequest, MigrationState, OnTimeout
from migrator.session import vocabulary as v
from migrator.session.source import SourceSession
from tests.simulation import checkers
from tests.simulation.guests import PAGES, G, Guest
from tests.simulation.node import Node, two_nodes
from tests.simulation.world import N3, Faults, InvariantViolation, World

SETTLE_S = 600.0
SECOND_BEFORE_S = 250.0
"""A second migration begins no later, so that it has time to end."""
QUIET_S = 15.0
"""After all ended: longer than any message or write may be late."""
CANCEL_S = 1.0


def faults_of(seed: int) -> Faults:
    """The mix of faults of a seed."""
    if seed % 10 < 2:
        return Faults()
    r = random.Random(f"faults {seed}")
    scale = r.choice((0.2, 0.5, 1.0, 1.0, 2.0))

    def rate(most: float, often: float = 0.5) -> float:
        return scale * most * r.random() if r.random() < often else 0.0

    def mean(least_s: float, often: float) -> float:
        return least_s / (scale * (0.1 + r.random())) if r.random() < often else 0.0

    return Faults(
        crash_per_command=rate(0.05, 0.4),
        kill_mean_s=mean(0.05, 0.15) or mean(2.0, 0.3),
        hypervisor_share=r.choice((0.0, 0.0, 0.2, 0.4)),
        reboot_share=r.choice((0.0, 0.0, 0.1, 0.3)),
        loss=rate(0.3),
        duplicate=rate(0.4),
        straggler=rate(0.2),
        delay_s_max=r.choice((0.001, 0.002, 0.02, 1.5)),
        partition_mean_s=mean(0.3, 0.2) or mean(20.0, 0.1),
        false_alarm_mean_s=mean(0.3, 0.2),
        store_unknown=rate(0.5),
        store_late=rate(1.0),
        store_outage_mean_s=mean(1.0, 0.2),
        command_failure=rate(0.1, 0.4),
        journal_failure=rate(0.3, 0.3),
        fence_failure=rate(0.6, 0.2) or (1.0 if r.random() < 0.04 else 0.0),
        resume_failure=rate(0.6, 0.3),
        death_before_resume=r.choice((0.0, 0.0, 0.0, 0.1, 0.5)),
        hang=rate(0.1, 0.3),
        stall=rate(0.1, 0.3),
        aimed=rate(0.7, 0.6),
        long_down=rate(0.2, 0.2),
        takeover=r.random() < 0.2,
        diverging=r.random() < 0.1,
        heal_at_s=r.choice((5.0, 10.0, 30.0, 90.0)),
    )


AIMED = Faults(aimed=1.0, hypervisor_share=0.35, heal_at_s=10.0)
"""Nothing but kills around the switchover: most sequences that matter are made of these."""


class Scenario:
    """See the module. `play` raises InvariantViolation."""

    def __init__(
        self, seed: int, *, faults: Faults | None = None, make_node: type[Node] = Node
    ) -> None:
        self.seed = seed
        self.world = World(seed, faults_of(seed) if faults is None else faults)
        self.nodes = two_nodes(self.world, make_node)
        self.faultless = self.world.faults == Faults()
        self.cancels = self.faultless and seed % 10 == 1
        self.migrations = 0
        self._quiet_since_s: float | None = None

    def play(self) -> str:
        """Where the domain ended: the node's name, or how it was lost ("died", "unprovable")."""
        world = self.world
        world.log("{}", world.faults)
        self._start_faults()
        world.after(0.0, self._guest_works)
        world.after(0.01, self._next_migration)
        world.after(1.0, self._watch)
        world.run(SETTLE_S, step=lambda: checkers.check_step(world))
        end = checkers.check_end(world, self.nodes)
        self._check_faultless(end)
        return end

    # --- what happens by itself ---

    def _guest_works(self) -> None:
        """Whatever guest runs dirties some pages, and writes to the volume."""
        world = self.world
        r = world.random
        for guest in world.guests.values():
            if guest.state is not G.RUNNING:
                continue
            for _ in range(r.randrange(3)):
                page = r.randrange(PAGES)
                guest.write(page)
            if r.random() < 0.3:
                checkers.check_write(world, guest)
                world.volume.last_writer_token = guest.token
        busy = any(self._copies_or_hands_over(node) for node in self.nodes)
        world.after(0.003 + world.delay(0.02) if busy else 0.5, self._guest_works)

    @staticmethod
    def _copies_or_hands_over(node: Node) -> bool:
        return node.session is not None and bool(node.engine)

    def _next_migration(self) -> None:
        """Begin one where the domain runs, as soon as that node has nothing open."""
        world = self.world
        for node in self.nodes:
            guest = world.guests.get(node.name)
            runs = guest is not None and guest.state is G.RUNNING
            if not runs or not node.up or node.session is not None or node.open_entries():
                continue
            self.migrations += 1
            calm = self.faultless
            request = MigrationRequest(
                destination=node.other.name,
                on_timeout=world.random.choice(list(OnTimeout)),
                mode=self._mode(),
                timeout_s=600.0 if calm else world.random.choice((0.05, 20.0, 600.0)),
            )
            node.begin_source(f"m{self.migrations}", request)
            if self.cancels:
                world.after(world.delay(0.15), partial(self._cancel, node))
            elif not calm and world.random.random() < 0.3:
                most_s = world.random.choice((0.2, 3.0, 20.0))
                world.after(world.delay(most_s), partial(node.feed, v.CancelRequested()))
            if self.migrations == 1:
                world.after(world.random.choice((0.3, 3.0)), self._next_migration)
            return
        if world.now_s - world.started_at_s < SECOND_BEFORE_S:
            world.after(0.2 + world.delay(1.0), self._next_migration)

    def _mode(self) -> MigrationMode:
        """Half of the seeds without post-copy, of the others each migration by a die of its own."""
        if self.seed % 2 == 0:
            return MigrationMode.PRECOPY
        return random.Random(f"mode {self.seed} {self.migrations}").choice(list(MigrationMode))

    def _cancel(self, node: Node) -> None:
        """With nothing else broken, a cancel before HANDOFF ends within CANCEL_S."""
        session = node.session
        if not isinstance(session, SourceSession):
            return
        bound = session.cancellable
        node.feed(v.CancelRequested())

        def check() -> None:
            if session.ended_at_s is None:
                raise InvariantViolation(f"cancel: {session.state.value} after {CANCEL_S} s")
            if session.state is not MigrationState.CANCELLED:
                raise InvariantViolation(f"cancel: {session.state.value}, {session.error}")

        if bound:
            self.world.after(CANCEL_S, check)

    def _watch(self) -> None:
        """Stop once all has been quiet for long enough, healed, with both migrations done."""
        world = self.world
        quiet = all(
            node.up and node.session is None and not node.open_entries() for node in self.nodes
        )
        over = N3 in world.guests or (world.memory_lost is not None and not world.guests)
        if quiet and world.healed and (self.migrations == 2 or over):
            self._quiet_since_s = self._quiet_since_s or world.now_s
            if world.now_s - self._quiet_since_s >= QUIET_S:
                world.stopped = True
        else:
            self._quiet_since_s = None
        world.after(1.0, self._watch)

    # --- faults ---

    def _start_faults(self) -> None:
        world = self.world
        faults = world.faults
        if faults.kill_mean_s:
            world.after(0.01 + world.around(faults.kill_mean_s), self._kill_something)
        if faults.partition_mean_s:
            world.after(world.around(faults.partition_mean_s), self._partition)
        if faults.false_alarm_mean_s:
            world.after(world.around(faults.false_alarm_mean_s), self._false_alarm)
        if faults.store_outage_mean_s:
            world.after(world.around(faults.store_outage_mean_s * 3.0), self._store_outage)
        if faults.takeover:
            world.after(world.delay(40.0), self._take_over)

    def _kill_something(self) -> None:
        world = self.world
        if world.healed:
            return
        world.random.choice(self.nodes).kill_randomly()
        # Kills that come fast tell about one migration; later ones only keep it from ending.
        most_s = world.faults.kill_mean_s * (1.0 + world.now_s - world.started_at_s)
        world.after(world.around(most_s), self._kill_something)

    def _partition(self) -> None:
        world = self.world
        names = [node.name for node in self.nodes]
        if world.cut_from or world.healed:
            world.cut_from = set()
            world.pages_cut = False
            world.log("network: back")
        else:
            world.cut_from = set(world.random.choice((names, names[:1], names[1:])))
            world.pages_cut = world.random.random() < 0.5
            world.log("network: lost from {}, pages cut: {}", world.cut_from, world.pages_cut)
        for node in self.nodes:
            # Who hears nothing any more notices; the other side often doesn't.
            if node.other.name in world.cut_from or not world.cut_from:
                node.peer_changed(lost=bool(world.cut_from))
            if node.engine:
                node.soon(v.ChannelNoted(broken=world.pages_cut, detail="partition"))
        if world.cut_from or not world.healed:
            world.after(world.around(world.faults.partition_mean_s), self._partition)

    def _false_alarm(self) -> None:
        world = self.world
        if world.healed:
            return
        node = world.random.choice(self.nodes)
        node.soon(v.PeerLost())
        world.after(world.around(1.0), lambda: node.soon(v.PeerBack()))
        world.after(world.around(world.faults.false_alarm_mean_s), self._false_alarm)

    def _store_outage(self) -> None:
        world = self.world
        world.store_down = not world.store_down and not world.healed
        world.log("store: {}", "down" if world.store_down else "up")
        if world.store_down or not world.healed:
            share = 1.0 if world.store_down else 3.0
            mean_s = world.faults.store_outage_mean_s * share
            world.after(world.around(mean_s), self._store_outage)

    def _take_over(self) -> None:
        """HA: a silent owner is fenced for certain, then its domain starts from disk on N3."""
        world = self.world
        silent = [node for node in self.nodes if not node.up and node.name == world.record.owner]
        if world.healed or world.store_down or not silent:
            return
        silent[0].reboot()
        world.record = world.record.passed_to(N3)
        world.volume.fenced_token = world.record.token
        world.epoch += 1
        world.memory_lost = None  # The guest is another one now: what is left of the old is stale.
        world.guests[N3] = Guest(
            node=N3, token=world.record.token, state=G.RUNNING, memory=[], epoch=world.epoch
        )
        world.log("takeover: {}", world.record)

    # --- seeds without faults ---

    def _check_faultless(self, end: str) -> None:
        if not self.faultless or self.cancels:
            return
        ends = [(node.name, node.ended) for node in self.nodes]
        wanted = {"m1": "completed", "m2": "completed"}
        if end != "n1" or any(each != wanted for _, each in ends):
            raise InvariantViolation(f"no fault, and it didn't complete: {end}, {ends}")


def play(seed: int, *, make_node: type[Node] = Node, faults: Faults | None = None) -> str:
    """Play one seed. On a violation the error carries the transcript."""
    scenario = Scenario(seed, make_node=make_node, faults=faults)
    try:
        return scenario.play()
    except Exception as error:
        transcript = "\n".join(scenario.world.transcript()[-600:])
        raise InvariantViolation(f"{error}\nseed {seed}\n{transcript}") from error
