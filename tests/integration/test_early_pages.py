"""Pages that come while a destination's QEMU starts: it leaves them alone, or its start fails."""

from __future__ import annotations

import asyncio
import unittest.mock
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from hypervisor.qemu import early_pages
from hypervisor.qemu.command_line import RAM_FD
from hypervisor.qemu.memory import touched
from migrator.errors import HypervisorError, NotFoundError
from migrator.model import DiskFormat, DiskSpec, DomainState, FileSource
from migrator.ports import DomainEventKind
from tests.contract.hypervisor_worlds import VM, QemuWorld, eventually, open_qemus

pytestmark = pytest.mark.lab


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[QemuWorld]:
    async with open_qemus(tmp_path) as made:
        yield made


async def test_a_destination_that_fails_to_start_says_why_and_leaves_nothing(
    world: QemuWorld,
) -> None:
    """Pages may have been on their way into its memory."""
    missing = FileSource(path=str(world.folder / "missing.raw"), format=DiskFormat.RAW)
    launch = world.launch()
    spec = msgspec.structs.replace(launch.spec, disks=(DiskSpec(pool="p", volume="v"),))
    broken = msgspec.structs.replace(launch, spec=spec, disks=(missing,))
    assert await world.a.driver.make_memory_ahead(spec)
    with pytest.raises(HypervisorError, match=r"missing\.raw.*No such file"):
        await world.a.driver.start_incoming(broken)
    with pytest.raises(NotFoundError):
        await world.a.driver.arriving_memory(VM)
    assert "No such file" in (await world.a.wait(DomainEventKind.EXITED)).detail
    assert list((world.folder / "a" / "run").iterdir()) == []
    assert await world.a.state() is DomainState.STOPPED
    await world.a.driver.start_incoming(launch)


async def test_a_destination_is_one_while_it_starts(world: QemuWorld) -> None:
    starting = asyncio.create_task(world.a.driver.start_incoming(world.launch()))
    found: list[DomainState] = []
    while not starting.done():
        await asyncio.wait([starting], timeout=0.002)
        found.append(await world.a.state())
    first = next(each for each in found if each is not DomainState.STOPPED)
    assert first is DomainState.INCOMING
    await starting


async def test_a_qemu_that_touched_its_memory_at_its_start_is_given_none_so_early_again(
    world: QemuWorld,
) -> None:
    """No version does that is known; what came is lost then."""
    driver, launch = world.a.driver, world.launch()
    with unittest.mock.patch.object(early_pages, "touched", return_value=True):
        assert await driver.make_memory_ahead(launch.spec)
        with pytest.raises(HypervisorError, match="touched its guest's memory"):
            await driver.start_incoming(launch)
        assert list((world.folder / "a" / "run").iterdir()) == []
        assert not await driver.make_memory_ahead(launch.spec)
        await driver.start_incoming(launch)


async def test_that_a_qemu_touched_its_memory_is_seen(world: QemuWorld) -> None:
    await world.a.driver.start_incoming(world.launch())
    pid = (await world.a.driver.inspect(VM)).pid
    assert pid is not None
    assert not await asyncio.to_thread(touched, pid, RAM_FD)
    await world.a.driver.destroy(VM)
    await world.a.driver.start(world.launch())
    pid = (await world.a.driver.inspect(VM)).pid
    assert pid is not None

    async def has_touched() -> bool:
        return await asyncio.to_thread(touched, pid, RAM_FD)

    await eventually(has_touched)  # Its vCPU runs, and has got as far.
