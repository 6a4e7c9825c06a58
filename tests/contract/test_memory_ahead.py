"""Memory that is made before its destination: pages are written to it by then."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrator.errors import NotFoundError
from migrator.model import DomainState
from migrator.ports import HypervisorDriver, close_regions
from tests.contract.hypervisor_worlds import KINDS, VM, World, open_world


@pytest.fixture(params=KINDS)
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(request.param, tmp_path) as made:
        yield made


async def _write_early(driver: HypervisorDriver, came: bytes) -> None:
    (region,) = await driver.arriving_memory(VM)
    try:
        for at in (0, 0xF0000, region.size_bytes - len(came)):  # Where firmware lives, too.
            assert os.pwrite(region.fd, came, at) == len(came)
    finally:
        close_regions([region])


@pytest.mark.parametrize("when", ["before", "while", "after"])
async def test_what_is_written_to_a_destinations_memory_before_it_is_up_stays(
    world: World, when: str
) -> None:
    """Its page engine writes there then."""
    driver, came = world.a.driver, b"early" * 1000
    assert await driver.make_memory_ahead(world.launch().spec)
    assert await world.a.state() is DomainState.STOPPED
    if when == "before":
        await _write_early(driver, came)
    starting = asyncio.create_task(driver.start_incoming(world.launch()))
    if when == "while":
        await asyncio.sleep(0)
        await _write_early(driver, came)
    await starting
    if when == "after":
        await _write_early(driver, came)
    memory = await driver.memory(VM)
    try:
        (region,) = memory.regions
        for at in (0, 0xF0000, region.size_bytes - len(came)):
            assert os.pread(region.fd, len(came), at) == came
    finally:
        memory.close()
    assert await world.a.state() is DomainState.INCOMING


async def test_memory_that_no_destination_takes_is_given_back(world: World) -> None:
    driver, before = world.a.driver, _open_memory()
    assert await driver.make_memory_ahead(world.launch().spec)
    assert await driver.make_memory_ahead(world.launch().spec), "of one that nobody dropped"
    await driver.drop_memory_ahead(VM)
    await driver.drop_memory_ahead(VM)
    with pytest.raises(NotFoundError):
        await driver.arriving_memory(VM)
    assert _open_memory() == before
    await driver.start_incoming(world.launch())
    await driver.drop_memory_ahead(VM)
    (region,) = await driver.arriving_memory(VM)
    close_regions([region])
    assert await world.a.state() is DomainState.INCOMING


def _open_memory() -> int:
    """How many memory files this process has open."""
    links = [each.readlink() for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return sum("memfd:" in str(each) for each in links)
