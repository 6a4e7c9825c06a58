"""A disk that fails under a real QEMU: what is told of it, by whom, and what becomes of it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hypervisor.qemu.driver import QemuDriver
from hypervisor.qemu.guest import Guest
from migrator.model import DomainState
from migrator.ports import AbortOutcome, DomainEventKind
from tests.contract.hypervisor_worlds import VM, Node, QemuWorld, eventually, open_qemus
from tests.integration.bare_metal import COUNT, COUNTER_OFFSET, is_beyond, write_disk

pytestmark = pytest.mark.lab
_LAYOUT = {
    "driver": "raw",
    "node-name": "disk0",
    "read-only": False,
    "auto-read-only": False,
    "cache": {"direct": True, "no-flush": False},
    "discard": "unmap",
}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[QemuWorld]:
    """With a guest whose disk has just failed."""
    async with open_qemus(tmp_path) as made:
        write_disk(made.folder / "vm-1.raw", COUNT)
        await made.a.driver.start(made.launch())
        await counts(made.a, 1000)
        guest = guest_of(made.a)
        fault = {"event": "none", "iotype": "read", "errno": 5}
        broken = {"driver": "blkdebug", "node-name": "broken", "image": "disk0-file"}
        await guest.execute("blockdev-add", broken | {"inject-error": [fault]})
        await put_disk_on(guest, "broken")
        await made.a.driver.reset(VM)
        await made.a.wait(DomainEventKind.IO_ERROR)
        await made.a.wait(DomainEventKind.PAUSED)
        yield made


def guest_of(node: Node) -> Guest:
    assert isinstance(node.driver, QemuDriver)
    return node.driver._guests[VM]


async def put_disk_on(guest: Guest, file: str) -> None:
    await guest.execute("blockdev-reopen", {"options": [_LAYOUT | {"file": file}]})


async def counts(node: Node, beyond: int) -> None:
    """Wait until the guest has counted further than `beyond`."""

    async def further() -> bool:
        return is_beyond(await counter(node), beyond)

    await eventually(further)


async def counter(node: Node) -> int:
    memory = await node.driver.memory(VM)
    try:
        return int.from_bytes(os.pread(memory.regions[0].fd, 4, COUNTER_OFFSET), "little")
    finally:
        memory.close()


async def heals(world: QemuWorld) -> None:
    await put_disk_on(guest_of(world.a), "disk0-file")
    before = await counter(world.a)
    await world.a.driver.resume(VM)
    await counts(world.a, before)
    assert await world.a.state() is DomainState.RUNNING


async def test_it_stops_the_guest_until_it_heals(world: QemuWorld) -> None:
    status = await world.a.driver.inspect(VM)
    assert status.state is DomainState.IO_ERROR
    assert status.reason == "read of disk 0 (default/d) failed: Input/output error"
    await world.reopen("a")
    assert await world.a.state() is DomainState.IO_ERROR, "also when adopted"
    await heals(world)


async def test_whoever_missed_it_hears_of_it_with_the_monitors_connection(world: QemuWorld) -> None:
    """Else nobody would resume the guest: QEMU tells it once."""
    world.a.forget()
    guest = guest_of(world.a)
    assert guest._monitor is not None
    await guest._monitor.close()
    guest.reconnect_later()
    await world.a.wait(DomainEventKind.IO_ERROR)


async def test_a_migration_that_fails_doesnt_make_it_a_pause(world: QemuWorld) -> None:
    """QEMU 7.2 calls such a guest `postmigrate`; nobody resumed it any more."""
    await world.begin(world.a, world.b)
    assert await world.a.driver.abort_switchover(VM) is AbortOutcome.RESUMED
    status = await world.a.driver.inspect(VM)
    assert status.state is DomainState.IO_ERROR
    assert status.reason == "read of disk 0 (default/d) failed: Input/output error"
    await world.reopen("a")
    status = await world.a.driver.inspect(VM)
    assert (status.state, status.reason) == (DomainState.IO_ERROR, "disk 0 (default/d) failed")
    await heals(world)
