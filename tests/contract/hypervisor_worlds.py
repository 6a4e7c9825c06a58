"""Two nodes with a hypervisor each, for the hypervisor's contract: simulated, and real QEMU.

The QEMU guests have no system: SeaBIOS finds nothing to boot and waits. That is enough for a
vCPU, devices and memory to move. The test plays the page engine: it relays the device channel and
copies the memory.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

from hypervisor.qemu.driver import QemuDriver
from hypervisor.simulated.driver import SimulatedHypervisor
from hypervisor.simulated.host import SimulatedChannels, SimulatedHost
from migrator.model import (
    DiskFormat,
    DiskSpec,
    DomainName,
    DomainSpec,
    DomainState,
    FencingToken,
    FileSource,
)
from migrator.ports import DomainEvent, DomainEventKind, GuestMemory, HypervisorDriver, Launch

VM = DomainName("vm-1")
MEMORY_BYTES = 64 * 1024**2
SOON_S = 20.0


class Node:
    """A hypervisor, the events it gave, and how it is opened again."""

    def __init__(self, driver: HypervisorDriver) -> None:
        self.driver = driver
        self.events: list[DomainEvent] = []
        self._heard = asyncio.Event()

    async def open(self) -> list[DomainName]:
        self.driver.subscribe(self._hear)
        return list(await self.driver.open())

    def _hear(self, event: DomainEvent) -> None:
        self.events.append(event)
        self._heard.set()
        self._heard = asyncio.Event()

    def kinds(self) -> list[DomainEventKind]:
        return [event.kind for event in self.events]

    async def wait(self, kind: DomainEventKind) -> DomainEvent:
        """The first event of that kind since the last `forget`."""
        async with asyncio.timeout(SOON_S):
            while kind not in self.kinds():
                await self._heard.wait()
        return next(event for event in self.events if event.kind is kind)

    def forget(self) -> None:
        self.events.clear()

    async def state(self) -> DomainState:
        return (await self.driver.inspect(VM)).state


class World(abc.ABC):
    """Two nodes, `a` and `b`, that share storage."""

    real = False
    a: Node
    b: Node

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.serial = itertools.count()
        self.fixed_launch: Launch | None = None
        """What `launch` gives, where a test wants another domain than the usual one."""

    @abc.abstractmethod
    def make_driver(self, node: str) -> HypervisorDriver: ...

    @abc.abstractmethod
    async def relay(self, source: Path, destination: Path) -> None:
        """Carry the device channel until the world closes."""

    @abc.abstractmethod
    async def kill(self, node: Node) -> None:
        """End the guest's process from outside."""

    @abc.abstractmethod
    def ignore_power_button(self, node: Node) -> None: ...

    async def open(self) -> None:
        self.a, self.b = Node(self.make_driver("a")), Node(self.make_driver("b"))
        await self.a.open()
        await self.b.open()

    async def close(self) -> None:
        for node in (self.a, self.b):
            for status in await node.driver.list_domains():
                await node.driver.destroy(DomainName(status.name))
            await node.driver.close()

    async def reopen(self, which: str) -> list[DomainName]:
        """The agent of a node restarts."""
        await getattr(self, which).driver.close()
        node = Node(self.make_driver(which))
        setattr(self, which, node)
        return await node.open()

    def launch(self, token: int = 1, *, machine: str = "pc-q35-7.2") -> Launch:
        if self.fixed_launch is not None:
            return self.fixed_launch
        disk = self.folder / "vm-1.raw"
        if not disk.exists():
            disk.touch()
            os.truncate(disk, 1024**2)
        spec = DomainSpec(
            name=VM, memory_bytes=MEMORY_BYTES, machine=machine, disks=(DiskSpec(volume="d"),)
        )
        source = FileSource(path=str(disk), format=DiskFormat.RAW)
        return Launch(spec=spec, disks=(source,), tap_fds=(), token=FencingToken(token))

    async def begin(self, source: Node, destination: Node) -> None:
        """A loaded destination and a source in pre-switchover, with the memory copied."""
        number = next(self.serial)
        sent, received = self.folder / f"{number}.s", self.folder / f"{number}.d"
        await destination.driver.start_incoming(self.launch(2))
        await destination.driver.receive_device_state(VM, received)
        await self.relay(sent, received)
        await source.driver.prepare_switchover(VM)
        source.forget()
        destination.forget()
        await source.driver.begin_switchover(VM, sent)
        await source.wait(DomainEventKind.PRE_SWITCHOVER)
        await copy_memory(source, destination)

    async def switch_over(self, source: Node, destination: Node) -> None:
        """Up to the handoff: nobody runs, either may be resumed."""
        await self.begin(source, destination)
        await source.driver.continue_switchover(VM)
        await source.wait(DomainEventKind.DEVICE_STATE_SENT)
        await destination.wait(DomainEventKind.DEVICE_STATE_LOADED)


