"""How the QEMU driver ends processes: with real ones, which are no QEMUs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hypervisor.qemu import driver as driver_module
from hypervisor.qemu import launcher, records
from hypervisor.qemu.driver import QemuDriver
from hypervisor.qemu.host import HostFacts
from hypervisor.qemu.launcher import Launched
from hypervisor.qemu.process import QemuProcess, Spawn, identify, spawn
from hypervisor.qemu.records import ProcessRecord
from migrator.errors import HypervisorError
from migrator.model import DomainName, DomainState, FencingToken, HypervisorCapabilities
from migrator.ports import Launch
from node_agent.cluster_calls import STATUS_TIMEOUT_S
from tests.unit.session_pair import SPEC

VM = DomainName(SPEC.name)
LAUNCH = Launch(spec=SPEC, disks=(), tap_fds=(), token=FencingToken(1))
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


async def test_a_hypervisor_that_is_silent_for_a_while_is_asked_to_power_off(
    driver: QemuDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy host's QEMU may need more than an inspection's two seconds: its guest has files."""
    made = await asyncio.to_thread(launched, driver.config.domain_directory(VM))
    guest = driver._take(made)
    presses: list[str] = []

    async def execute(command: str, *_: object, **__: object) -> object:
        if command != "system_powerdown":
            raise HypervisorError("no answer in 2 s")
        presses.append(command)
        if len(presses) == 2:
            made.process.signal(signal.SIGTERM)  # As a guest ends that has written everything.
        return {}

    monkeypatch.setattr(guest, "execute", execute)
    monkeypatch.setattr(driver_module, "POWER_BUTTON_PERIOD_S", 0.05)
    try:
        assert (await driver.inspect(VM)).state is DomainState.UNKNOWN
        assert await driver.stop(VM, timeout_s=10)
        assert presses == ["system_powerdown"] * 2
    finally:
        made.process.signal(signal.SIGKILL)
        await asyncio.wait_for(guest.gone.wait(), 10)


async def test_a_start_that_is_cancelled_is_over_when_its_process_is(
    driver: QemuDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is removed last: that must not be the next start's."""
    begun, go = threading.Event(), threading.Event()
    made: list[Launched] = []

    def launch_slowly(_request: object, directory: Path, *_: object) -> Launched:
        begun.set()
        go.wait(10)
        made.append(launched(directory))
        return made[0]

    monkeypatch.setattr(launcher, "launch_process", launch_slowly)
    starting = asyncio.create_task(driver.start(LAUNCH))
    try:
        assert await asyncio.to_thread(begun.wait, 10)
        starting.cancel()
        await asyncio.sleep(0)
        starting.cancel()  # Whoever is impatient waits all the same.
        await asyncio.sleep(0.01)
        with pytest.raises(HypervisorError, match="is here already"):
            await driver.start(LAUNCH)
    finally:
        go.set()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    assert starting.cancelled()
    assert identify(made[0].process.pid) is None
    assert not driver.config.domain_directory(VM).exists()


async def test_a_hypervisor_that_hangs_is_given_up_before_its_node_is(
    driver: QemuDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each agent asks a node of all its domains at once: they all were unknown, and the node was
    said not to answer, because of one. The time is for all that is asked of it.
    """
    gives_up_s = driver_module.INSPECT_TIMEOUT_S + driver_module.EXIT_NOTICE_TIMEOUT_S
    assert gives_up_s + 0.5 < STATUS_TIMEOUT_S
    made = await asyncio.to_thread(launched, driver.config.domain_directory(VM))
    guest = driver._take(made)
    given: list[float] = []

    async def execute(command: str, *_: object, timeout_s: float) -> object:
        given.append(timeout_s)
        await asyncio.sleep(0.15)
        if command == "query-block":
            raise HypervisorError("no answer in time")
        return {"status": "io-error"}

    monkeypatch.setattr(guest, "execute", execute)
    try:
        assert (await driver.inspect(VM)).state is DomainState.IO_ERROR
    finally:
        made.process.signal(signal.SIGKILL)
        await asyncio.wait_for(guest.gone.wait(), 10)
    limit_s = driver_module.INSPECT_TIMEOUT_S
    assert given[0] == limit_s and given[1] <= limit_s - 0.15 and len(given) == 2


async def test_a_guest_whose_record_cannot_be_read_is_not_stopped(driver: QemuDriver) -> None:
    """Its agent took it for that, closed its volumes and said so in the store: whoever started the
    domain then had it run twice."""
    folder = driver.config.domain_directory(VM)
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(folder / "m1"))
        listener.listen()
        await driver.close()
        assert await driver.open() == []
        status = await driver.inspect(VM)
        assert status.state is DomainState.UNKNOWN
        assert status.reason is not None
        assert "state.json can't be read" in status.reason
        assert list(await driver.list_domains()) == [status]
        for refused in (
            driver.destroy(VM),
            driver.start(LAUNCH),
            driver.abort_switchover(VM),
            driver.resume(VM),
            driver.stop(VM, timeout_s=1.0),
        ):
            with pytest.raises(HypervisorError, match="left as it is"):
                await refused
        assert (folder / "state.json").exists()
    await driver.close()
    assert await driver.open() == []
    assert (await driver.inspect(VM)).state is DomainState.STOPPED
    assert not folder.exists()


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
async def test_a_disk_that_fails_is_no_missing_record(
    driver: QemuDriver, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    made = await asyncio.to_thread(launched, driver.config.domain_directory(VM))

    def fail(*_: object) -> bytes:
        raise OSError(code, os.strerror(code))

    try:
        await asyncio.to_thread(records.write_record, made.directory, made.record)
        with monkeypatch.context() as patch, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(made.directory / "m0"))
            listener.listen()
            patch.setattr(Path, "read_bytes", fail)
            patch.setattr(Path, "lstat", fail)
            await driver._adopt(made.directory)
            assert (await driver.inspect(VM)).state is DomainState.UNKNOWN
        assert made.directory.exists()
    finally:
        await asyncio.to_thread(made.kill)
