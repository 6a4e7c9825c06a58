"""A simulated node: its agent (volatile), its journal, its clock, and how processes die."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from migrator.errors import ConflictError, FerryError
from migrator.journal_entry import JournalEntry, answer_without_session, entry_of
from migrator.model import DomainName, DomainState, MigrationRequest, NodeName, OwnershipState, Role
from migrator.ports import DomainEvent, DomainEventKind
from migrator.session import messages as m
from migrator.session import vocabulary as v
from node_agent.restart_notes import RestartNotes
from tests.simulation import effects, post_copy
from tests.simulation.agent import Agent
from tests.simulation.checkers import liveness, writes
from tests.simulation.disk import Disk
from tests.simulation.guests import G, Guest
from tests.simulation.loop import AGENT
from tests.simulation.side import Envelope, Migration, Side
from tests.simulation.world import LONG_DOWN_S

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster, Domain

SILENCE_S = 3.0
"""After which peers miss an agent that says nothing."""


class Node:
    """One node. Without an agent its engines are dead, too; its hypervisors aren't."""

    def __init__(self, cluster: Cluster, name: NodeName) -> None:
        world = cluster.world
        self.cluster = cluster
        self.world = world
        self.name = name
        self.skew_s = world.random.choice((0.0, 0.0, -3.0, 0.4, 7.0))
        drift = world.faults.drift
        self.tick = 1.0 + drift * (2.0 * world.random.random() - 1.0) if drift else 1.0
        """Seconds of the world that a second of this node's clock takes."""
        self.agent: Agent | None = None
        self.up = False
        """The agent runs, and answers."""
        self.held: list[Callable[[], None]] | None = None
        """The agent is stopped: what it will hear when it goes on."""
        self.boot = 1
        self.journal: dict[str, JournalEntry] = {}
        self.durable: dict[str, JournalEntry] = {}
        self.disk = Disk(self)
        self.restarts = RestartNotes(boot_id=self.boot_id)
        """Always durable."""
        self.store_cut = False
        self.storage_cut = False
        self.crashed: set[DomainName] = set()
        self._silent_since_s = world.now_s

    @property
    def clock_s(self) -> float:
        return self.world.now_s / self.tick + self.skew_s

    @property
    def boot_id(self) -> str:
        return f"boot-{self.boot}"

    @property
    def storage_stalled(self) -> bool:
        return self.storage_cut and not self.world.healed

    def heard_for_s(self, now_s: float) -> float:
        """Since when the store has had no heartbeat of it."""
        beats = self.up and not self.store_cut and self.held is None
        return 0.0 if beats else now_s - self._silent_since_s

    @property
    def silent(self) -> bool:
        """Whether others can't ask its agent, or don't because its heartbeats are missing."""
        return (
            not self.up or self.held is not None or self.heard_for_s(self.world.now_s) > SILENCE_S
        )

    def mark_silent(self) -> None:
        self._silent_since_s = self.world.now_s

    def sides(self) -> list[Side]:
        """Those with a session here."""
        return [
            side
            for migration in self.cluster.migrations.values()
            for side in migration.sides.values()
            if side.node is self and side.session is not None
        ]

    def open_entries(self) -> list[JournalEntry]:
        return [entry for entry in self.journal.values() if not entry.ended]

    # --- process life ---

    def boot_up(self) -> None:
        """The first start."""
        self.agent = Agent(self)
        self.agent.spawn(self.agent.start())

    def entries_to_restore(self) -> list[JournalEntry]:
        """Those of migrations that have not ended, oldest first. Reading the journal syncs it."""
        self.durable = dict(self.journal)
        return sorted(self.open_entries(), key=lambda entry: entry.created_at_s)

    def forget(self, migration_id: str) -> None:
        """As of the oldest of very many."""
        self.journal.pop(migration_id, None)
        self.durable.pop(migration_id, None)

    def note_restarts(self, notes: RestartNotes) -> None:
        """What is noted to be started again must be, unless it was taken over meanwhile."""
        for name, wanted in notes.wanted.items():
            domain = self.cluster.domains[DomainName(name)]
            ours = domain.record is not None and domain.record.owner == self.name
            if wanted.token is not None and name not in self.restarts.wanted and ours:
                domain.must_start = True
        self.restarts = notes

    def side_of(self, entry: JournalEntry) -> Side:
        return self.cluster.migrations[entry.migration_id].sides[entry.role]

    def opened(self, restored: list[Side]) -> None:
        """Its start is done: it answers, and what was under way goes on."""
        self.up = True
        self.world.log("{}: the agent is up", self.name)
        for side in restored:
            side.feed(v.Recover())
        self._tell_peers(lost=False)

    def _tell_peers(self, *, lost: bool) -> None:
        for migration in self.cluster.migrations.values():
            for side in migration.sides.values():
                if side.other.node is self:
                    side.soon(v.PeerLost() if lost else v.PeerBack(), 1.0)

    def crash(self, why: str, *, down_s: float = 5.0) -> None:
        """SIGKILL of the agent. It is started again after a while."""
        agent = self.agent
        if agent is None:
            return
        self.world.log("{}: agent killed ({})", self.name, why)
        self.agent = None
        if self.up:
            self.mark_silent()
        self.up = False
        agent.die()
        self.held = None
        self.world.loop.go_on(agent)  # To be cleaned up.
        self.disk.agent_died()
        for migration in self.cluster.migrations.values():
            for side in migration.sides.values():
                if side.node is self and (side.session is not None or side.engine):
                    side.agent_died(why)
        self._tell_peers(lost=True)
        if self.world.chance(self.world.faults.long_down):
            down_s = LONG_DOWN_S
        self.world.after(0.2 + self.world.delay(down_s), self._start_again)

    def _start_again(self) -> None:
        """Not before it can read its journal."""
        if self.disk.hangs:
            self.world.after(0.5, self._start_again)
        else:
            self.boot_up()

    def stop_agent(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after a while. Its hypervisors go on, and its peers notice."""
        agent, world = self.agent, self.world
        if agent is None or not self.up or self.held is not None:
            return
        world.log("{}: agent stopped for {} s", self.name, round(seconds, 3))
        self.mark_silent()
        self.held = []
        world.loop.stop_agent(agent)
        world.after(seconds, lambda: self._go_on(agent))
        world.after(SILENCE_S, lambda: self._miss(agent))

    def _miss(self, agent: Agent) -> None:
        if self.agent is agent and self.held is not None:
            self._tell_peers(lost=True)

    def _go_on(self, agent: Agent) -> None:
        """It hears of everything at once: first what it was told, or first its own timers."""
        held, world = self.held, self.world
        if self.agent is not agent or held is None:
            return
        world.log("{}: the agent goes on", self.name)
        self.held = None
        if world.random.random() < 0.5:
            world.loop.go_on(agent)
        for action in held:
            world.after(0.0, action)
        world.after(0.0, lambda: world.loop.go_on(agent))
        self._tell_peers(lost=False)

    def when_going(self, action: Callable[[], None]) -> None:
        """Now, or as soon as its agent goes on."""
        if self.held is None:
            action()
        else:
            self.held.append(action)

    def reboot(self) -> None:
        """The host dies: agent, engines, hypervisors, and what the journal had in memory."""
        self.world.log("{}: host dies", self.name)
        for side in self.sides():
            assert side.session is not None
            entry = entry_of(side.session, boot_id="")
            side.rebooted_committed |= entry.committed and entry.role is Role.DESTINATION
        for entry in self.open_entries():
            if entry.committed and entry.role is Role.DESTINATION:
                self.cluster.migrations[entry.migration_id].destination.rebooted_committed = True
        for domain in self.cluster.domains.values():
            owned, here = domain.record, self.name in domain.guests
            self.kill_guest(domain, "host died", told=False)
            noted = self.restarts.boot_id == self.boot_id
            if here and domain.died and noted and owned is not None and owned.owner == self.name:
                domain.must_start |= owned.state is OwnershipState.RUNNING
        self.crash("host died", down_s=12.0)
        self.journal = dict(self.durable)
        self.boot += 1
        self.crashed.clear()

    def kill_randomly(self, side: Side | None = None) -> None:
        """Something of this node; an engine or a hypervisor of `side`, where one is meant."""
        faults, chance = self.world.faults, self.world.random.random()
        sides = self.sides()
        if side is None and sides:
            side = self.world.random.choice(sides)
        if chance < faults.hypervisor_share:
            here = [each for each in self.cluster.domains.values() if self.name in each.guests]
            if side is not None:
                self.kill_guest(side.domain, "killed")
            elif here:
                self.kill_guest(self.world.random.choice(here), "killed")
        elif chance < faults.hypervisor_share + faults.reboot_share:
            self.reboot()
        elif side is not None and self.world.random.random() < 0.4:
            side.kill_engine("killed")
        else:
            self.crash("killed")

    # --- hypervisor processes ---

    def kill_guest(
        self, domain: Domain, why: str, *, told: bool = True, stopped: bool = False
    ) -> None:
        """Its process ends; `stopped`: because somebody powered the guest off."""
        guest = domain.guests.pop(self.name, None)
        if guest is None:
            return
        self.world.log(
            "{}: hypervisor of {} gone in {} ({})", self.name, domain.name, guest.state.value, why
        )
        if stopped:
            domain.lose("stopped")
        else:
            liveness.died(domain, guest, why)
        ran = guest.state not in (G.INCOMING, G.LOADED)
        if ran and not stopped and (told or self.agent is None):
            self._note_crash(domain)
        self._gone(domain, guest, told=told, crashed=not stopped)

    def _note_crash(self, domain: Domain) -> None:
        self.crashed.add(domain.name)
        owned = domain.record
        if owned is not None and owned.owner == self.name and domain.died:
            running = owned.state is OwnershipState.RUNNING
            domain.seen_to_crash = running and self.agent is not None and not domain.must_start
            domain.must_start |= running

    def end_guest(self, domain: Domain, guest: Guest) -> None:
        """It is destroyed on purpose."""
        self.world.log("{}: {} destroyed in {}", self.name, domain.name, guest.state.value)
        del domain.guests[self.name]
        liveness.check_destroy(domain, guest, self)
        self._gone(domain, guest, told=True)

    def _gone(self, domain: Domain, guest: Guest, *, told: bool, crashed: bool = False) -> None:
        migration = self.cluster_migration(domain, Role.DESTINATION)
        if told:
            self.guest_event(domain, guest, DomainEventKind.EXITED, crashed=crashed)
        for each in self.cluster.migrations.values():
            if each.domain is domain:
                post_copy.note_loss(each)
        if migration is not None and guest.state in (G.INCOMING, G.LOADED):
            source = migration.source.guest
            if source is not None:
                effects.channel_broke(migration.source, source)

    def cluster_migration(self, domain: Domain, role: Role) -> Migration | None:
        """The newest of that domain in which this node has, or had, that role."""
        for migration in reversed(self.cluster.migrations.values()):
            side = migration.sides[role]
            if migration.domain is domain and side.node is self and side.token_before:
                return migration
        return None

    def guest_event(
        self, domain: Domain, guest: Guest, kind: DomainEventKind, *, crashed: bool = False
    ) -> None:
        """A monitor's events arrive in their order, at whoever listens then."""
        world, agent = self.world, self.agent
        at_s = max(world.now_s + world.delay(0.002), guest.events_due_s)
        guest.events_due_s = at_s
        event = DomainEvent(domain=domain.name, kind=kind, at_s=self.clock_s, crashed=crashed)
        if agent is not None and kind is DomainEventKind.EXITED:
            agent.hypervisor.unheard.add(domain.name)

        def deliver() -> None:
            if agent is None or self.agent is not agent:
                return
            token = AGENT.set(agent)
            try:
                if kind is DomainEventKind.EXITED:
                    agent.hypervisor.unheard.discard(domain.name)
                for callback in tuple(agent.hypervisor.subscribers):
                    callback(event)
                for side in self.sides():
                    if side.domain is domain:
                        side.guest_reported(event)
            finally:
                AGENT.reset(token)

        world.after(at_s - world.now_s, lambda: self.when_going(deliver))

    def guest_writes(self, domain: Domain, guest: Guest) -> None:
        """To its volume; a write that is refused stops it (werror=stop)."""
        if self.storage_stalled:
            return  # It waits.
        if domain.volume.accepts(guest):
            writes.check_write(domain, guest)
            return
        self.world.log("{}: a write of {} is refused", self.name, domain.name)
        guest.state = G.IO_ERROR
        self.guest_event(domain, guest, DomainEventKind.IO_ERROR)

    # --- migrations ---

    async def migrate(
        self, domain: Domain, destination: Node, request: MigrationRequest
    ) -> Migration:
        """As `MigrationManager.create`. ConflictError, StoreError."""
        agent = self.agent
        assert agent is not None
        if (await agent.hypervisor.inspect(domain.name)).state is not DomainState.RUNNING:
            raise ConflictError(f"{domain.name} doesn't run here")
        cluster = self.cluster
        migration = Migration(f"m{len(cluster.migrations) + 1}", domain, self, destination)
        cluster.migrations[migration.id] = migration
        await agent.locks.claim_for_migration(domain.name, migration.id, wait_s=1.0)
        store, flips = cluster.store, cluster.store.flips
        try:
            owned = await agent.ownership.read(domain.name)
            if store.outdated or store.flips != flips:
                raise ConflictError("its operators see that the store is another one")
            if (
                owned is None
                or owned.owner != self.name
                or owned.state is not OwnershipState.RUNNING
            ):
                raise ConflictError(f"{domain.name} was stopped or moved meanwhile")
            await agent.domains.ownership.older.refuse_move(domain.name, owned)
        except FerryError:
            agent.locks.release_from_migration(domain.name, migration.id)
            raise
        side = migration.source
        self.world.log("{}: {} of {} begins: {}", self.name, migration.id, domain.name, request)
        side.begin(cluster.sessions.source(side, owned.token, request))
        side.feed(v.Begin())
        return migration

    def receive(self, envelope: Envelope) -> None:
        self.when_going(lambda: self._receive(envelope))

    def _receive(self, envelope: Envelope) -> None:
        if not self.up:
            return
        message = envelope.message
        migration = self.cluster.migrations[envelope.migration_id]
        side = migration.sides[envelope.role]
        if side.session is not None:
            side.feed(v.Received(message=message))
            return
        entry = self.journal.get(envelope.migration_id)
        if entry is None and isinstance(message, m.Prepare):
            agent = self.agent
            assert agent is not None
            agent.spawn(self._admit(agent, side, envelope, message))
            return
        answer = answer_without_session(envelope.role, entry, message)
        if answer is not None:
            self.cluster.answer(self, envelope, answer)

    async def _admit(
        self, agent: Agent, side: Side, envelope: Envelope, prepare: m.Prepare
    ) -> None:
        """As `MigrationManager._begin_destination`."""
        if side.session is not None:  # Several came at once.
            side.feed(v.Received(message=prepare))
            return
        reasons = await agent.admissions.admit(side.migration_id, envelope.sender, prepare)
        if reasons is None:
            return
        if reasons:
            self.cluster.answer(self, envelope, m.Refused(reasons=tuple(reasons)))
            return
        side.begin(self.cluster.sessions.destination(side, prepare))
        side.feed(v.Begin())