async def eventually(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait until the condition holds; TimeoutError after SOON_S."""
    async with asyncio.timeout(SOON_S):
        while not (await held if isinstance(held := condition(), Awaitable) else held):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def copy_memory(source: Node, destination: Node) -> None:
    """The last pages: every populated extent."""
    ours = await source.driver.memory(VM)
    theirs = await destination.driver.memory(VM)
    try:
        await asyncio.to_thread(_copy, ours, theirs)
    finally:
        ours.close()
        theirs.close()


def _copy(ours: GuestMemory, theirs: GuestMemory) -> None:
    for one, other in zip(ours.regions, theirs.regions, strict=True):
        for start, end in _extents(one.fd, one.size_bytes):
            os.pwrite(other.fd, os.pread(one.fd, end - start, start), start)


def _extents(fd: int, size: int) -> Iterable[tuple[int, int]]:
    offset = 0
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:
            return
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, offset


class SimulatedWorld(World):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.channels = SimulatedChannels()
        self.hosts = {name: SimulatedHost(self.channels, time.time) for name in ("a", "b")}

    def make_driver(self, node: str) -> HypervisorDriver:
        return SimulatedHypervisor(self.hosts[node], self.folder / node)

    def host_of(self, node: Node) -> SimulatedHost:
        assert isinstance(node.driver, SimulatedHypervisor)
        return node.driver.host

    async def relay(self, source: Path, destination: Path) -> None:
        self.channels.link(source, destination)

    async def kill(self, node: Node) -> None:
        self.host_of(node).kill(VM, crashed=True)

    def ignore_power_button(self, node: Node) -> None:
        self.host_of(node).faults.ignores_power_button = True


class QemuWorld(World):
    real = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._relays = contextlib.AsyncExitStack()

    def make_driver(self, node: str) -> HypervisorDriver:
        return QemuDriver(self.folder / node, accelerator="tcg")

    async def relay(self, source: Path, destination: Path) -> None:
        server = await asyncio.start_unix_server(Relay(destination).serve, source)
        self._relays.push_async_callback(_close, server)

    async def kill(self, node: Node) -> None:
        pid = (await node.driver.inspect(VM)).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def ignore_power_button(self, node: Node) -> None:
        """Without a system nobody listens to it anyway."""

    async def close(self) -> None:
        await super().close()
        await self._relays.aclose()


class Relay:
    """Carries a unix stream to another unix socket, and its end too."""

    def __init__(self, destination: Path) -> None:
        self._destination = destination

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(self._destination)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_carry(reader, far_writer))
                group.create_task(_carry(far_reader, writer))
        finally:
            for each in (writer, far_writer):
                each.close()
                with contextlib.suppress(OSError):
                    await each.wait_closed()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _close(server: asyncio.Server) -> None:
    server.close()
    await server.wait_closed()


KINDS: Final = ("simulated", pytest.param("qemu", marks=pytest.mark.lab))
"""As a fixture's parameters: each names a world for `open_world`."""


@asynccontextmanager
async def open_world(kind: str, folder: Path) -> AsyncIterator[World]:
    """A world of such drivers, whose guests are gone afterwards."""
    world: World = QemuWorld(folder) if kind == "qemu" else SimulatedWorld(folder)
    await world.open()
    try:
        yield world
    finally:
        await world.close()


@asynccontextmanager
async def open_qemus(folder: Path) -> AsyncIterator[QemuWorld]:
    """A world of real QEMUs, which are gone afterwards."""
    async with open_world("qemu", folder) as world:
        assert isinstance(world, QemuWorld)
        yield world
