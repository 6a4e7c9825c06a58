"""A lab with real agents, the guests on it, and moments in which a migration is held."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from deploy import lab
from deploy.guest.build import GuestImage, build_guest, default_cache_directory
from deploy.guest.cmdline import guest_cmdline
from deploy.guest.disk_check import check_disk
from deploy.guest.protocol import READY, ConsoleReport, GuestStatus, parse_status, read_console
from deploy.guest.records import DiskReport
from deploy.lab.kinds import FabricKind
from deploy.lab.plan import GUEST_BRIDGE, LabPlan
from deploy.lab.processes import (
    Process,
    alive,
    command_of,
    find_by_argument,
    processes_in,
    send_signal,
)
from migrator import cores
from migrator.model import (
    DiskSpec,
    DomainSpec,
    DomainState,
    KernelBoot,
    Migration,
    MigrationMode,
    MigrationState,
    NicSpec,
    OnTimeout,
    VolumeInfo,
)
from node_agent.cli.client import ApiClient
from node_agent.cli.errors import ApiProblem, Unreachable
from node_agent.events import ClusterEvent, EventList
from node_agent.resources import (
    Domain,
    MigrationCreate,
    MigrationList,
    StartRequest,
    StopRequest,
    VolumeCreate,
)
from tests.integration.cluster.client import fetch

T = TypeVar("T")

MIB: Final = 1024**2
GUEST_MEMORY_BYTES: Final = 96 * MIB
UDP_PORT_FIRST: Final = 9000
POLL_S: Final = 0.02
SLOW_POLL_S: Final = 0.1
"""For what takes seconds, or is much to look at: what is awaited needs the cores itself."""
READY_S: Final = 90.0
END_S: Final = 60.0
"""Within which every migration ends, however many of its processes were killed."""


def eventually(
    what: str, find: Callable[[], T | None], timeout_s: float = 30.0, poll_s: float = POLL_S
) -> T:
    """The first result of `find` that is true. AssertionError: not in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = find()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(poll_s)


@dataclass(frozen=True, slots=True)
class Load:
    """What a guest does besides serving."""

    dirty_pages_per_s: int = 2000
    memory_mib: int = 24
    disk: bool = False
    udp: bool = True
    udp_per_s: int = 1000
    """So many show gaps to the millisecond, and each thousand is a sixth of an emulating core."""
    ipv6: bool = False
    guest_memory_bytes: int = GUEST_MEMORY_BYTES
    pool: str = "default"


UNHEARD_UDP_PER_S: Final = 100
"""Where nobody counts a guest's packets: it has something to send at any moment all the same."""


class HoldPoint:
    """One moment in which a side of a migration waits (`migrator.hold_points`)."""

    def __init__(self, folder: Path, role: str, step: str) -> None:
        self._path = folder / f"{role}-{step}"
        self._reached = self._path.with_suffix(".reached")
        self._reached.unlink(missing_ok=True)
        self._path.touch()

    def wait_reached(self) -> None:
        eventually(f"{self._path.name} is reached", self._reached.exists)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        self._reached.unlink(missing_ok=True)


