"""A real QEMU goes before others at the cores while its guest stands still, and only then.

And it is the first to be killed where memory runs out while its guest runs elsewhere.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrator import cores, shortage
from migrator.ports import AbortOutcome
from tests.contract.hypervisor_worlds import VM, Node, QemuWorld, eventually, open_qemus
from tests.integration.bare_metal import COUNT, write_disk

pytestmark = pytest.mark.lab


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[QemuWorld]:
    async with open_qemus(tmp_path) as made:
        yield made


async def pid_at(node: Node) -> int:
    pid = (await node.driver.inspect(VM)).pid
    assert pid is not None
    return pid


async def niceness(node: Node) -> set[int | None]:
    """Of the guest's QEMU, and of the group that its session is."""
    pid = await pid_at(node)
    of_process = os.getpriority(os.PRIO_PROCESS, pid)
    return {of_process, await asyncio.to_thread(cores.group_niceness, pid)} - {None}


async def oom_adjustment(node: Node) -> int:
    return await asyncio.to_thread(shortage.adjustment_of, await pid_at(node))


async def as_any(node: Node) -> bool:
    return await oom_adjustment(node) == await asyncio.to_thread(shortage.ours)


async def calm(node: Node) -> bool:
    return await niceness(node) == {cores.usual()} and await as_any(node)


async def test_a_guest_that_stands_still_goes_first_and_is_one_of_many_after_that(
    world: QemuWorld,
) -> None:
    write_disk(world.folder / "vm-1.raw", COUNT)
    await world.a.driver.start(world.launch(machine="pc-q35-7.2"))
    await eventually(lambda: calm(world.a))
    await world.begin(world.a, world.b)
    assert await niceness(world.a) == await niceness(world.b) == {cores.URGENT}
    assert await as_any(world.a)
    assert await oom_adjustment(world.b) == shortage.FIRST
    assert await world.a.driver.abort_switchover(VM) is AbortOutcome.RESUMED
    await eventually(lambda: calm(world.a))
    await world.b.driver.destroy(VM)

    await world.switch_over(world.a, world.b)
    await eventually(lambda: as_any(world.b))  # It may be the only copy, and doesn't run yet.
    assert await niceness(world.b) == {cores.URGENT}
    await world.b.driver.resume(VM)
    # An agent that ends here leaves it urgent: the next one finds that it runs.
    assert await world.reopen("b") == [VM]
    await eventually(lambda: calm(world.b))
