"""Boots the guest under QEMU's emulation and checks that it does, and notices, what it shall."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import re
import socket
import struct
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.guest.build import GuestImage, build_guest, default_cache_directory
from deploy.guest.cmdline import guest_cmdline
from deploy.guest.disk_check import check_disk
from deploy.guest.protocol import (
    STREAM_10M_BYTES,
    GuestStatus,
    UdpPacket,
    parse_status,
    read_console,
    stream_bytes,
)
from deploy.guest.records import RECORD_BYTES, Record, encode_record, parse_slot

pytestmark = pytest.mark.lab

GUEST_MEMORY_BYTES = 256 * 1024**2
DISK_BYTES = 4 * 1024**2
CIRCLE_SLOTS = 256  # 1 MiB: small, so that the guest's own check comes round quickly
BOOT_TIMEOUT_S = 60.0
WAIT_TIMEOUT_S = 30.0


class Guest:
    """A running guest: its QEMU, its files, its forwarded HTTP port."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], http_port: int) -> None:
        self.process = process
        self.disk = folder / "disk.raw"
        self.memory = folder / "memory"
        self._console = folder / "console.log"
        self._qmp = folder / "qmp"
        self._http_port = http_port

    def console(self) -> str:
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    def get(self, target: str) -> bytes:
        url = f"http://127.0.0.1:{self._http_port}{target}"
        with urllib.request.urlopen(url, timeout=WAIT_TIMEOUT_S) as response:
            body: bytes = response.read()
            return body

    def status(self, target: str = "/status") -> GuestStatus:
        return parse_status(self.get(target))

    def wait_for(self, what: str, holds: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert self.process.poll() is None, f"QEMU ended before: {what}\n{self.console()}"
            assert time.monotonic() < deadline, f"not in time: {what}\n{self.console()}"
            time.sleep(0.05)

    def press_power_button(self) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(WAIT_TIMEOUT_S)
            connection.connect(str(self._qmp))
            with connection.makefile("rw") as stream:
                assert "QMP" in json.loads(stream.readline())
                for command in ("qmp_capabilities", "system_powerdown"):
                    stream.write(json.dumps({"execute": command}) + "\n")
                    stream.flush()
                    while "return" not in json.loads(stream.readline()):
                        pass  # an event; the timeout bounds this


@pytest.fixture(scope="module")
def image() -> GuestImage:
    return build_guest(default_cache_directory())


def free_tcp_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def booted(image: GuestImage, folder: Path, cmdline: str) -> Iterator[Guest]:
    """A guest that was started; its QEMU is gone when this ends, whatever happens."""
    http_port = free_tcp_port()
    disk = folder / "disk.raw"
    if not disk.exists():
        disk.touch()
    os.truncate(disk, DISK_BYTES)
    size = f"{GUEST_MEMORY_BYTES >> 20}M"
    # Memory on a disk's file system would be in the way of the guest's own direct I/O.
    memory = Path("/dev/shm") / f"ferry-guest-{os.getpid()}-{http_port}"
    memory.touch()
    (folder / "memory").symlink_to(memory)
    process = subprocess.Popen(
        [
            *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "qemu64", "-m", size),
            *("-machine", "q35,memory-backend=ram", "-nodefaults", "-no-user-config"),
            *("-object", f"memory-backend-file,id=ram,size={size},mem-path=memory,share=on"),
            *("-display", "none", "-no-reboot", "-serial", "file:console.log"),
            *("-qmp", "unix:qmp,server=on,wait=off"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", cmdline),
            *("-drive", "file=disk.raw,format=raw,if=virtio,cache=none"),
            *("-netdev", f"user,id=n0,hostfwd=tcp:127.0.0.1:{http_port}-:80"),
            *("-device", "virtio-net-pci,netdev=n0,romfile="),
        ],
        cwd=folder,
        stdin=subprocess.DEVNULL,
    )
    try:
        yield Guest(folder, process, http_port)
    finally:
        process.kill()
        process.wait(WAIT_TIMEOUT_S)
        (folder / "memory").unlink(missing_ok=True)
        memory.unlink(missing_ok=True)


def earlier_records(count: int) -> bytes:
    """What another guest wrote before: a disk that this one must go on with."""
    records: list[Record] = []
    image = b""
    for sequence in range(1, count + 1):
        data = encode_record(
            sequence=sequence,
            slots=CIRCLE_SLOTS,
            boot_id=1,
            previous_crc32=records[-1].crc32 if records else 0,
        )
        record = parse_slot(data)
        assert isinstance(record, Record)
        records.append(record)
        image += data
    return image


def receive(receiver: socket.socket, count: int) -> list[UdpPacket]:
    return [UdpPacket.parse(receiver.recv(64)) for _ in range(count)]


def test_a_healthy_guest(image: GuestImage, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(earlier_records(10))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(BOOT_TIMEOUT_S)
        cmdline = guest_cmdline(
            name="web1",
            address="10.0.2.15/24",
            gateway="10.0.2.2",
            udp=f"10.0.2.2:{receiver.getsockname()[1]}",
            memory_mib=32,
            dirty_pages_per_s=1000,
            disk=True,
            disk_mib=1,
        )
        with booted(image, tmp_path, cmdline) as guest:
            guest.wait_for("ready", lambda: "FERRY-READY" in guest.console(), BOOT_TIMEOUT_S)
            packets = receive(receiver, 500)
            assert b"web1" in guest.get("/")
            assert guest.get("/10m") == stream_bytes(0, STREAM_10M_BYTES)
            assert guest.get("/stream?bytes=12345&bytes_per_s=20000") == stream_bytes(0, 12345)
            guest.wait_for("20 records", lambda: guest.status().disk_records_written > 20, 30.0)
            status = guest.status("/verify")
            guest.press_power_button()
            assert guest.process.wait(WAIT_TIMEOUT_S) == 0
            console = guest.console()

    sequences = [packet.sequence for packet in packets]
    assert sequences[0] == 1
    # The receiver's own queue may overflow while it doesn't read; order and growth must hold.
    assert all(a < b for a, b in itertools.pairwise(sequences))
    assert sequences[:50] == list(range(1, 51))
    assert {packet.boot_id for packet in packets} == {int(status.boot_id, 16)}
    times = [packet.guest_monotonic_ns for packet in packets]
    assert all(a < b for a, b in itertools.pairwise(times))

    assert status.name == "web1"
    assert status.corruptions == 0
    assert status.memory_pages == 32 * 256
    assert status.memory_sweeps >= 1
    assert status.memory_writes > 0
    assert status.udp_sent >= 500

    report = read_console(console)
    assert report.healthy, report
    assert report.last_status is not None
    assert "FERRY-POWEROFF" in console

    disk = check_disk(tmp_path / "disk.raw")
    assert disk.intact, disk.problems
    assert disk.torn_slot is None
    assert disk.slots == CIRCLE_SLOTS
    assert disk.boot_ids[-1] == int(status.boot_id, 16)
    assert disk.last_sequence >= status.disk_last_sequence > 30


def damage_page(memory: Path, page_number: int, byte: int) -> None:
    """Changes that byte of one of the guest's pages of known contents, behind its back."""
    with memory.open("r+b") as file, mmap.mmap(file.fileno(), 0) as ram:
        # Such a page begins with its number, and a generation: how often it was written.
        generation = rb"(?:[\1-\xff]\0|[\0-\xff][\1-\xff])\0{6}"
        number = re.escape(struct.pack("<Q", page_number))
        wanted = re.compile(number + generation + rb"(?!\0{8})", re.DOTALL)
        found = [match.start() for match in wanted.finditer(ram) if match.start() % 4096 == 0]
        assert len(found) == 1, found
        ram[found[0] + byte] ^= 0xFF


def test_a_guest_reports_damage(image: GuestImage, tmp_path: Path) -> None:
    cmdline = guest_cmdline(
        address="10.0.2.15/24",
        memory_mib=16,
        memory_noise_percent=33,
        disk=True,
        disk_mib=1,
        disk_records_per_s=20,  # 13 s until a record is overwritten.
    )
    with booted(image, tmp_path, cmdline) as guest:
        guest.wait_for("ready", lambda: "FERRY-READY" in guest.console(), BOOT_TIMEOUT_S)
        damage_page(guest.memory, 1234, 1000)  # Noise.
        damage_page(guest.memory, 1235, 2000)  # What can be compressed.
        assert guest.status("/verify").memory_corruptions == 2
        guest.wait_for("20 records", lambda: guest.status().disk_records_written > 20, 30.0)
        with guest.disk.open("r+b") as disk:
            disk.seek(3 * RECORD_BYTES + 2000)
            disk.write(b"damage")
            disk.flush()
            os.fsync(disk.fileno())
        guest.wait_for(
            "the disk's damage", lambda: guest.status().disk_corruptions == 1, WAIT_TIMEOUT_S
        )
        report = read_console(guest.console())
    assert {tuple(line.split()[:3]) for line in report.corruptions} == {
        ("FERRY-CORRUPTION", "memory", "page=1234"),
        ("FERRY-CORRUPTION", "memory", "page=1235"),
        ("FERRY-CORRUPTION", "disk", "record=4"),
    }
    assert not report.healthy


def test_a_guest_that_cannot_start_panics_and_ends(image: GuestImage, tmp_path: Path) -> None:
    cmdline = guest_cmdline(memory_mib=4096)
    with booted(image, tmp_path, cmdline) as guest:
        assert guest.process.wait(BOOT_TIMEOUT_S) == 0
        report = read_console(guest.console())
    assert report.boots == 0
    assert "ferry.mem_mib=4096" in report.errors[0]
    assert any("Kernel panic" in line for line in report.errors)
