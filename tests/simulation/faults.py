"""What goes wrong by itself in a cluster, and the mix of faults of a seed."""

from __future__ import annotations

import random
from dataclasses import replace

from migrator.model import NodeName
from migrator.session import vocabulary as v
from tests.simulation.cluster import Cluster
from tests.simulation.node import Node
from tests.simulation.world import Faults

AIMED = Faults(aimed=1.0, hypervisor_share=0.35, heal_at_s=10.0)
"""Nothing but kills around the switchover: most sequences that matter are made of these."""
HANGING_DISKS = Faults(
    disk_hang=0.25,
    store_unknown=0.3,
    store_late=0.9,
    loss=0.3,
    aimed=0.5,
    hypervisor_share=0.5,
    death_before_resume=0.2,
    kill_mean_s=6.0,
    heal_at_s=40.0,
)
NAMED = {
    "kills": AIMED,
    "kills, lost messages": replace(AIMED, hypervisor_share=0.5, loss=0.3),
    "kills, failures": replace(AIMED, hypervisor_share=0.5, command_failure=0.2),
    "kills, stalls": replace(AIMED, hypervisor_share=0.5, stall=0.3, hang=0.1),
    "late writes": Faults(
        store_unknown=0.5, store_late=0.9, aimed=0.5, hypervisor_share=0.5, loss=0.5, heal_at_s=12.0
    ),
    "deaths before resumes": Faults(
        death_before_resume=0.5, loss=0.3, kill_mean_s=1.0, store_unknown=0.3, heal_at_s=10.0
    ),
    "failing resumes": Faults(
        resume_failure=0.5, aimed=0.5, hypervisor_share=0.5, loss=0.5, heal_at_s=10.0
    ),
    "crashes": Faults(
        crash_per_command=0.05, kill_mean_s=0.4, hypervisor_share=0.9, heal_at_s=10.0
    ),
    "stalled device states": Faults(aimed=0.5, hypervisor_share=0.5, stall=0.2, heal_at_s=10.0),
    "disorder": Faults(
        straggler=0.5, duplicate=0.8, delay_s_max=1.5, command_failure=0.05, heal_at_s=30.0
    ),
    "takeovers": Faults(
        takeover=True, long_down=0.6, aimed=0.5, reboot_share=0.1, loss=0.2, heal_at_s=90.0
    ),
    "hanging disks": HANGING_DISKS,
}
"""What each of the rarer rules is for. Chance alone brings such mixes about in few seeds of
thousands."""
_KILLS = tuple(NAMED)[:4]
_OTHERS = tuple(NAMED)[4:11]


