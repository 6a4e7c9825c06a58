"""A local disk that hangs under the QEMU driver's folder keeps no guest alive, nor its end unsaid.

With real processes, which are no QEMUs.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from hypervisor.qemu import driver as driver_module
from hypervisor.qemu import guest as guest_module
from hypervisor.qemu import records
from hypervisor.qemu.driver import QemuDriver
from hypervisor.qemu.guest import Guest
from migrator.errors import HypervisorError
from migrator.model import DomainState
from migrator.own_threads import THREADS_MAX, in_own_thread
from migrator.ports import DomainEvent, DomainEventKind
from tests.unit.test_qemu_endings import LAUNCH, VM, driver, launched

__all__ = ["driver"]
MORE_THAN_A_LOOP_HAS = 40
"""asyncio's own threads are 32 at most."""


class Hang(threading.Event):
    """Until it is set; `calls` counts who waits for that."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = threading.Semaphore(0)


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hang]:
    """Until it is set, nothing is removed in the state directory."""
    monkeypatch.setattr(guest_module, "DISK_S", 0.05)
    answers = Hang()

    def hanging(name: str) -> None:
        real: Callable[[Path], None] = getattr(records, name)

        def wait(directory: Path) -> None:
            answers.calls.release()
            answers.wait(60)
            real(directory)

        monkeypatch.setattr(records, name, wait)

    hanging("expect_end")
    hanging("remove_directory")
    yield answers
    answers.set()


@pytest.fixture
async def guest(driver: QemuDriver) -> AsyncIterator[Guest]:
    made = await asyncio.to_thread(launched, driver.config.domain_directory(VM))
    taken = driver._take(made)
    yield taken
    made.process.signal(signal.SIGKILL)
    await asyncio.wait_for(taken.gone.wait(), 10)


async def test_what_has_to_end_ends(driver: QemuDriver, guest: Guest, hung: Hang) -> None:
    """A stale copy computed on, and answered for its addresses, until the disk did."""
    async with asyncio.timeout(5):
        await driver.destroy(VM)
    assert guest.process.exited
    assert (await driver.inspect(VM)).state is DomainState.STOPPED


async def test_an_end_is_told(driver: QemuDriver, guest: Guest, hung: Hang) -> None:
    guest.record = msgspec.structs.replace(guest.record, incoming=True, has_run=False)
    told: asyncio.Queue[DomainEvent] = asyncio.Queue()
    driver.subscribe(told.put_nowait)
    guest.process.signal(signal.SIGKILL)
    async with asyncio.timeout(5):
        event = await told.get()
    assert (event.kind, event.crashed) == (DomainEventKind.EXITED, True)


async def test_the_next_start_waits_until_the_last_runs_folder_is_gone(
    driver: QemuDriver, guest: Guest, hung: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was to be removed must not be the next run's."""
    monkeypatch.setattr(driver_module, "LAUNCH_TIMEOUT_S", 0.05)
    await driver.destroy(VM)
    with pytest.raises(HypervisorError, match="last run can't be removed"):
        await driver.start(LAUNCH)
    hung.set()
    assert guest.removal is not None
    await asyncio.wait({guest.removal}, timeout=5)
    assert not guest.directory.exists()
    with pytest.raises(HypervisorError) as started:  # It is no QEMU that is started.
        await driver.start(LAUNCH)
    assert "last run" not in str(started.value)


async def test_what_hangs_takes_no_thread_that_others_need(driver: QemuDriver, hung: Hang) -> None:
    folder = driver.config.run_directory / "unrecorded"
    await asyncio.to_thread(folder.mkdir)
    opening = [asyncio.create_task(driver._adopt(folder)) for _ in range(MORE_THAN_A_LOOP_HAS)]
    async with asyncio.timeout(5):
        for _ in range(THREADS_MAX):
            assert await in_own_thread("test", lambda: hung.calls.acquire(timeout=4))
        assert await asyncio.to_thread(lambda: "the heartbeat") == "the heartbeat"
    hung.set()
    await asyncio.gather(*opening)
