"""A guest's process: what it leaves alone when it has ended, what is recorded of it."""

from __future__ import annotations

import asyncio
import errno
import socket
from pathlib import Path
from typing import cast

import pytest

from hypervisor.qemu import guest as guest_module
from hypervisor.qemu import records
from hypervisor.qemu.config import monitor_path
from hypervisor.qemu.guest import Guest
from hypervisor.qemu.process import ProcessIdentity, QemuProcess
from hypervisor.qemu.qmp import QmpNotSent
from hypervisor.qemu.records import ProcessRecord
from migrator.errors import HypervisorError
from migrator.model import DomainSpec
from tests.unit.session_pair import SPEC


class Ended:
    """A QEMU that is gone; its watcher hasn't been told yet."""

    exited = True
    pid = 0

    def watch(self, _: object) -> None: ...


class Running(Ended):
    exited = False

    def release(self) -> None: ...


class Record:
    spec: DomainSpec = SPEC
    incoming = False
    has_run = True


async def test_nothing_connects_to_what_listens_in_its_place(tmp_path: Path) -> None:
    guest = Guest(
        tmp_path,
        cast(ProcessRecord, Record()),
        cast(QemuProcess, Ended()),
        emit=lambda _: None,
        on_gone=lambda _: None,
    )
    with socket.socket(socket.AF_UNIX) as successor:
        successor.bind(str(monitor_path(tmp_path, 0)))
        successor.listen(1)
        successor.setblocking(False)
        with pytest.raises(QmpNotSent, match="has ended"):
            await guest.connect(timeout_s=1.0)
        with pytest.raises(BlockingIOError):
            successor.accept()


@pytest.mark.parametrize(("end_reason", "told"), [(None, 1), ("powered off by force", 0)])
async def test_a_monitor_that_goes_as_its_guest_is_ended_alarms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, end_reason: str | None, told: int
) -> None:
    """Each end by force was logged as a connection that was lost."""
    guest = Guest(
        tmp_path,
        cast(ProcessRecord, Record()),
        cast(QemuProcess, Running()),
        emit=lambda _: None,
        on_gone=lambda _: None,
    )
    tried = asyncio.Event()

    async def connect(timeout_s: float = 1.0) -> None:
        if tried.is_set():  # The second time: the first one's line, if there is any, is written.
            again.set()
        tried.set()
        raise HypervisorError("can't connect to the monitor")

    again = asyncio.Event()
    guest.connect = connect  # type: ignore[method-assign, assignment]
    guest.end_reason = end_reason
    guest.reconnect_later()
    await again.wait()
    await guest.let_go()
    assert len([each for each in caplog.records if "lost the connection" in each.message]) == told


async def test_that_it_has_run_is_recorded_once_the_disk_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was tried once. The next agent took a guest that was paused by then for a destination's
    copy that never ran, and ended it."""
    record = ProcessRecord(
        process=ProcessIdentity(pid=1, start_ticks=1, boot_id="b"),
        spec=SPEC,
        token=1,
        incoming=True,
        ram_fd=3,
        uffd_fd=4,
    )
    written: list[ProcessRecord] = []
    full = True

    def write(_: Path, record: ProcessRecord) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(record)

    monkeypatch.setattr(records, "write_record", write)
    monkeypatch.setattr(guest_module, "RECORD_AGAIN_S", 0.01)
    guest = Guest(
        tmp_path, record, cast(QemuProcess, Running()), emit=lambda _: None, on_gone=lambda _: None
    )
    guest._runs()
    with pytest.raises(HypervisorError, match=r"was not paused: .*No space left on device"):
        await guest.pause()
    full = False
    async with asyncio.timeout(10):
        while guest._unsaved:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert written[0].has_run
    with pytest.raises(HypervisorError, match="monitor"):  # Nothing else speaks against it now.
        await guest.pause()
    await guest.let_go()