def name_of(seed: int) -> str | None:
    """Which of the NAMED mixes a seed has: three tenths have one, and a fortieth hanging disks."""
    match seed % 10:
        case 2:
            return _KILLS[seed // 10 % len(_KILLS)]
        case 4:
            return _OTHERS[seed // 10 % len(_OTHERS)]
        case 9:
            return _OTHERS[(seed // 10 + 3) % len(_OTHERS)]
        case 7 if seed % 40 == 37:
            return "hanging disks"
        case _:
            return None


def faults_of(seed: int) -> Faults:
    """The mix of faults of a seed. A fifth has none."""
    if seed % 10 < 2:
        return Faults()
    name = name_of(seed)
    if seed % 50 == 23:  # A place of their own: the others stay what they were.
        return replace(_mixed(seed), store_back_mean_s=3.0, store_slow=0.2)
    if seed % 50 == 43:
        return replace(_mixed(seed), paused=0.3, forgetful=True, heal_at_s=90.0)
    if seed % 50 == 33:
        return replace(_mixed(seed), store_restored=True, heal_at_s=60.0)
    return _mixed(seed) if name is None else NAMED[name]


def _mixed(seed: int) -> Faults:
    r = random.Random(f"faults {seed}")
    scale = r.choice((0.2, 0.5, 1.0, 1.0, 2.0))

    def rate(most: float, often: float = 0.5) -> float:
        return scale * most * r.random() if r.random() < often else 0.0

    def mean(least_s: float, often: float) -> float:
        return least_s / (scale * (0.1 + r.random())) if r.random() < often else 0.0

    takeover = r.random() < 0.3
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
        store_outage_mean_s=mean(1.0, 0.2) or mean(10.0, 0.1),
        storage_stall_mean_s=mean(1.0, 0.2),
        command_failure=rate(0.1, 0.4),
        journal_failure=rate(0.3, 0.3),
        fence_failure=rate(0.6, 0.2) or (1.0 if r.random() < 0.04 else 0.0),
        resume_failure=rate(0.6, 0.3),
        death_before_resume=r.choice((0.0, 0.0, 0.0, 0.1, 0.5)),
        hang=rate(0.1, 0.3),
        stall=rate(0.1, 0.3),
        aimed=rate(0.7, 0.6),
        long_down=0.5 if takeover else rate(0.2, 0.2),
        takeover=takeover,
        drift=r.choice((0.0, 0.0, 0.001, 0.05)),
        diverging=r.random() < 0.1,
        heal_at_s=r.choice((5.0, 10.0, 30.0, 60.0)),
    )


class Injector:
    """Starts what goes on by itself: kills, partitions, outages, stalls."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.world = cluster.world
        self.nodes = list(cluster.nodes.values())

    def start(self) -> None:
        world = self.world
        faults = world.faults
        if faults.kill_mean_s:
            world.after(0.05 + world.around(faults.kill_mean_s), self._kill_something)
        if faults.partition_mean_s:
            world.after(world.around(faults.partition_mean_s), self._partition)
        if faults.false_alarm_mean_s:
            world.after(world.around(faults.false_alarm_mean_s), self._false_alarm)
        if faults.store_outage_mean_s:
            world.after(world.around(faults.store_outage_mean_s * 3.0), self._store_outage)
        if faults.store_back_mean_s:
            world.after(world.around(faults.store_back_mean_s), self._store_goes_back)
            world.after(faults.heal_at_s, self._put_store_right)
        if faults.storage_stall_mean_s:
            world.after(world.around(faults.storage_stall_mean_s * 3.0), self._storage_stall)

    def _busy(self) -> list[Node]:
        """Where something is under way: what happens elsewhere tells little."""
        return [node for node in self.nodes if node.sides()] or self.nodes

    def _kill_something(self) -> None:
        world = self.world
        if world.healed:
            return
        node = world.random.choice(self._busy() if world.random.random() < 0.8 else self.nodes)
        node.kill_randomly()
        # Kills that come fast tell about one migration; later ones only keep it from ending.
        most_s = world.faults.kill_mean_s * (1.0 + world.elapsed_s)
        world.after(world.around(most_s), self._kill_something)

    def _partition(self) -> None:
        """Of one or of both directions between two nodes; the pages may be cut off, too."""
        world, cluster = self.world, self.cluster
        before = set(cluster.cut)
        if cluster.cut or world.healed:
            cluster.cut.clear()
            cluster.pages_cut.clear()
            world.log("network: back")
        else:
            one, other = self._two_nodes()
            both = [(one.name, other.name), (other.name, one.name)]
            cluster.cut.update(world.random.choice((both, both[:1], both[1:])))
            if world.random.random() < 0.5:
                cluster.pages_cut.add(frozenset((one.name, other.name)))
            world.log("network: cut {}, pages: {}", sorted(cluster.cut), bool(cluster.pages_cut))
        self._tell(before)
        if cluster.cut or not world.healed:
            world.after(world.around(world.faults.partition_mean_s), self._partition)

    def _two_nodes(self) -> tuple[Node, Node]:
        busy = [migration for migration in self.cluster.migrations.values() if not _over(migration)]
        if busy:
            migration = self.world.random.choice(busy)
            return migration.source.node, migration.destination.node
        one, other = self.world.random.sample(self.nodes, 2)
        return one, other

    def _tell(self, before: set[tuple[NodeName, NodeName]]) -> None:
        """Who hears nothing any more notices; the other side often doesn't."""
        cluster = self.cluster
        for migration in cluster.migrations.values():
            for side in migration.sides.values():
                link = (side.other.node.name, side.node.name)
                if (link in before) != (link in cluster.cut):
                    lost = link in cluster.cut
                    side.soon(v.PeerLost() if lost else v.PeerBack(), 1.0)
                    if side.engine:
                        side.soon(v.ChannelNoted(broken=not side.pages_flow, detail="partition"))

    def _false_alarm(self) -> None:
        world = self.world
        if world.healed:
            return
        for side in world.random.choice(self._busy()).sides():
            side.soon(v.PeerLost())
            world.after(world.around(1.0), lambda side=side: side.soon(v.PeerBack()))  # type: ignore[misc]
        world.after(world.around(world.faults.false_alarm_mean_s), self._false_alarm)

    def _store_outage(self) -> None:
        """Of the store, or of one node's way to it."""
        world, store = self.world, self.cluster.store
        cut = [node for node in self.nodes if node.store_cut]
        out = store.down or bool(cut)
        if out or world.healed:
            store.down = False
            for node in cut:
                node.store_cut = False
        elif world.random.random() < 0.5:
            store.down = True
        else:
            node = world.random.choice(self._busy())
            node.mark_silent()
            node.store_cut = True
        out = store.down or any(node.store_cut for node in self.nodes)
        world.log("store: {}", "out" if out else "back")
        if out or not world.healed:
            share = 1.0 if out else 3.0
            world.after(world.around(world.faults.store_outage_mean_s * share), self._store_outage)

    def _store_goes_back(self) -> None:
        """Somebody restores an older copy of it, sees that, and puts it right."""
        world, store = self.world, self.cluster.store
        if store.went_back:
            self._put_store_right()
        elif not world.healed:
            store.went_back = True
            store.flips += 1
            world.log("store: an older one")
        if not world.healed:
            share = 1.0 if store.went_back else 2.0
            world.after(world.around(world.faults.store_back_mean_s * share), self._store_goes_back)

    def _put_store_right(self) -> None:
        """What was to be started again may be forgotten by now: by that store it wasn't here."""
        store = self.cluster.store
        if not store.went_back:
            return
        store.went_back = False
        store.flips += 1
        self.world.log("store: put right")
        for domain in self.cluster.domains.values():
            domain.must_start = domain.seen_to_crash = False

    def _storage_stall(self) -> None:
        """Of the storage, or of one node's way to it."""
        world = self.world
        stalled = [node for node in self.nodes if node.storage_cut]
        if stalled or world.healed:
            for node in stalled:
                node.storage_cut = False
        elif world.random.random() < 0.5:
            for node in self.nodes:
                node.storage_cut = True
        else:
            world.random.choice(self._busy()).storage_cut = True
        out = [node.name for node in self.nodes if node.storage_cut]
        world.log("storage: stalled for {}", out)
        if out or not world.healed:
            share = 1.0 if out else 3.0
            world.after(
                world.around(world.faults.storage_stall_mean_s * share), self._storage_stall
            )


def _over(migration: object) -> bool:
    sides = migration.sides.values()  # type: ignore[attr-defined]
    return all(side.session is None for side in sides)
