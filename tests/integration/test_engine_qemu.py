"""A real QEMU moves through two real engines: pages, device state, and failures in between."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrator.engine_messages import (
    Configure,
    Configured,
    Connect,
    Connected,
    DeviceChannelOpen,
    Listening,
    OpenDeviceChannel,
    PassDone,
    RegionLayout,
    RunPass,
)
from migrator.model import PassKind, PassReport, Role
from migrator.ports import DomainEventKind, GuestMemory
from tests.contract.hypervisor_worlds import VM, Node, QemuWorld, eventually
from tests.integration.bare_metal import COUNT, COUNTER_OFFSET, write_disk
from tests.integration.engine_lab.lab import Engine, pattern_hash

pytestmark = pytest.mark.lab

CONNECTED = "03"


class Move:
    """One migration from node a to node b of a world, driven step by step."""

    def __init__(self, world: QemuWorld) -> None:
        self.world = world
        self.memories: dict[Role, GuestMemory] = {}
        self.engines: dict[Role, Engine] = {}
        self._passes = 0

    async def start(self) -> None:
        world = self.world
        write_disk(world.folder / "vm-1.raw", COUNT)
        launch = world.launch()
        await world.a.driver.start(launch)
        await world.b.driver.start_incoming(launch)
        for role, node in ((Role.SOURCE, world.a), (Role.DESTINATION, world.b)):
            self.memories[role] = await node.driver.memory(VM)
            await self.start_engine(role)
        await self.source.expect(Configured)
        listening = await self.destination.expect(Listening)
        self.source.process.send(Connect(host=listening.host, port=listening.port))
        await self.source.expect(Connected)

    async def start_engine(self, role: Role) -> None:
        memory = self.memories[role]
        engine = await Engine.spawn(self.world.folder / f"engine-{role}.log")
        self.engines[role] = engine
        layouts = tuple(
            RegionLayout(
                name=region.name,
                size_bytes=region.size_bytes,
                page_size_bytes=region.page_size_bytes,
                mappings=region.mappings,
            )
            for region in memory.regions
        )
        configure = Configure(
            role=role,
            migration_id="m-1",
            secret=b"s" * 32,
            pid=memory.pid,
            regions=layouts,
            bind_address="127.0.0.1",
        )
        engine.process.send(configure, memory.fds)

    @property
    def source(self) -> Engine:
        return self.engines[Role.SOURCE]

    @property
    def destination(self) -> Engine:
        return self.engines[Role.DESTINATION]

    async def run_pass(self, kind: PassKind) -> PassReport:
        self._passes += 1
        self.source.process.send(RunPass(number=self._passes, kind=kind))
        return (await self.source.expect(PassDone)).report

    async def pause(self) -> None:
        """Up to pre-switchover: the source stands still, its device state is on the way."""
        world = self.world
        paths = (world.folder / "ds.sock", world.folder / "dd.sock")
        await world.a.driver.prepare_switchover(VM)
        await world.b.driver.receive_device_state(VM, paths[1])
        self.destination.process.send(OpenDeviceChannel(path=str(paths[1])))
        self.source.process.send(OpenDeviceChannel(path=str(paths[0])))
        await self.source.expect(DeviceChannelOpen)
        await self.destination.expect(DeviceChannelOpen)
        world.a.forget()
        world.b.forget()
        await world.a.driver.begin_switchover(VM, paths[0])
        await world.a.wait(DomainEventKind.PRE_SWITCHOVER)

    async def source_knows(self) -> None:
        """That nobody is at the other end of the device channel: its engine has closed it."""
        path = str(self.world.folder / "ds.sock")

        async def closed() -> bool:
            sockets = (await asyncio.to_thread(Path("/proc/net/unix").read_text)).splitlines()
            # The state behind reference count, protocol, flags and type; then inode and path.
            return [CONNECTED, path] not in [each.split()[5::2] for each in sockets]

        await eventually(closed)

    def same_memory(self) -> bool:
        one, other = (
            [pattern_hash(region.fd, region.size_bytes) for region in memory.regions]
            for memory in self.memories.values()
        )
        return one == other

    async def close(self) -> None:
        for engine in self.engines.values():
            await engine.process.stop(timeout_s=30.0)
        for memory in self.memories.values():
            memory.close()


@pytest.fixture
async def move(tmp_path: Path) -> AsyncIterator[Move]:
    world = QemuWorld(tmp_path)
    await world.open()
    made = Move(world)
    try:
        yield made
    finally:
        await made.close()
        await world.close()


async def counter(node: Node) -> int:
    memory = await node.driver.memory(VM)
    try:
        return int.from_bytes((await asyncio.to_thread(_peek, memory)), "little")
    finally:
        memory.close()


def _peek(memory: GuestMemory) -> bytes:
    return os.pread(memory.regions[0].fd, 4, COUNTER_OFFSET)


async def counts(node: Node) -> None:
    """Wait until the guest has counted on."""
    before = await counter(node)

    async def further() -> bool:
        return await counter(node) > before

    await eventually(further)


async def test_a_guest_moves(move: Move) -> None:
    await move.start()
    a, b = move.world.a, move.world.b
    await counts(a)
    await move.run_pass(PassKind.FIRST)
    await move.run_pass(PassKind.DIRTY)
    await counts(a)
    began = time.monotonic()
    await move.pause()
    final = await move.run_pass(PassKind.FINAL)
    assert final.pages > 0
    await a.driver.continue_switchover(VM)
    await a.wait(DomainEventKind.DEVICE_STATE_SENT)
    await b.wait(DomainEventKind.DEVICE_STATE_LOADED)
    print(f"both set up, paused, copied and loaded: {1e3 * (time.monotonic() - began):.1f} ms")
    assert move.same_memory()
    at_pause = await counter(a)
    assert await counter(b) == at_pause
    await b.driver.resume(VM)
    await counts(b)
    assert await counter(a) == at_pause


@pytest.mark.parametrize("victim", ["source engine", "destination engine", "destination"])
async def test_a_death_in_the_switchover_leaves_the_source_running(move: Move, victim: str) -> None:
    """QEMU 7.2 doesn't look at its socket in pre-switchover: it finds out when it goes on."""
    await move.start()
    a = move.world.a
    await counts(a)
    await move.run_pass(PassKind.FIRST)
    await move.pause()
    match victim:
        case "source engine":
            move.source.process.kill()
            await move.source.exited()
        case "destination engine":
            move.destination.process.kill()
            await move.destination.exited()
        case _:
            await move.world.kill(move.world.b)
    await move.source_knows()
    await a.driver.continue_switchover(VM)
    await a.wait(DomainEventKind.RESUMED)
    assert DomainEventKind.DEVICE_STATE_SENT not in a.kinds()
    await counts(a)
