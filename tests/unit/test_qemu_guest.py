"""A guest whose QEMU has ended leaves its successor's monitors alone."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import cast

import pytest

from hypervisor.qemu.config import monitor_path
from hypervisor.qemu.guest import Guest
from hypervisor.qemu.process import QemuProcess
from hypervisor.qemu.qmp import QmpNotSent
from hypervisor.qemu.records import ProcessRecord
from migrator.model import DomainSpec
from tests.unit.session_pair import SPEC


class Ended:
    """A QEMU that is gone; its watcher hasn't been told yet."""

    exited = True
    pid = 0

    def watch(self, _: object) -> None: ...


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
