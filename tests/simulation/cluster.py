"""A simulated cluster: 3 to 7 nodes, several domains, one store, one storage, one network."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from migrator.model import (
    DiskSpec,
    DomainName,
    DomainSpec,
    FencingToken,
    NodeName,
    OwnershipRecord,
    OwnershipState,
    Role,
)
from migrator.session import messages as m
from node_agent.resources import DOMAINS, DomainRecord
from node_agent.state.ownership import PREFIX as OWNERSHIP
from node_agent.state.port import Entry
from node_agent.state.typed import _encoder, decode
from tests.simulation.checkers import one_runner
from tests.simulation.guests import PAGES, G, Guest
from tests.simulation.node import Node
from tests.simulation.side import Envelope, Migration, Sessions
from tests.simulation.storage import Volume
from tests.simulation.store import StoreData
from tests.simulation.world import STRAGGLER_S, World

FENCED, SHARED = "fenced", "shared"
"""Two pools: one whose storage checks who writes, and a folder that every node mounts."""


class Domain:
    """What is true of one domain, whoever knows it."""

    def __init__(self, world: World, spec: DomainSpec, owner: NodeName) -> None:
        self.world = world
        self.spec = spec
        self.name = DomainName(spec.name)
        self.volume = Volume(world, enforces=spec.disks[0].pool == FENCED)
        self.record: OwnershipRecord | None = None
        """As the store has it."""
        self.taken_over_under = 0
        """The newest token of a takeover."""
        self.guests: dict[NodeName, Guest] = {}
        self.store_restored = False
        """From an older snapshot: the record may be older than the guest."""
        self.epoch = 0
        """Counts the times that vCPUs were set going: a copy of another epoch is stale."""
        self.paused_memory: list[int] | None = None
        self.memory_lost: str | None = None
        """Why invariant 4 makes its exception (`checkers.liveness`). A start ends it."""
        self.losses: list[str] = []
        self.must_start = False
        """Its memory died with the host that was its owner, or an agent noted to start it again."""
        self.seen_to_crash = False
        """That is why it must start: its owner's agent lived."""
        self.volume.opened[owner] = 1
        self.volume.fence(owner, FencingToken(1))
        self.guests[owner] = Guest(
            node=owner,
            token=1,
            state=G.RUNNING,
            memory=[0] * PAGES,
            epoch=0,
            spec=spec,
            opened_token=1,
        )

    @property
    def running(self) -> Guest | None:
        """The one that computes and may write."""
        for guest in self.guests.values():
            if guest.state is G.RUNNING and self.volume.accepts(guest):
                return guest
        return None

    @property
    def died(self) -> bool:
        """A fault took its memory."""
        return (self.memory_lost or "").startswith("died")

    def restored(self, record: OwnershipRecord | None) -> None:
        """The store was, from an older snapshot. What was to be started wasn't here by that.

        Nor was a takeover of after the snapshot, where no fence tells of it either.
        """
        self.record, self.store_restored = record, True
        self.must_start = self.seen_to_crash = False
        self.taken_over_under = 0
        guest = self.running
        if guest is None or not guest.deposed:
            return
        if record is None or record.token <= guest.token:
            self._reinstate(guest)

    def _reinstate(self, guest: Guest) -> None:
        """Nobody has run since: who runs after it fences first, and its writes are let in."""
        self.world.log("{}: the takeover of {} is forgotten", guest.node, self.name)
        guest.deposed, guest.epoch = False, self.epoch
        self.memory_lost = None

    def is_newer(self, guest: Guest) -> bool:
        """Its store was restored from before that guest's start here."""
        older = self.record is None or self.record.token < guest.token
        return self.store_restored and older and not guest.deposed

    def lose(self, kind: str, detail: str = "") -> None:
        """Its memory is gone, or nobody may use it; the first word on that counts."""
        if self.memory_lost is None:
            self.memory_lost = f"{kind}: {detail}" if detail else kind
            self.losses.append(kind)
            self.world.log("{} lost, {}", self.name, self.memory_lost)

    def begin_anew(self) -> None:
        """It boots: the guest is another one now, and what is left of the old one is stale."""
        self.memory_lost = None

    def left_stopped(self) -> None:
        """It was started again too often, or an operator doesn't want it."""
        self.must_start = False

    def depose(self) -> None:
        """It was taken over: what there is of it is stale from now on, and so is what starts late.

        A takeover can stand still with its agent until another one has come by.
        """
        if self.record is not None:
            self.taken_over_under = self.record.token
        self.epoch += 1
        self.must_start = False
        self.lose("taken over")
        for guest in self.guests.values():
            guest.deposed = True

    def set_running(self, guest: Guest) -> None:
        """vCPUs are set going."""
        if not guest.deposed:
            self.epoch += 1
            guest.epoch = self.epoch
            self.must_start = False
        guest.state = G.RUNNING
        guest.begun = False
        one_runner.check(self)


