"""A guest's memory, opened from outside its process (ARCHITECTURE: "The page engine").

Nothing is kept open between calls: QEMU holds the memfd and the userfaultfd at fixed numbers, and
pidfd_getfd(2) duplicates them whenever they are wanted, also by an agent that was just restarted.

All functions block for some microseconds (they read /proc); call them off the event loop.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from hypervisor.qemu import kernel
from hypervisor.qemu.process import QemuProcess
from migrator.errors import HypervisorError
from migrator.model import PAGE_SIZE_BYTES, DomainSpec
from migrator.ports import GuestMemory, MemoryRegion, RegionMapping

SYS_PIDFD_GETFD = 438
"""The same number on every architecture."""

_libc = ctypes.CDLL(None, use_errno=True)


def create_memfd(spec: DomainSpec) -> int:
    """A new, empty file for a domain's memory. The caller closes it. OSError."""
    fd = os.memfd_create(f"ferry-{spec.name}", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, spec.memory_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def duplicate_from(pidfd: int, number: int) -> int:
    """A duplicate of descriptor `number` of another process. OSError as pidfd_getfd(2)."""
    fd = int(_libc.syscall(SYS_PIDFD_GETFD, pidfd, number, 0))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def parse_maps(maps: str, inode: int) -> tuple[RegionMapping, ...]:
    """Where the memfd with `inode` is mapped, by the text of /proc/PID/maps; neighbours joined.

    The kernel splits a mapping when advice or a userfaultfd covers a part of it.
    """
    found: list[RegionMapping] = []
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or int(fields[4]) != inode or not fields[5].startswith("/memfd:"):
            continue
        start, _, end = fields[0].partition("-")
        address, length, offset = int(start, 16), int(end, 16) - int(start, 16), int(fields[2], 16)
        if found and _adjoins(found[-1], address, offset):
            last = found.pop()
            address, offset = last.address, last.region_offset_bytes
            length += last.length_bytes
        found.append(
            RegionMapping(address=address, length_bytes=length, region_offset_bytes=offset)
        )
    return tuple(found)


def _adjoins(last: RegionMapping, address: int, offset: int) -> bool:
    length = last.length_bytes
    return last.address + length == address and last.region_offset_bytes + length == offset


def open_arriving(process: QemuProcess, ram_fd: int) -> int:
    """The memory of a process that may not have come to map it. HypervisorError: it is gone."""
    try:
        return duplicate_from(process.pidfd, ram_fd)
    except OSError as error:
        raise HypervisorError(f"can't open the memory of process {process.pid}: {error}") from error


def region_of(ram: int, mappings: tuple[RegionMapping, ...] = ()) -> MemoryRegion:
    """Of a guest's memory, whose descriptor it takes over."""
    return MemoryRegion(
        name="ram0",
        fd=ram,
        size_bytes=os.fstat(ram).st_size,
        page_size_bytes=PAGE_SIZE_BYTES,
        mappings=mappings,
    )


def open_memory(pid: int, pidfd: int, *, ram_fd: int, uffd_fd: int) -> GuestMemory:
    """Open everything that the page engine needs. HypervisorError leaves nothing open."""
    opened: list[int] = []
    try:
        uffd = duplicate_from(pidfd, uffd_fd)
        opened.append(uffd)
        target = str(Path(f"/proc/self/fd/{uffd}").readlink())
        if target != "anon_inode:[userfaultfd]":
            raise HypervisorError(f"process {pid} has no userfaultfd parked: found {target}")
        ram = duplicate_from(pidfd, ram_fd)
        opened.append(ram)
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        opened.append(pagemap)
        status = os.fstat(ram)
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
        mappings = parse_maps(maps, status.st_ino)
        covered = sum(mapping.length_bytes for mapping in mappings)
        if covered != status.st_size:
            raise HypervisorError(
                f"process {pid} maps {covered} of its {status.st_size} bytes of guest memory"
            )
        region = region_of(ram, mappings)
        return GuestMemory(pid=pid, regions=(region,), uffd=uffd, pagemap_fd=pagemap)
    except BaseException as error:
        for fd in opened:
            os.close(fd)
        if isinstance(error, OSError):
            raise HypervisorError(f"can't open the memory of process {pid}: {error}") from error
        raise


def touched(pid: int, ram_fd: int) -> bool:
    """Whether the process has looked at any page of the guest's memory, or written to one.

    By its own page tables, which what others write to the file doesn't show up in. HypervisorError.
    """
    try:
        inode = Path(f"/proc/{pid}/fd/{ram_fd}").stat().st_ino
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HypervisorError(f"can't look at the memory of process {pid}: {error}") from error
    try:
        return any(
            kernel.has_present_page(pagemap, each.address, each.address + each.length_bytes)
            for each in parse_maps(maps, inode)
        )
    finally:
        os.close(pagemap)


def memory_in_use_bytes(pid: int, ram_fd: int) -> int | None:
    """How much of the guest's memory the host has populated; None if the process is gone."""
    try:
        return Path(f"/proc/{pid}/fd/{ram_fd}").stat().st_blocks * 512
    except OSError:
        return None
