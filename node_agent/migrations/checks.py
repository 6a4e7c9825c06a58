"""What speaks against a migration, before anything moves: all reasons at once.

The source checks what it knows (itself, the nodes' states), then asks the destination what it
can't offer. Both lists go to the user together.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from migrator.errors import FerryError, RefusedError
from migrator.model import (
    DiskSpec,
    DomainName,
    DomainSpec,
    DomainState,
    EngineKind,
    HypervisorCapabilities,
    NodeName,
    NodeState,
    PoolName,
    VolumeInfo,
    VolumeName,
)
from migrator.ports import FabricDriver, HypervisorDriver, Struct, VolumeDriver
from migrator.tls import TlsFiles
from node_agent.domain_locks import DomainLocks
from node_agent.memory_room import MemoryRoom
from node_agent.migrations.room import in_state_directory, room_reasons
from node_agent.nodes import NodeView
from node_agent.start_needs import boot_troubles

T = TypeVar("T")
WHOLE_PROCESSOR: Final = ("host", "max")
"""CPU models that are all that the host has."""
LOOK_S: Final = 3.0
"""For a look at a volume: less than `manager.INSPECT_S` by what drivers take to give up."""
_OPENS: Final = {
    NodeState.DRAINING: "drain NODE --cancel",  # An undrain is refused until it has ended.
    NodeState.DRAINED: "undrain NODE",
}


class Inspection(Struct, frozen=True, kw_only=True):
    """What the source tells the destination when it asks whether it can take a domain."""

    spec: DomainSpec
    source: HypervisorCapabilities
    tls: bool | None = None
    """Whether the source's engine speaks TLS; None: nobody asks."""
    engine: EngineKind = EngineKind.PAGED
    marks: Mapping[str, str] = {}
    """By pool, which storage the source has behind its name, and by POOL/VOLUME, which device; what
    isn't there is asked by nobody."""
    capacities: Mapping[str, int] = {}
    """By POOL/VOLUME, in bytes, as the source sees them."""
    cpu_lacks: tuple[str, ...] | None = None
    """Features of its CPU model that the guest hasn't got at the source; None: that isn't known."""


def node_reasons(
    source: NodeName, destination: NodeName, views: Mapping[NodeName, NodeView]
) -> list[str]:
    """Why `destination` is no place to go, as the heartbeats have it."""
    if destination == source:
        return [f"the domain runs on {destination} already"]
    view = views.get(destination)
    if view is None:
        known = ", ".join(sorted(views)) or "none"
        return [f"there is no node {destination}; known: {known} (the domain runs on {source})"]
    if view.state is NodeState.UNREACHABLE:
        return [f"node {destination} is {view.state}: {view.silence}"]
    ours = views.get(source)
    barred = [(source, ours.barred if ours is not None else ""), (destination, view.barred)]
    return [
        *cordon_reasons(destination, view.state, view.kept_free),
        *(f"node {name}: {why}" for name, why in barred if why),
    ]


def said_of_destination(destination: NodeName, reason: str) -> str:
    """What a reason says against the destination; "": it is another's.

    Whatever does begins with its name: what it says itself, what it doesn't answer, and
    `node_reasons`.
    """
    name = f"node {destination}"
    for begin in (f"{name}: ", f"{name} "):
        if reason.startswith(begin):
            return reason.removeprefix(begin)
    return ""


def cordon_reasons(node: NodeName, state: NodeState, told: str = "") -> list[str]:
    """Why nothing may start or move there while it is kept free."""
    if state.admits:
        return []
    if state is NodeState.GOING_DOWN:
        opens = "if it stays up, `systemctl restart ferry-agent` there"
    else:
        opens = f"`ferry {_OPENS.get(state, 'uncordon NODE').replace('NODE', node)}`"
    return [f"node {node} is {told or state}; nothing may come there ({opens} opens it)"]


def one_way(model: str, source: NodeView | None, destination: NodeView | None) -> str:
    """That a guest of this CPU model will be refused on its way back; "": not for this."""
    if model.partition(",")[0] not in WHOLE_PROCESSOR or source is None or destination is None:
        return ""
    here, there = source.info, destination.info
    gained = sorted(set(there.capabilities.cpu_features) - set(here.capabilities.cpu_features))
    if not gained:
        return ""
    return (
        f"no way back to {here.name} but by stop and start: with CPU model {model} it gets "
        f"{', '.join(gained)} on {there.name}, which {here.name} lacks"
    )


def state_reasons(domain: DomainName, state: DomainState) -> list[str]:
    """Only a running guest is worth moving live."""
    if state is DomainState.RUNNING:
        return []
    how = f" (`ferry domain resume {domain}`)" if state is DomainState.PAUSED else ""
    return [f"domain {domain} is {state}, it must be running{how}"]


