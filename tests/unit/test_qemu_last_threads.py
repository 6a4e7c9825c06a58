"""A QEMU that is ending when its agent starts: its first thread has ended, another is left.

So it is with one that was killed, while its memory is freed, and with one whose disk hangs for as
long as that does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from hypervisor.qemu import process, records
from hypervisor.qemu.driver import QemuDriver
from hypervisor.qemu.process import ProcessIdentity, Spawn, identify, spawn
from hypervisor.qemu.records import ProcessRecord
from migrator.model import DomainName, DomainState
from tests.unit.session_pair import SPEC

VM = DomainName(SPEC.name)
ENDS_ITS_FIRST_THREAD = """
import ctypes, sys, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
sys.stdin.read()
ctypes.CDLL(None).pthread_exit(None)
"""


def begun(directory: Path) -> ProcessIdentity:
    """A process of that kind, recorded as a guest's that runs."""
    directory.mkdir()
    request = Spawn(
        arguments=[sys.executable, "-c", ENDS_ITS_FIRST_THREAD],
        environment=dict(os.environ),
        descriptors={},
        log=directory / "log",
    )
    identity = identify(spawn(request))
    assert identity is not None
    record = ProcessRecord(
        process=identity, spec=SPEC, token=1, incoming=False, has_run=True, ram_fd=100, uffd_fd=200
    )
    records.write_record(directory, record)
    (directory / records.END).write_bytes(b"r")
    return identity


@pytest.fixture
async def driver(tmp_path: Path) -> AsyncIterator[QemuDriver]:
    made = QemuDriver(tmp_path)
    await made.open()
    await made.close()
    yield made
    await made.close()


@pytest.fixture
async def end(driver: QemuDriver) -> AsyncIterator[Callable[[], None]]:
    """Ends what is left of it; nobody looks after it yet."""
    identity = await asyncio.to_thread(begun, driver.config.domain_directory(VM))
    pidfd = os.pidfd_open(identity.pid)

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    try:
        async with asyncio.timeout(30):
            while await asyncio.to_thread(identify, identity.pid):  # noqa: ASYNC110 - of no event
                await asyncio.sleep(0.01)
        yield kill
    finally:
        kill()
        with contextlib.suppress(ChildProcessError):  # The driver has reaped it.
            await asyncio.to_thread(os.waitid, os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)


@pytest.mark.parametrize("wanted", [False, True])
async def test_it_is_held_until_it_has_ended(
    driver: QemuDriver, end: Callable[[], None], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kept the agent from starting, for as long as a disk hung."""
    monkeypatch.setattr(process, "ENDING_S", 0.05)
    if wanted:
        await asyncio.to_thread(records.expect_end, driver.config.domain_directory(VM))
    assert await driver.open() == [VM]
    assert (await driver.inspect(VM)).state is DomainState.UNKNOWN
    gone = driver._guests[VM].gone
    end()
    async with asyncio.timeout(30):
        await gone.wait()
    assert (await driver.inspect(VM)).state is DomainState.STOPPED
    assert list(driver.crashed()) == ([] if wanted else [VM])


async def test_one_that_ends_in_time_is_gone(
    driver: QemuDriver, end: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "ENDING_S", 30.0)
    asyncio.get_running_loop().call_later(0.1, end)
    assert await driver.open() == []
    assert list(driver.crashed()) == [VM]
