"""The QEMU driver's pure parts, and those that need a process but no QEMU."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hypervisor.machine_types import pin_machine
from hypervisor.qemu import logs, process, records
from hypervisor.qemu.host import machine_names
from hypervisor.qemu.memory import parse_maps
from hypervisor.qemu.offload import offload
from hypervisor.qemu.process import (
    ProcessIdentity,
    QemuProcess,
    Spawn,
    identify,
    spawn,
)
from hypervisor.qemu.qmp import SOCKET_PATH_BYTES_MAX, parse_event, short_path
from hypervisor.qemu.records import ProcessRecord
from hypervisor.qemu.status import MigrationStatus, domain_state
from migrator.errors import HypervisorError, InvalidRequest
from migrator.model import DomainSpec, DomainState
from migrator.ports import RegionMapping

MAPS = """\
55d0c0000000-55d0c0a00000 r-xp 00000000 fd:00 1234       /usr/bin/qemu-system-x86_64
7f0000000000-7f0000200000 rw-s 00000000 00:01 4711       /memfd:ferry-vm-1 (deleted)
7f0000200000-7f0004000000 rw-s 00200000 00:01 4711       /memfd:ferry-vm-1 (deleted)
7f0005000000-7f0005100000 rw-s 00000000 00:01 4712       /memfd:ferry-vm-2 (deleted)
7f0006000000-7f0006100000 rw-s 00300000 00:01 4711       /memfd:ferry-vm-1 (deleted)
7f0007000000-7f0007100000 rw-p 00000000 00:00 0
7f0008000000-7f0008100000 rw-s 00000000 fd:00 4711       /some/file/with/the/same/inode
"""


def test_maps_joins_what_the_kernel_split() -> None:
    assert parse_maps(MAPS, 4711) == (
        RegionMapping(address=0x7F0000000000, length_bytes=0x4000000, region_offset_bytes=0),
        RegionMapping(address=0x7F0006000000, length_bytes=0x100000, region_offset_bytes=0x300000),
    )
    assert parse_maps(MAPS, 1) == ()


AVAILABLE = ("pc", "q35", "pc-q35-7.2", "pc-q35-7.1", "pc-q35-2.12", "pc-i440fx-7.2", "pc-q35-10.0")


@pytest.mark.parametrize(
    ("machine", "pinned"),
    [("q35", "pc-q35-10.0"), ("pc", "pc-i440fx-7.2"), ("pc-q35-7.1", "pc-q35-7.1")],
)
def test_pin_machine(machine: str, pinned: str) -> None:
    assert pin_machine(machine, AVAILABLE) == pinned


@pytest.mark.parametrize(
    ("machine", "available"),
    [("pc-q35-9.9", AVAILABLE), ("microvm", (*AVAILABLE, "microvm")), ("pc", ("pc-q35-7.2",))],
)
def test_a_machine_that_is_not_there(machine: str, available: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        pin_machine(machine, available)
    assert "machine" in caught.value.fields


def test_machine_names_of_a_query() -> None:
    answer = [{"name": "pc-q35-7.2", "alias": "q35"}, {"name": "microvm"}, {"name": "none"}]
    assert machine_names(answer) == ("pc-q35-7.2", "q35")
    with pytest.raises(HypervisorError):
        machine_names(None)


@pytest.mark.parametrize(
    ("run_state", "migration", "incoming", "has_run", "expected"),
    [
        ("running", "none", False, True, DomainState.RUNNING),
        ("paused", "none", False, True, DomainState.PAUSED),
        ("paused", "completed", True, False, DomainState.LOADED),
        ("inmigrate", "none", True, False, DomainState.INCOMING),
        ("prelaunch", "none", False, False, DomainState.STARTING),
        ("prelaunch", "none", False, True, DomainState.PAUSED),
        ("finish-migrate", "pre-switchover", False, True, DomainState.PRE_SWITCHOVER),
        ("finish-migrate", "completed", False, True, DomainState.POSTMIGRATE),
        ("postmigrate", "completed", False, True, DomainState.POSTMIGRATE),
        ("postmigrate", "cancelled", False, True, DomainState.PAUSED),
        ("io-error", "none", False, True, DomainState.IO_ERROR),
        ("guest-panicked", "none", False, True, DomainState.CRASHED),
        ("internal-error", "none", False, True, DomainState.CRASHED),
        ("something-new", "none", False, True, DomainState.UNKNOWN),
    ],
)
def test_domain_state(
    run_state: str, migration: str, incoming: bool, has_run: bool, expected: DomainState
) -> None:
    status = MigrationStatus.parse(migration)
    assert domain_state(run_state, status, incoming=incoming, has_run=has_run)[0] is expected


def test_an_unknown_migration_status_is_other() -> None:
    assert MigrationStatus.parse("wait-unplug") is MigrationStatus.OTHER


def test_events_carry_qemus_time() -> None:
    message = {"event": "STOP", "timestamp": {"seconds": 12, "microseconds": 500_000}}
    event = parse_event(message)
    assert (event.name, event.at_s, event.data) == ("STOP", 12.5, {})
    assert parse_event({}).name == ""


def test_a_long_socket_path_is_shortened(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    with short_path(folder / "m0") as address:
        assert len(address) <= SOCKET_PATH_BYTES_MAX
        Path(address).touch()
    assert (folder / "m0").exists()
    with short_path(Path("/run/m0")) as address:
        assert address == "/run/m0"


def record(identity: ProcessIdentity) -> ProcessRecord:
    spec = DomainSpec(name="vm-1", memory_bytes=64 * 1024**2)
    return ProcessRecord(
        process=identity, spec=spec, token=3, incoming=True, ram_fd=100, uffd_fd=200
    )


def test_records(tmp_path: Path) -> None:
    written = record(ProcessIdentity(pid=1, start_ticks=2, boot_id="b"))
    assert records.read_record(tmp_path) is None
    records.write_record(tmp_path, written)
    assert records.read_record(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    (tmp_path / "state.json").write_text('{"format": 1}')
    assert records.read_record(tmp_path) is None
    records.remove_directory(tmp_path / "none")


def test_a_process_that_cannot_be_looked_at_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a descriptor to spare an agent took its running guests for ended ones."""
    ours = identify(os.getpid())
    assert ours is not None

    def fails_by(code: int) -> Callable[[int], int]:
        def fail(_pid: int) -> int:
            raise OSError(code, os.strerror(code))

        return fail

    for code in (errno.EMFILE, errno.ENOMEM):
        monkeypatch.setattr(os, "pidfd_open", fails_by(code))
        with pytest.raises(HypervisorError, match="can't look at process"):
            QemuProcess.hold(ours)
    for code in (errno.ESRCH, errno.EINVAL):
        monkeypatch.setattr(os, "pidfd_open", fails_by(code))
        assert QemuProcess.hold(ours) is None
    monkeypatch.undo()
    monkeypatch.setattr(process, "_look_at", lambda _pid: (None, False))  # /proc can't be read.
    with pytest.raises(HypervisorError, match="which lives"):
        QemuProcess.hold(ours)