async def refuse_unless_running(hypervisor: HypervisorDriver, domain: DomainName) -> None:
    """Once the domain is claimed. Asking the destination took time, in which it may have been
    paused: a destination runs what it has loaded, and so would a guest that somebody wants to
    stand. RefusedError.
    """
    found = state_reasons(domain, (await hypervisor.inspect(domain)).state)
    if found:
        raise RefusedError(f"domain {domain} was not migrated: {found[0]}", found)


def claim_reasons(locks: DomainLocks, domain: DomainName) -> list[str]:
    """Why a domain's migration can't begin yet: another one has it."""
    migration = locks.migration_of(domain)
    if migration is None:
        return []
    if locks.is_ending(domain):
        return [
            f"domain {domain} is still held by migration {migration}, which has ended and can't "
            "let go yet: its end isn't journalled or published, or its disks aren't closed (a "
            "storage that hangs); the agent's log says which"
        ]
    return [f"domain {domain} is being migrated already (migration {migration})"]


def _name(disk: DiskSpec) -> str:
    return f"{disk.pool}/{disk.volume}"


def _another(name: str, own: str, there: str) -> str:
    """That a pool, or a volume, isn't the source's."""
    if "/" in name:
        return f"its volume {name} is another device than the source's: {own}, there {there}"
    return (
        f"its pool {name} is another storage than the source's, under the same name: is it "
        f"mounted on both? do its settings (`ferry pool show {name}`) lead to the same server?"
    )


async def _nothing() -> dict[str, str]:
    return {}


async def _said(look: Awaitable[T]) -> T | None:
    """None: it couldn't be said, or not in time."""
    with contextlib.suppress(FerryError, TimeoutError):
        async with asyncio.timeout(LOOK_S):
            return await look
    return None