class Cluster:
    """A lab that is up. `hold_folder` is what its agents were given as FERRY_HOLD_POINTS."""

    def __init__(self, plan: LabPlan, image: GuestImage, hold_folder: Path) -> None:
        self.plan = plan
        self.name = plan.name
        self.image = image
        self._hold_folder = hold_folder
        self._numbers = itertools.count(10)

    # --- the API ---

    def api(self, node: str = "n1") -> ApiClient:
        return ApiClient(f"unix:{self.plan.node(node).api_socket}")

    def domain(self, name: str, via: str = "n1") -> Domain:
        return self.api(via).get(f"/v1/domains/{name}", Domain)

    def migration(self, id: str, via: str = "n1") -> Migration:
        return self.api(via).get(f"/v1/migrations/{id}", Migration)

    def migrations_of(self, domain: str, via: str = "n1") -> list[Migration]:
        found = self.api(via).get("/v1/migrations", MigrationList).migrations
        return [each for each in found if each.domain == domain]

    def migrate(
        self,
        domain: str,
        to: str,
        *,
        via: str = "n1",
        downtime_limit_ms: int = 50,
        timeout_s: float = 60.0,
        on_timeout: OnTimeout = OnTimeout.CANCEL,
        mode: MigrationMode = MigrationMode.PRECOPY,
        bandwidth_bytes_per_s: int | None = None,
    ) -> Migration:
        """Begin a migration."""
        body = MigrationCreate(
            destination=to,
            downtime_limit_ms=downtime_limit_ms,
            timeout_s=timeout_s,
            on_timeout=on_timeout,
            mode=mode,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        )
        return self.api(via).post(f"/v1/domains/{domain}/migrations", Migration, body)

    def cancel(self, id: str, via: str = "n1") -> None:
        self.api(via).delete(f"/v1/migrations/{id}")

    def ended(self, id: str, via: str = "n1", timeout_s: float = END_S) -> Migration:
        """The migration once it has ended; agents that are away are waited for."""

        def find() -> Migration | None:
            try:
                migration = self.migration(id, via)
            except (Unreachable, ApiProblem):
                return None
            return migration if migration.ended else None

        return eventually(f"migration {id} ends", find, timeout_s)

    def in_state(self, id: str, state: MigrationState, via: str = "n1") -> Migration:
        """The migration once it is in `state`. AssertionError if it ends before."""

        def find() -> Migration | None:
            migration = self.migration(id, via)
            assert not migration.ended or migration.state is state, migration
            return migration if migration.state is state else None

        return eventually(f"migration {id} is in {state}", find)

    def events(self, via: str = "n1") -> tuple[ClusterEvent, ...]:
        """The newest of the log, oldest first."""
        return self.api(via).get("/v1/events?limit=200", EventList).events

    def move(self, domain: str, to: str, via: str = "n1") -> Migration:
        """Migrate, and see that it worked."""
        migration = self.ended(self.migrate(domain, to, via=via).id, via)
        assert migration.state is MigrationState.COMPLETED, describe(migration)
        return migration

    # --- processes ---

    def processes(self, node: str) -> list[Process]:
        namespace = self.plan.node(node).namespace
        return processes_in([namespace])[namespace]

    def agent(self, node: str) -> Process:
        config = str(self.plan.node(node).config_path)
        found = find_by_argument(self.processes(node), config)
        assert found is not None, f"the agent of {node} doesn't run"
        return found

    def engines(self, node: str) -> list[Process]:
        """Those of migrations: an engine gets its role, and the name that goes with it, a moment
        after it was taken for one; what waits to be taken is known by its niceness."""
        every = [each for each in self.processes(node) if "migrator.engine" in command_of(each.pid)]
        named = [each for each in every if _name_of(each.pid).startswith("ferry-")]
        return named or [each for each in every if _niceness_of(each.pid) != cores.WAITING]

    def qemus(self, node: str, domain: str) -> list[Process]:
        """The hypervisor processes of one domain: they name it."""
        mark = f"guest={domain}"
        return [
            each
            for each in self.processes(node)
            if any(mark in word for word in command_of(each.pid))
        ]

    def kill(self, victim: Process) -> None:
        send_signal(victim, signal.SIGKILL)
        eventually(f"process {victim.pid} ends", lambda: not alive(victim))

    def restart_missing_agents(self) -> None:
        lab.up(self.name)

    @contextmanager
    def held(self, role: str, step: str) -> Iterator[HoldPoint]:
        point = HoldPoint(self._hold_folder, role, step)
        try:
            yield point
        finally:
            point.release()

    # --- guests ---

    @contextmanager
    def guest(
        self, name: str, node: str = "n1", load: Load | None = None, *, removal_s: float = 0.0
    ) -> Iterator[Guest]:
        """A guest that is ready; its domain and volume are gone when this ends.

        `removal_s`: for how long a refused removal is tried again: a storage server that was cut
        off from a client notices late that it is gone.
        """
        guest = Guest(self, name, next(self._numbers), load or Load())
        try:
            guest.start(node)
            yield guest
        finally:
            guest.remove(removal_s)


@contextmanager
def two_nodes(
    name: str, fabric: FabricKind, agent_command: Sequence[str], hold_folder: Path
) -> Iterator[Cluster]:
    """A lab of its own for a test whose guests need another network."""
    try:
        lab.up(name, nodes=2, node_memory_bytes=1 << 30, fabric=fabric, agent_command=agent_command)
        yield Cluster(lab.load(name).plan, build_guest(default_cache_directory()), hold_folder)
    finally:
        lab.down(name)