class Cluster:
    """See the module. `sessions` makes the sessions; mutants give another one."""

    def __init__(
        self,
        world: World,
        *,
        nodes: int,
        domains: int,
        sessions: Sessions | None = None,
        make_node: type[Node] = Node,
    ) -> None:
        self.world = world
        self.sessions = sessions or Sessions()
        self.store = StoreData(world, self._on_write)
        self.domains: dict[DomainName, Domain] = {}
        self.migrations: dict[str, Migration] = {}
        self.cut: set[tuple[NodeName, NodeName]] = set()
        """Directed: what the first sends to the second is lost."""
        self.pages_cut: set[frozenset[NodeName]] = set()
        self.on_event: list[Callable[[str, str], None]] = []
        names = [NodeName(f"n{number}") for number in range(1, nodes + 1)]
        for number in range(domains):
            self._make_domain(number, world.random.choice(names))
        self.store.older = self._older_copy(names)
        self.nodes = {name: make_node(self, name) for name in names}
        for node in self.nodes.values():
            node.boot_up()

    def _make_domain(self, number: int, owner: NodeName) -> None:
        name = f"vm{number + 1}"
        pool = SHARED if self.world.random.random() < 0.3 else FENCED
        spec = DomainSpec(
            name=name,
            memory_bytes=64 * 1024**2,
            machine="q35",
            disks=(DiskSpec(pool=pool, volume=name),),
        )
        domain = self.domains[DomainName(name)] = Domain(self.world, spec, owner)
        record = OwnershipRecord(domain=name, token=1, owner=owner, state=OwnershipState.RUNNING)
        self.store.write(f"{DOMAINS}{name}", _encoder.encode(_defined(spec)))
        self.store.write(f"{OWNERSHIP}{name}", _encoder.encode(record))
        assert domain.record == record

    def _older_copy(self, names: Sequence[NodeName]) -> Mapping[str, Entry]:
        """Of the store, of a time before this story: each domain was somebody's, or stopped, or
        had no record: it had never been started, or the store was wiped.
        """
        dice = random.Random(f"older {self.world.seed}")
        older = dict(self.store.entries)
        for name in self.domains:
            state = dice.choice((OwnershipState.RUNNING, OwnershipState.STOPPED, None))
            if state is None:
                del older[f"{OWNERSHIP}{name}"]
                continue
            record = OwnershipRecord(domain=name, token=0, owner=dice.choice(names), state=state)
            key = f"{OWNERSHIP}{name}"
            older[key] = Entry(key=key, value=_encoder.encode(record), revision=-1)
        return older

    def _on_write(self, key: str, value: bytes | None, takeover: bool) -> None:
        """The store was written: keep the domain's record in view, and look at invariant 1."""
        if not key.startswith(OWNERSHIP):
            return
        domain = self.domains[DomainName(key.removeprefix(OWNERSHIP))]
        before = domain.record
        after = domain.record = None if value is None else decode(key, value, OwnershipRecord)
        moved = before is not None and after is not None and before.owner != after.owner
        if moved and domain.seen_to_crash:
            # If the other copy dies, too, unseen, and before it ran, nobody can know that.
            domain.must_start = domain.seen_to_crash = False
        running = domain.record is not None and domain.record.state is OwnershipState.RUNNING
        if running and (takeover or self._starts_over_a_silent_one(domain)):
            domain.depose()
        self.world.log("record: {}", domain.record)
        one_runner.check(domain)

    def _starts_over_a_silent_one(self, domain: Domain) -> bool:
        """A restored store doesn't know of its guest, whose node can't be asked: it is shut out."""
        here = domain.record.owner if domain.record is not None else ""
        others = [guest for guest in domain.guests.values() if guest.node != here]
        behind = domain.store_restored and domain.volume.enforces
        return behind and any(
            guest.state in (G.RUNNING, G.IO_ERROR)
            and not guest.deposed
            and guest.token + 1 == (domain.record.token if domain.record else 0)
            and self.nodes[guest.node].silent
            for guest in others
        )

    # --- the network ---

    def reaches(self, sender: NodeName, receiver: NodeName) -> bool:
        return self.world.healed or (sender, receiver) not in self.cut

    def pages_flow(self, one: NodeName, other: NodeName) -> bool:
        return self.world.healed or frozenset((one, other)) not in self.pages_cut

    def send(self, sender: Node, envelope: Envelope) -> None:
        """From one agent to the other: lost, doubled, late, out of order."""
        world, faults = self.world, self.world.faults
        receiver = self.nodes[envelope.receiver]
        for _ in range(1 + world.chance(faults.duplicate)):
            if (
                not receiver.up
                or not self.reaches(sender.name, receiver.name)
                or world.chance(faults.loss)
            ):
                world.log("{}: lost {}", sender.name, envelope.message)
                continue
            late = world.chance(faults.straggler)
            seconds = world.delay(STRAGGLER_S if late else faults.delay_s_max)
            world.after(seconds, lambda: receiver.receive(envelope))

    def answer(self, node: Node, envelope: Envelope, message: m.SessionMessage) -> None:
        role = Role.SOURCE if envelope.role is Role.DESTINATION else Role.DESTINATION
        reply = Envelope(envelope.migration_id, role, message, node.name, envelope.sender)
        self.send(node, reply)


def _defined(spec: DomainSpec) -> DomainRecord:
    return DomainRecord(spec=spec, defined_at_s=0.0)