class DestinationCheck:
    """What this node says when it is to be a destination."""

    def __init__(
        self,
        *,
        memory_room: MemoryRoom,
        hypervisor: HypervisorDriver,
        pools: Mapping[PoolName, VolumeDriver],
        fabric: FabricDriver,
        tls: Callable[[], TlsFiles | None],
        state: Path,
        cordon: Callable[[], Awaitable[list[str]]] | None = None,
    ) -> None:
        """`tls`: what this node's engines will use; called in a thread.

        `state`: where migrations are journalled.
        `cordon`: why nothing may come here now, read anew each time.
        """
        self._memory_room = memory_room
        self._hypervisor = hypervisor
        self._pools = pools
        self._fabric = fabric
        self._tls = tls
        self._state = state
        self._cordon = cordon

    async def reasons(self, inspection: Inspection) -> Sequence[str]:
        """Why this node can't take the domain; empty if it can."""
        spec = inspection.spec
        checks: Sequence[Callable[[], Awaitable[list[str]]]] = (
            *(() if self._cordon is None else (self._cordon,)),
            lambda: self._here(spec),
            lambda: self._memory(spec),
            lambda: self._machine(spec, inspection.source, inspection.engine),
            lambda: self._processor(spec, inspection.cpu_lacks),
            lambda: self._disks(inspection),
            lambda: self._nics(spec),
            lambda: self._boot(spec),
            lambda: self._encryption(inspection.tls),
            self._room,
        )
        found: list[str] = []
        for check in checks:  # Each made only when its turn comes: this may be cancelled.
            try:
                found += await check()
            except FerryError as error:
                found.append(str(error))
        return found

    async def _encryption(self, source: bool | None) -> list[str]:
        own = await in_state_directory(self._state, self._tls) is not None
        if source is None or source == own:
            return []
        there, here = ("with", "without") if source else ("without", "with")
        return [
            f"its pages travel {here} TLS, the source's {there}: tls.mode and the keys must agree"
        ]

    async def _room(self) -> list[str]:
        return await room_reasons(self._state)

    async def _here(self, spec: DomainSpec) -> list[str]:
        status = await self._hypervisor.inspect(DomainName(spec.name))
        if status.state is DomainState.STOPPED:
            return []
        return [f"a copy of domain {spec.name} is there already ({status.state})"]

    async def _memory(self, spec: DomainSpec) -> list[str]:
        return list((await self._memory_room.troubles(spec)).values())

    async def _machine(
        self, spec: DomainSpec, source: HypervisorCapabilities, engine: EngineKind
    ) -> list[str]:
        own = await self._hypervisor.capabilities()
        found: list[str] = []
        if own.driver != source.driver:
            found.append(f"its hypervisor is {own.driver}, the source's is {source.driver}")
        if spec.machine not in own.machine_types:
            found.append(f"its hypervisor ({own.version}) has no machine type {spec.machine}")
        model = spec.cpu_model.partition(",")[0]
        if model not in own.cpu_models:
            found.append(f"its hypervisor ({own.version}) has no CPU model {model}")
        if own.accelerator != source.accelerator:
            found.append(f"it runs guests by {own.accelerator}, the source by {source.accelerator}")
        missing = sorted(set(source.cpu_features) - set(own.cpu_features))
        if missing and model in WHOLE_PROCESSOR:
            found.append(f"its CPU lacks {', '.join(missing)}, which the guest may use ({model})")
        if engine is not EngineKind.NATIVE and not own.paged_engine:
            found.append(f"it can't receive memory: {own.paged_engine_reason}")
        return found

    async def _processor(self, spec: DomainSpec, lacking: Collection[str] | None) -> list[str]:
        """What the guest may use there, and would look for in vain here. `lacking`: at the source.

        A hypervisor leaves out of a CPU model what the host hasn't, and says so to nobody.
        """
        lacking_here = await self._hypervisor.cpu_lacks(spec.cpu_model)
        if lacking is None or lacking_here is None:
            return []
        missing = sorted(set(lacking_here) - set(lacking))
        if not missing:
            return []
        told = ", ".join(missing)
        return [f"its CPU lacks {told} of {spec.cpu_model}, which the guest has at the source"]

    @property
    def pools(self) -> Mapping[PoolName, VolumeDriver]:
        """This node's."""
        return self._pools

    async def inspection(
        self, spec: DomainSpec, source: HypervisorCapabilities, engine: EngineKind, tls: bool
    ) -> Inspection:
        """What this node asks as a source; it says what is here of the domain's storage."""
        cpu = _said(self._hypervisor.cpu_lacks(spec.cpu_model, DomainName(spec.name)))
        marks, capacities, lacks = await asyncio.gather(
            self.marks(spec), self.capacities(spec), cpu
        )
        return Inspection(
            spec=spec,
            source=source,
            engine=engine,
            tls=tls,
            marks=marks,
            capacities=capacities,
            cpu_lacks=None if lacks is None else tuple(sorted(lacks)),
        )

    async def marks(self, spec: DomainSpec) -> dict[str, str]:
        """This node's, of the pools and volumes of a domain's disks; without those that can't say.

        Whether the storage works is asked elsewhere.
        """
        looks: dict[str, Awaitable[str | None]] = {}
        for disk in spec.disks:
            pool = self._pools.get(PoolName(disk.pool))
            if pool is not None:
                if disk.pool not in looks:
                    looks[disk.pool] = pool.mark()
                looks[_name(disk)] = pool.identity(VolumeName(disk.volume))
        found = await asyncio.gather(*(_said(look) for look in looks.values()))
        return {name: said for name, said in zip(looks, found, strict=True) if said is not None}

    async def capacities(self, spec: DomainSpec) -> dict[str, int]:
        """This node's, of a domain's volumes in bytes; without those that can't be looked at."""
        looks: dict[str, Awaitable[VolumeInfo]] = {}
        for disk in spec.disks:
            if (pool := self._pools.get(PoolName(disk.pool))) is not None:
                looks[_name(disk)] = pool.inspect(VolumeName(disk.volume))
        found = await asyncio.gather(*(_said(look) for look in looks.values()))
        named = zip(looks, found, strict=True)
        return {name: info.capacity_bytes for name, info in named if info is not None}

    async def _disks(self, inspection: Inspection) -> list[str]:
        spec, there = inspection.spec, inspection.marks
        looks = asyncio.gather(*(self._trouble_of(disk, inspection) for disk in spec.disks))
        marks = self.marks(spec) if there else _nothing()
        own, troubles = await asyncio.gather(marks, looks)
        found = [
            _another(name, own[name], there[name])
            for name in sorted(own.keys() & there.keys())
            if own[name] != there[name]
        ]
        return [*found, *(trouble for trouble in troubles if trouble)]

    async def _trouble_of(self, disk: DiskSpec, inspection: Inspection) -> str:
        """Told before whoever asks takes this node for the one that hangs."""
        pool = self._pools.get(PoolName(disk.pool))
        if pool is None:
            return f"it has no pool {disk.pool}"
        try:
            async with asyncio.timeout(LOOK_S):
                info = await pool.inspect(VolumeName(disk.volume))
        except TimeoutError:
            return f"volume {_name(disk)}: its storage gives no answer within {LOOK_S:g} s"
        except FerryError as error:
            return f"volume {_name(disk)}: {error}"
        there = inspection.capacities.get(_name(disk), info.capacity_bytes)
        if there == info.capacity_bytes:
            return ""
        return (
            f"volume {_name(disk)} has {info.capacity_bytes} bytes here and {there} at the source: "
            "it is another volume, or this node hasn't seen that it grew"
        )

    async def _nics(self, spec: DomainSpec) -> list[str]:
        return [reason for nic in spec.nics for reason in await self._fabric.check(nic)]

    async def _boot(self, spec: DomainSpec) -> list[str]:
        """A moved guest doesn't boot, but its next reset there does."""
        return [f"{field}: {trouble}" for field, trouble in (await boot_troubles(spec)).items()]
