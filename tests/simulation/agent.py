"""An agent's life in the simulation: its production parts, made anew at each start.

Production: `DomainService`, `DomainOwnership`, `DomainTakeover`, `LaunchBuilder`, `DomainLocks`,
`StoreOwnership`, `DomainRecords`, `NodeSite`, `DestinationCheck`, the admission of migrations, and
the lane that the runner performs a guest's commands in. Simulated: the drivers under them. When the
agent dies its tasks are cancelled, and nothing that they do in cleaning up has an effect any more.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from migrator.errors import FerryError, HypervisorError, NotFoundError, StorageError
from migrator.model import (
    DomainName,
    DomainSpec,
    DomainState,
    DomainStatus,
    FencingToken,
    HypervisorCapabilities,
    PoolName,
)
from migrator.ports import (
    AbortOutcome,
    DomainEvent,
    GuestMemory,
    HypervisorDriver,
    Launch,
)
from netfabric.simulated.driver import SimulatedFabric
from node_agent.domain_locks import DomainLocks
from node_agent.domain_records import DomainRecords
from node_agent.domain_restart import RestartPolicy
from node_agent.domain_takeover import DomainTakeover
from node_agent.domains import DomainService
from node_agent.memory_room import MemoryRoom
from node_agent.migrations.admission import Admissions
from node_agent.migrations.cutover import CutoverService
from node_agent.migrations.moments import MigrationMoments
from node_agent.migrations.site import NodeSite
from node_agent.older_store import OtherNodes
from node_agent.peers.hub import PeerHub
from node_agent.state.ownership import StoreOwnership
from node_agent.state.typed import TypedStore
from tests.simulation import stand_ins
from tests.simulation.checkers import writes
from tests.simulation.guests import PAGES, STATES, G, Guest
from tests.simulation.loop import AGENT, AgentDead
from tests.simulation.neighbours import CAPABILITIES, Neighbours
from tests.simulation.storage import SimulatedVolumes
from tests.simulation.store import SimulatedStore

if TYPE_CHECKING:
    from tests.simulation.cluster import Domain
    from tests.simulation.node import Node

T = TypeVar("T")
CALL_S = 0.001
SWEEP_S = 20.0


class Agent:
    """One incarnation. `restore` and `open` in the order of the production agent."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.world = node.world
        self.alive = True
        self.tasks: set[asyncio.Task[None]] = set()
        store = SimulatedStore(self, node.cluster.store)
        typed = TypedStore(store)
        self.hypervisor = SimulatedHypervisor(self)
        fabric = SimulatedFabric(node.name)  # Guests have no NICs here.
        domains = node.cluster.domains.values()
        volumes = {str(domain.name): domain.volume for domain in domains}
        self.pools = pools = {
            PoolName("fenced"): SimulatedVolumes(self, volumes, enforces=True),
            PoolName("shared"): SimulatedVolumes(self, volumes, enforces=False),
        }
        events = stand_ins.QuietEvents(self)
        neighbours = Neighbours(self)
        self.ownership = StoreOwnership(store)
        self.records = DomainRecords(typed)
        self.locks = DomainLocks()
        self.domains = DomainService(
            node.name,
            hypervisor=self.hypervisor,
            pools=pools,
            fabric=fabric,
            ownership=self.ownership,
            records=self.records,
            events=events,
            pin_machine=_as_it_is,
            locks=self.locks,
            restart=RestartPolicy(
                boot_id=node.boot_id,
                store=stand_ins.SimulatedRestarts(self),
                clock=lambda: node.clock_s,
                monotonic=lambda: node.clock_s,
            ),
            clock=lambda: node.clock_s,
            others=OtherNodes(node.name, neighbours.heartbeats, neighbours.guests_of),
        )
        self.domains.ownership._sweep_s = SWEEP_S
        self.admissions = Admissions(self.domains, self.hypervisor, self.ownership)
        self.takeover = DomainTakeover(
            node.name,
            domains=self.domains,
            pools=pools,
            ownership=self.ownership,
            records=self.records,
            nodes=neighbours.heartbeats,
            reach=cast(Any, None),  # Nobody's word is taken here.
            events=events,
            clock=lambda: node.clock_s,
        )
        check = stand_ins.UnencryptedCheck(
            memory_room=MemoryRoom(node.name, self.hypervisor, self.records, 1 << 40),
            hypervisor=self.hypervisor,
            pools=pools,
            fabric=fabric,
            tls=lambda: None,
            state=Path(),
        )
        self.arrivals = stand_ins.SimulatedArrivals(self)
        self.site = NodeSite(
            hub=cast(PeerHub, None),  # Messages go by the simulated network.
            hypervisor=self.hypervisor,
            fabric=fabric,
            domains=self.domains,
            check=check,
            moments=cast(MigrationMoments, stand_ins.NoHooks()),
            ownership=self.ownership,
            cutover=cast(CutoverService, stand_ins.NoNetwork()),
            arrivals=self.arrivals,
            storage=stand_ins.NoStorageLooks(node.name, cast(PeerHub, None), pools),
        )

    # --- tasks ---

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it while the agent lives. A FerryError of it is only noted."""
        context = contextvars.copy_context()
        context.run(AGENT.set, self)
        task = self.world.loop.create_task(self._logged(work), context=context)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        task.add_done_callback(lambda _: work.close())  # The agent may die before it begins.

    async def _logged(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except FerryError as error:
            if self.alive:
                self.world.log("{}: {}", self.node.name, error)

    def die(self) -> None:
        """SIGKILL: no task goes on, and what they clean up has no effect."""
        self.alive = False
        ownership, recovery = self.domains.ownership, self.domains._io_recovery
        recovery._again.clear()
        tasks = self.tasks | ownership._tasks | set(recovery._watching.values())
        if (closing := self.domains._launches.closings._trying._task) is not None:
            tasks.add(closing)
        for task in sorted(tasks, key=lambda task: task.get_name()):
            task.cancel()

    async def trip(self, most_s: float) -> None:
        """Wait for a part of `most_s`. AgentDead if the agent is gone."""
        await self.call(_nothing, self.world.delay(most_s))

    async def call(self, effect: Callable[[], T], seconds: float) -> T:
        """`effect` after so many seconds, also if nobody waits for it any more by then."""
        if not self.alive:
            raise AgentDead("the agent is dead")
        done: asyncio.Future[T] = self.world.loop.create_future()

        def act() -> None:
            try:
                result = effect()
            except FerryError as error:
                if not done.done():
                    done.set_exception(error)
                return
            if not done.done():
                done.set_result(result)

        self.world.after(seconds, act)
        return await done

    # --- start ---

    async def start(self) -> None:
        """As `node_agent.agent` does: claims first, then processes and records are compared."""
        node = self.node
        claimed, sides = set(), []
        for entry in node.entries_to_restore():
            side = node.side_of(entry)
            await self.locks.claim_for_migration(side.domain.name, side.migration_id)
            claimed.add(side.domain.name)
            side.restore(entry)
            sides.append(side)
        while True:  # Bounded by the faults' end. Production's supervisor starts the agent again.
            try:
                await self.domains.open(await self.hypervisor.open(), claimed)
                break
            except FerryError as error:
                if not self.alive:
                    raise
                self.world.log("{}: the start failed: {}", node.name, error)
                await self.domains.close()
                await asyncio.sleep(2.0)
        node.opened(sides)


def _nothing() -> None:
    pass


async def _as_it_is(machine: str) -> str:
    return machine


class SimulatedHypervisor(HypervisorDriver):
    """What domain operations need of a hypervisor. A session's own commands are in `effects`."""

    name: ClassVar[str] = "simulated"

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.subscribers: list[Callable[[DomainEvent], None]] = []
        self.unheard: set[DomainName] = set()
        """Their processes are gone, and the event that says so is on its way."""
        self.memory_ahead: dict[DomainName, list[int]] = {}
        """Made before the destination that will take it."""

    def _domain(self, name: str) -> Domain:
        return self._agent.node.cluster.domains[DomainName(name)]

    def _here(self, name: str) -> Guest | None:
        return self._domain(name).guests.get(self._agent.node.name)

    async def _call(self, effect: Callable[[], T]) -> T:
        agent = self._agent
        world = agent.world
        fails = world.chance(world.faults.command_failure)
        happens = not fails or world.random.random() < 0.5

        def act() -> T:
            result = effect() if happens else None
            if fails or result is None:
                raise HypervisorError("simulated")
            return result

        return await agent.call(act, 0.0002 + world.delay(CALL_S))

    async def open(self) -> Sequence[DomainName]:
        await self._agent.trip(CALL_S)
        here = self._agent.node.name
        return [
            each.name for each in self._agent.node.cluster.domains.values() if here in each.guests
        ]

    async def close(self) -> None: ...

    def crashed(self) -> Collection[DomainName]:
        return sorted(self._agent.node.crashed)

    async def capabilities(self) -> HypervisorCapabilities:
        return CAPABILITIES

    def subscribe(self, callback: Callable[[DomainEvent], None]) -> Callable[[], None]:
        self.subscribers.append(callback)
        return lambda: self.subscribers.remove(callback)

    async def launched_token(self, domain: DomainName) -> FencingToken | None:
        guest = self._here(domain)
        return None if guest is None else FencingToken(guest.opened_token)

    async def start(self, launch: Launch) -> None:
        domain = self._domain(launch.spec.name)

        def effect() -> Guest:
            guest = self._spawn(launch, G.INCOMING, [0] * PAGES)
            guest.doomed = True  # Until its start has succeeded.
            guest.deposed = launch.token < domain.taken_over_under
            if not guest.deposed:  # Else its agent stood still meanwhile, and ends it.
                domain.begin_anew()
                writes.check_start(domain, guest)
            domain.set_running(guest)
            self._agent.world.log("{}: {} boots", guest.node, domain.name)
            return guest

        guest = await self._call(effect)
        guest.doomed = False

    async def make_memory_ahead(self, spec: DomainSpec) -> bool:
        name = DomainName(spec.name)
        self.memory_ahead.pop(name, None)
        if not stand_ins.takes_pages_early(self._agent):
            return False
        self.memory_ahead[name] = [-1] * PAGES
        return True

    async def drop_memory_ahead(self, domain: DomainName) -> None:
        self.memory_ahead.pop(domain, None)

    async def start_incoming(self, launch: Launch) -> None:
        name = DomainName(launch.spec.name)
        early = self.memory_ahead.get(name)
        memory = [-1] * PAGES if early is None else early
        await self._call(lambda: self._spawn(launch, G.INCOMING, memory))
        self.memory_ahead.pop(name, None)
        if early is not None:
            await stand_ins.come_up(self._agent, launch.spec.name)

    def _spawn(self, launch: Launch, state: G, memory: list[int]) -> Guest:
        domain, node = self._domain(launch.spec.name), self._agent.node.name
        if not self._agent.alive:
            raise AgentDead("the agent is dead")
        if node in domain.guests:
            raise HypervisorError("the domain is here")
        self._agent.node.crashed.discard(domain.name)
        guest = domain.guests[node] = Guest(
            node=node,
            token=launch.token,
            state=state,
            memory=memory,
            epoch=-1,
            spec=launch.spec,
            opened_token=launch.token,
        )
        return guest

    async def stop(self, domain: DomainName, *, timeout_s: float) -> bool:
        def effect() -> bool:
            guest = self._here(domain)
            if guest is None:
                raise NotFoundError("no such domain")
            guest.doomed = True
            self._agent.node.kill_guest(self._domain(domain), "powered off", stopped=True)
            return True

        return await self._call(effect)

    async def destroy(self, domain: DomainName) -> None:
        def effect() -> bool:
            guest = self._here(domain)
            if guest is not None:
                self._agent.node.end_guest(self._domain(domain), guest)
            return True

        await self._call(effect)

    async def forget_crash(self, domain: DomainName) -> None:
        await self._agent.call(lambda: self._agent.node.crashed.discard(domain), 0.0002)

    async def inspect(self, domain: DomainName) -> DomainStatus:
        def effect() -> DomainStatus:
            guest = self._here(domain)
            state = DomainState.STOPPED if guest is None else STATES[guest.state]
            return DomainStatus(name=domain, state=state)

        world = self._agent.world
        status = await self._agent.call(effect, 0.0002 + world.delay(CALL_S))
        if status.state is DomainState.STOPPED:
            await self._hear_out({domain})
        return status

    async def _hear_out(self, domains: Collection[DomainName]) -> None:
        """Who hears that a domain is stopped has heard how it ended (the port's contract)."""
        while self.unheard.intersection(domains):
            await self._agent.trip(CALL_S)

    async def list_domains(self) -> Sequence[DomainStatus]:
        await self._agent.trip(CALL_S)
        await self._hear_out(self._agent.node.cluster.domains)
        return [
            DomainStatus(name=each.name, state=STATES[each.guests[self._agent.node.name].state])
            for each in self._agent.node.cluster.domains.values()
            if self._agent.node.name in each.guests
        ]

    async def launched(self, domain: DomainName) -> DomainSpec | None:
        guest = self._here(domain)
        return None if guest is None else guest.spec

    async def receive_device_state(self, domain: DomainName, device_channel: Path) -> None:
        await self._agent.trip(CALL_S)

    def console_log(self, domain: DomainName) -> Path:
        raise NotImplementedError

    async def pause(self, domain: DomainName) -> None:
        raise NotImplementedError

    async def resume(self, domain: DomainName) -> float:
        """An operator's, after an I/O error: under the token that it has."""

        def effect() -> float:
            guest = self._here(domain)
            if guest is None or guest.state is not G.IO_ERROR:
                raise StorageError("nothing to resume")
            guest.state = G.RUNNING
            return self._agent.node.clock_s

        return await self._call(effect)

    async def reset(self, domain: DomainName) -> None:
        raise NotImplementedError

    async def memory(self, domain: DomainName) -> GuestMemory:
        raise NotImplementedError

    async def prepare_switchover(self, domain: DomainName) -> None:
        raise NotImplementedError

    async def begin_switchover(self, domain: DomainName, device_channel: Path) -> None:
        raise NotImplementedError

    async def continue_switchover(self, domain: DomainName) -> None:
        raise NotImplementedError

    async def abort_switchover(self, domain: DomainName) -> AbortOutcome:
        raise NotImplementedError
