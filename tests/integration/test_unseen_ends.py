"""How a real QEMU ended that no agent saw the end of: by a crash, or because somebody asked."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hypervisor.qemu.config import monitor_path
from hypervisor.qemu.process import identify
from hypervisor.qemu.qmp import Monitor, QmpEvent
from migrator.errors import HypervisorError
from tests.contract.hypervisor_worlds import VM, QemuWorld, eventually, open_qemus
from tests.integration.bare_metal import COUNT, HEED_BUTTON, write_disk

pytestmark = pytest.mark.lab


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[QemuWorld]:
    async with open_qemus(tmp_path) as made:
        yield made


async def _start_and_leave(world: QemuWorld, program: bytes) -> int:
    """The pid of a guest that runs, and that nobody looks after."""
    write_disk(world.folder / "vm-1.raw", program)
    await world.a.driver.start(world.launch(machine="pc-q35-7.2"))
    pid = (await world.a.driver.inspect(VM)).pid
    assert pid is not None
    await world.a.driver.close()
    return pid


async def _gone(pid: int) -> None:
    """All its threads are: the first one may be the first to end."""
    pidfd = os.pidfd_open(pid)
    try:
        await eventually(lambda: bool(select.select([pidfd], [], [], 0)[0]))
    finally:
        os.close(pidfd)


async def test_a_crash_is_known_until_the_domain_is_forgotten(world: QemuWorld) -> None:
    pid = await _start_and_leave(world, COUNT)
    os.kill(pid, signal.SIGKILL)
    await _gone(pid)
    for _ in range(2):
        assert await world.reopen("a") == []
        assert list(world.a.driver.crashed()) == [VM]
    await world.a.driver.forget_crash(VM)
    assert not world.a.driver.crashed()
    assert await world.reopen("a") == []
    assert not world.a.driver.crashed()


async def test_an_end_that_was_asked_for_is_no_crash(world: QemuWorld) -> None:
    pid = await _start_and_leave(world, COUNT)
    os.kill(pid, signal.SIGTERM)
    await _gone(pid)
    assert await world.reopen("a") == []
    assert not world.a.driver.crashed()


async def test_a_power_off_by_the_guest_is_no_crash(world: QemuWorld) -> None:
    pid = await _start_and_leave(world, HEED_BUTTON)
    monitor = Monitor("vm-1", _ignore, lambda: None)
    await monitor.connect(monitor_path(world.folder / "a" / "run" / VM, 0), timeout_s=10.0)

    async def powered_off() -> bool:  # A guest that is still booting doesn't hear the button.
        try:
            await monitor.execute("system_powerdown", timeout_s=10.0)
        except HypervisorError:
            return await asyncio.to_thread(identify, pid) is None
        return False

    try:
        await eventually(powered_off)
    finally:
        await monitor.close()
    assert await world.reopen("a") == []
    assert not world.a.driver.crashed()


async def test_a_destroyed_domain_did_not_crash(world: QemuWorld) -> None:
    """Also if the agent dies between the SIGKILL and whatever it does next."""
    await world.a.driver.start(world.launch(machine="pc-q35-7.2"))
    end = world.folder / "a" / "run" / VM / "end"
    assert end.read_bytes() == b"r"
    await world.a.driver.destroy(VM)
    assert await world.reopen("a") == []
    assert not world.a.driver.crashed()


def _ignore(_: QmpEvent) -> None:
    pass