def test_a_reused_pid_is_another_process() -> None:
    ours = identify(os.getpid())
    assert ours is not None
    earlier = ProcessIdentity(pid=ours.pid, start_ticks=ours.start_ticks - 1, boot_id=ours.boot_id)
    assert QemuProcess.hold(earlier) is None
    same = QemuProcess.hold(ours)
    assert same is not None
    same.release()
    same.release()
    assert identify(2**22) is None


async def test_a_process_inherits_what_it_is_given_and_its_end_is_noticed(tmp_path: Path) -> None:
    fd = os.memfd_create("t", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096)
    log = tmp_path / "log"
    script = "import os,time;print(os.fstat(100).st_size,os.getsid(0)==os.getpid(),flush=True);"
    request = Spawn(
        arguments=["/usr/bin/env", "python3", "-c", script + "time.sleep(60)"],
        environment=dict(os.environ),
        descriptors={100: fd},
        log=log,
    )
    pid = await offload(lambda: spawn(request))
    os.close(fd)
    identity = await offload(lambda: identify(pid))
    assert identity is not None
    process = QemuProcess(identity, os.pidfd_open(pid))
    ended = asyncio.Event()
    process.watch(ended.set)
    try:
        await asyncio.to_thread(wait_for_words, log)
        assert not await process.wait(timeout_s=0.01)
    finally:
        process.signal(signal.SIGKILL)
        assert await process.wait(timeout_s=10)
    assert ended.is_set()
    assert process.exit_status == -signal.SIGKILL
    process.signal(signal.SIGKILL)
    process.release()
    process.signal(signal.SIGKILL)  # Nothing happens: it is gone, and released.
    assert await asyncio.to_thread(logs.since, log, 0) == "4096 True"


def wait_for_words(log: Path) -> None:
    deadline = time.monotonic() + 20
    while not logs.size_bytes(log):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_program_that_is_not_there_leaves_nothing_open(tmp_path: Path) -> None:
    request = Spawn(
        arguments=["/nonexistent"], environment={}, descriptors={100: 2}, log=tmp_path / "log"
    )
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(HypervisorError):
        spawn(request)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_log_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a" * logs.LOG_BYTES_MAX + b"z")
    logs.trim(path)
    assert path.stat().st_size == logs.LOG_BYTES_KEPT
    assert path.read_bytes().endswith(b"az")
    logs.trim(path)
    assert path.stat().st_size == logs.LOG_BYTES_KEPT
    logs.trim(tmp_path / "none")
    path.write_text("one\n\n two\n")
    assert logs.since(path, 4) == "two"
    path.write_text("2026-11-29T12:27:39.308797Z qemu: no CPU model 'zork'\nsaid 2026-11-29\n")
    assert logs.since(path, 0) == "qemu: no CPU model 'zork' / said 2026-11-29"


async def test_logs_on_a_disk_that_hangs_hold_up_nobody_and_take_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at a domain took one of the few that the heartbeat needs."""
    back, trimmed = threading.Event(), list[str]()

    def hang(path: Path) -> None:
        back.wait(30.0)
        trimmed.append(path.name)

    monkeypatch.setattr(logs, "trim", hang)
    trimmer, before = logs.Trimmer(), threading.active_count()
    try:
        for _ in range(3):
            for name in ("one", "two"):
                trimmer.soon(tmp_path / name)
        assert threading.active_count() <= before + 1
        assert trimmed == []
    finally:
        back.set()
    async with asyncio.timeout(10):
        assert trimmer._under_way is not None
        await trimmer._under_way
        trimmer.soon()
        await trimmer._under_way
    assert trimmed == ["one", "one", "two"]


async def test_a_cancelled_offload_undoes_its_result() -> None:
    begun, go, undone = threading.Event(), threading.Event(), asyncio.Event()

    def work() -> int:
        begun.set()
        go.wait(10)
        return 7

    results: list[int] = []

    def undo(result: int) -> None:
        results.append(result)
        undone.set()

    task = asyncio.create_task(offload(work, undo=undo))
    assert await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    async with asyncio.timeout(10):
        await undone.wait()
    assert results == [7]