class Guest:
    """One guest of `deploy.guest`."""

    def __init__(self, cluster: Cluster, name: str, number: int, load: Load) -> None:
        self.cluster = cluster
        self.name = name
        self.load = load
        self.address = cluster.plan.guest_address(number)
        self.address6 = cluster.plan.guest_address6(number)
        self.mac = f"52:54:00:fe:01:{number:02x}"
        self.udp_port = UDP_PORT_FIRST + number

    @property
    def spec(self) -> DomainSpec:
        plan, load = self.cluster.plan, self.load
        addresses = (self.address, self.address6) if load.ipv6 else (self.address,)
        udp = f"{plan.client_guest_address}:{self.udp_port}" if load.udp else None
        return DomainSpec(
            name=self.name,
            memory_bytes=load.guest_memory_bytes,
            disks=(DiskSpec(volume=self.name, pool=load.pool),) if load.disk else (),
            nics=(NicSpec(mac=self.mac, bridge=GUEST_BRIDGE, addresses=addresses),),
            boot=KernelBoot(
                kernel=str(self.cluster.image.kernel),
                initrd=str(self.cluster.image.initrd),
                cmdline=guest_cmdline(
                    name=self.name,
                    address=f"{self.address}/24",
                    address6=f"{self.address6}/64" if load.ipv6 else None,
                    gateway=plan.guest_gateway,
                    gateway6="fe80::1" if load.ipv6 and plan.is_routed else None,
                    udp=udp,
                    udp_per_s=load.udp_per_s,
                    memory_mib=load.memory_mib,
                    dirty_pages_per_s=load.dirty_pages_per_s,
                    disk=load.disk,
                ),
            ),
        )

    def start(self, node: str) -> None:
        api = self.cluster.api(node)
        if self.load.disk:
            volume = VolumeCreate(name=self.name, capacity_bytes=32 * MIB)
            api.post(f"/v1/pools/{self.load.pool}/volumes", VolumeInfo, volume)
        api.post("/v1/domains", Domain, self.spec)
        api.post(f"/v1/domains/{self.name}/start", Domain, StartRequest(node=node))
        eventually(
            f"guest {self.name} is ready",
            lambda: READY in self.console(node),
            READY_S,
            SLOW_POLL_S,
        )

    def console(self, via: str = "n1") -> str:
        chunks = self.cluster.api(via).chunks(f"/v1/domains/{self.name}/console")
        return b"".join(chunks).decode(errors="replace")

    def report(self) -> ConsoleReport:
        return read_console(self.console())

    @property
    def node(self) -> str:
        """Where it runs, by the cluster's word."""
        domain = self.cluster.domain(self.name)
        assert domain.state is DomainState.RUNNING, domain
        assert domain.node is not None
        return domain.node

    def other_node(self) -> str:
        return "n2" if self.node == "n1" else "n1"

    def status(self, target: str = "/status") -> GuestStatus:
        client = self.cluster.plan.namespace("client")
        return parse_status(fetch(client, self.address, target))

    def verify(self) -> GuestStatus:
        """Let the guest verify every page; see that it finds nothing."""
        status = self.status("/verify")
        assert status.corruptions == 0, status
        report = self.report()
        assert not report.corruptions, report
        assert not report.errors, report
        return status

    def copies(self) -> list[str]:
        """The node of each hypervisor process of this domain."""
        return [
            node.name
            for node in self.cluster.plan.nodes
            for _ in self.cluster.qemus(node.name, self.name)
        ]

    def stop(self) -> None:
        path = f"/v1/domains/{self.name}/stop"
        self.cluster.api().post(path, Domain, StopRequest(timeout_s=20.0))

    def check_disk(self) -> DiskReport:
        return check_disk(self.cluster.plan.volumes_path / f"{self.name}.raw")

    def remove(self, removal_s: float = 0.0) -> None:
        api = self.cluster.api()
        try:
            domain = self.cluster.domain(self.name)
        except ApiProblem:
            domain = None
        if domain is not None:
            if domain.migration is not None:  # A test has failed in its midst.
                with contextlib.suppress(ApiProblem):
                    self.cluster.cancel(domain.migration)
                self.cluster.ended(domain.migration)
            if domain.state is not DomainState.STOPPED:
                api.post(f"/v1/domains/{self.name}/stop", Domain, StopRequest(timeout_s=0.0))
            api.delete(f"/v1/domains/{self.name}")
        deadline = time.monotonic() + removal_s
        while self.load.disk:
            try:
                api.delete(f"/v1/pools/{self.load.pool}/volumes/{self.name}")
                return
            except ApiProblem:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)


def alone_at(guest: Guest, node: str) -> None:
    """Its one copy is there, soon: a move is over for its users when it has been handed over."""
    eventually(f"{guest.name}'s only copy is on {node}", lambda: guest.copies() == [node])


def describe(migration: Migration) -> str:
    """A migration for an assertion's message."""
    phases = "; ".join(
        f"{phase.name} {phase.seconds:.3f} s {phase.detail}" for phase in migration.timeline
    )
    return (
        f"{migration.id} {migration.source} -> {migration.destination}: {migration.state}, "
        f"{migration.error}, blackout {migration.blackout_ms} ms: {phases}"
    )


def _name_of(pid: int) -> str:
    """The process's name; "" if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _niceness_of(pid: int) -> int | None:
    """None: it is gone."""
    with contextlib.suppress(OSError):
        return os.getpriority(os.PRIO_PROCESS, pid)
    return None
