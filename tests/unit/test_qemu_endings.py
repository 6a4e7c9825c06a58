"""How the QEMU driver ends processes: with real ones, which are no QEMUs."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hypervisor.qemu import records
from hypervisor.qemu.driver import QemuDriver
from hypervisor.qemu.host import HostFacts
from hypervisor.qemu.launcher import Launched
from hypervisor.qemu.process import QemuProcess, Spawn, identify, spawn
from hypervisor.qemu.records import ProcessRecord
from migrator.model import DomainName, HypervisorCapabilities
from tests.unit.session_pair import SPEC

VM = DomainName(SPEC.name)
FACTS = HostFacts(
    binary="/bin/true",
    accelerator="tcg",
    capabilities=HypervisorCapabilities(
        driver="qemu", version="7.2.0", accelerator="tcg", machine_types=(), cpu_models=()
    ),
)


@pytest.fixture
async def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[QemuDriver]:
    async def facts() -> HostFacts:
        return FACTS

    opened = QemuDriver(tmp_path)
    monkeypatch.setattr(opened._probe, "facts", facts)
    await opened.open()
    try:
        yield opened
    finally:
        await opened.close()


def launched(directory: Path) -> Launched:
    """A process that only sleeps, recorded as a guest's."""
    directory.mkdir()
    request = Spawn(
        arguments=["/usr/bin/env", "sleep", "60"],
        environment=dict(os.environ),
        descriptors={},
        log=Path(os.devnull),
    )
    pid = spawn(request)
    identity = identify(pid)
    assert identity is not None
    record = ProcessRecord(
        process=identity, spec=SPEC, token=1, incoming=False, has_run=True, ram_fd=100, uffd_fd=200
    )
    return Launched(directory, QemuProcess(identity, os.pidfd_open(pid)), record)


async def test_a_disk_that_takes_no_writes_keeps_no_guest_alive(
    driver: QemuDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(records, "expect_end", refuse)
    made = await asyncio.to_thread(launched, driver.config.domain_directory(VM))
    guest = driver._take(made)
    try:
        await driver.destroy(VM)
        assert guest.gone.is_set()
    finally:
        made.process.signal(signal.SIGKILL)
        await asyncio.wait_for(guest.gone.wait(), 10)
