"""What post-copy makes missing within huge pages of a destination's memory, by the kernel."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest

from migrator import ranges
from migrator.engine import missing
from migrator.engine.filler import Filler
from migrator.engine.memory import MappedRegion
from migrator.engine_messages import RegionLayout
from migrator.errors import EngineError
from migrator.ports import RegionMapping

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs, and watches memory")

PAGE = 4096
HUGE = 2 * 1024**2
MADV_COLLAPSE = 25  # asm-generic/mman-common.h
SYS_USERFAULTFD, SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 323, 430, 431, 432  # x86-64
SET_STRING, CREATE = 1, 6  # linux/mount.h
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.vmsplice.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]


@pytest.fixture
def region() -> Iterator[MappedRegion]:
    """One huge page with content, mapped by a hypervisor, which is this process."""
    filesystem = _libc.syscall(SYS_FSOPEN, b"tmpfs", 1)
    if filesystem < 0 or _libc.syscall(SYS_FSCONFIG, filesystem, SET_STRING, b"huge", b"always", 0):
        pytest.skip("no tmpfs with huge pages can be mounted here")
    assert _libc.syscall(SYS_FSCONFIG, filesystem, CREATE, None, None, 0) == 0
    folder = _libc.syscall(SYS_FSMOUNT, filesystem, 1, 0)
    fd = os.open("guest", os.O_RDWR | os.O_CREAT, dir_fd=folder)
    os.ftruncate(fd, HUGE)
    os.pwrite(fd, b"x" * HUGE, 0)
    mapped = mmap.mmap(fd, HUGE)
    address = int(np.frombuffer(mapped, dtype=np.uint8).ctypes.data)
    assert address % HUGE == 0
    _libc.madvise(address, HUGE, MADV_COLLAPSE)  # Where memory is fragmented it was small pages.
    mapping = RegionMapping(address=address, length_bytes=HUGE, region_offset_bytes=0)
    layout = RegionLayout(name="ram", size_bytes=HUGE, page_size_bytes=PAGE, mappings=(mapping,))
    yield MappedRegion(0, fd, layout)
    for descriptor in (fd, folder, filesystem):
        os.close(descriptor)


def test_a_part_of_a_huge_page_that_is_held_isnt_taken_for_a_hole(
    region: MappedRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It becomes zeros, which nobody would wait for, and no page could be put in place of."""
    monkeypatch.setattr(missing, "_HELD_S", 0.02)
    held, pipe = os.pipe()
    part = (ctypes.c_size_t * 2)(region.layout.mappings[0].address + 100 * PAGE, PAGE)
    assert _libc.vmsplice(pipe, ctypes.addressof(part), 1, 0) == PAGE
    with pytest.raises(EngineError, match="held by somebody"):
        missing.make_hole(region, 5 * PAGE, 7 * PAGE)
    os.close(held)
    os.close(pipe)
    missing.make_hole(region, 5 * PAGE, 7 * PAGE)
    assert missing.holes_of(region).tolist() == [[5 * PAGE, 7 * PAGE]]


def test_the_kernel_leaves_the_holes_of_missing_pages_alone(region: MappedRegion) -> None:
    """It makes huge pages of small ones, and zeros of the holes between, also before ARM comes."""
    uffd = _libc.syscall(SYS_USERFAULTFD, os.O_NONBLOCK | os.O_CLOEXEC)
    filler = Filler(uffd, [region], silence_s=5.0, on_done=lambda: None, fault=lambda error: None)
    filler.note(0, ranges.from_pairs([(5 * PAGE, 7 * PAGE)]))
    address = region.layout.mappings[0].address
    assert _libc.madvise(address, HUGE, MADV_COLLAPSE) == -1
    assert missing.holes_of(region).tolist() == [[5 * PAGE, 7 * PAGE]]
    filler.close()
    os.close(uffd)
