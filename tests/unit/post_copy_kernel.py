"""A guest's memory while pages of it are missing, as the kernel has it; without one that faults.

The memory files are real ones, holes included. What is modelled is the userfaultfd: who touches a
hole of a mapping that is registered waits, is told of once, and looks again when it is woken.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest

from migrator.engine import kernel
from migrator.engine.memory import MappedRegion
from migrator.engine_messages import RegionLayout
from migrator.ports import RegionMapping
from tests.unit.lockstep import Lockstep

PAGE = 4096
UFFD = 900
"""Its number; a descriptor isn't behind it."""


@dataclass(eq=False)
class _Fault:
    address: int
    woken: bool = False


@dataclass(eq=False)
class Destination:
    """The hypervisor's address space at the destination."""

    lockstep: Lockstep
    regions: list[MappedRegion]
    _watched: set[int] = field(default_factory=set)
    """Where registered mappings begin."""
    _faults: list[_Fault] = field(default_factory=list)
    _untold: list[_Fault] = field(default_factory=list)

    # --- the guest ---

    def touch(self, region: int, page: int) -> None:
        """A vCPU's access: returns when there is a page."""
        places = [
            mapping.address + page * PAGE - mapping.region_offset_bytes
            for mapping in self.regions[region].layout.mappings
            if 0 <= page * PAGE - mapping.region_offset_bytes < mapping.length_bytes
        ]
        address = self.lockstep.chance.choice(places)
        while not self.is_there(region, page):
            if self._mapping(address).address not in self._watched:
                self._put(region, page, bytes(PAGE))
                return
            fault = _Fault(address)
            self._faults.append(fault)
            self._untold.append(fault)
            self.lockstep.wait(partial(getattr, fault, "woken"))

    def is_there(self, region: int, page: int) -> bool:
        return kernel.has_data(self.regions[region].fd, page * PAGE, (page + 1) * PAGE)

    def read(self, region: int, page: int) -> bytes:
        """A hole reads as zeros, and stays one."""
        return os.pread(self.regions[region].fd, PAGE, page * PAGE)

    def write(self, region: int, page: int, content: bytes) -> None:
        """By the guest, to a page that it has touched."""
        assert self.is_there(region, page)
        self._put(region, page, content)

    def _put(self, region: int, page: int, content: bytes) -> None:
        assert os.pwrite(self.regions[region].fd, content, page * PAGE) == PAGE

    # --- the kernel's interface ---

    def has_faults(self) -> bool:
        return bool(self._untold)

    def replace(self, patch: pytest.MonkeyPatch) -> None:
        """What `kernel` has for a userfaultfd is this."""
        patch.setattr(kernel, "uffd_initialise", lambda uffd: self.lockstep.pause())
        patch.setattr(kernel, "uffd_register_missing", self._register)
        patch.setattr(kernel, "uffd_unregister", self._unregister)
        patch.setattr(kernel, "uffd_wake", self._wake)
        patch.setattr(kernel, "uffd_copy", self._copy)
        patch.setattr(kernel, "uffd_zero", self._zero)
        patch.setattr(kernel, "uffd_faults", self._read_faults)
        punch_hole, extents = kernel.punch_hole, kernel.populated_extents

        def punch(fd: int, start: int, end: int) -> None:
            self.lockstep.pause()
            punch_hole(fd, start, end)

        def populated(fd: int, size_bytes: int) -> object:
            self.lockstep.pause()
            return extents(fd, size_bytes)

        patch.setattr(kernel, "punch_hole", punch)
        patch.setattr(kernel, "populated_extents", populated)

    def _register(self, uffd: int, address: int, length_bytes: int) -> None:
        self.lockstep.pause()
        self._watched.add(self._mapping(address).address)

    def _unregister(self, uffd: int, address: int, length_bytes: int) -> None:
        self.lockstep.pause()
        self._watched.discard(self._mapping(address).address)
        self._wake_now(address, length_bytes)

    def _wake(self, uffd: int, address: int, length_bytes: int) -> None:
        self.lockstep.pause()
        self._wake_now(address, length_bytes)

    def _wake_now(self, address: int, length_bytes: int) -> None:
        for fault in list(self._faults):
            if address <= fault.address < address + length_bytes:
                fault.woken = True
                self._faults.remove(fault)
                if fault in self._untold:
                    self._untold.remove(fault)

    def _read_faults(self, uffd: int) -> list[int]:
        self.lockstep.pause()
        told = self._untold[: self.lockstep.chance.randint(1, 4)]
        del self._untold[: len(told)]
        return [fault.address for fault in told]

    def _copy(self, uffd: int, address: int, source: int, length_bytes: int) -> int:
        return self._fill(address, length_bytes, source)

    def _zero(self, uffd: int, address: int, length_bytes: int) -> int:
        return self._fill(address, length_bytes, None)

    def _fill(self, address: int, length_bytes: int, source: int | None) -> int:
        done = 0
        while done < length_bytes:
            self.lockstep.pause()
            mapping = self._mapping(address + done)
            whole = address + length_bytes <= mapping.address + mapping.length_bytes
            if mapping.address not in self._watched or not whole:
                raise OSError(errno.ENOENT, "not registered")
            region = self._region(mapping)
            page = (address + done - mapping.address + mapping.region_offset_bytes) // PAGE
            if self.is_there(region, page):
                break
            content = bytes(PAGE) if source is None else ctypes.string_at(source + done, PAGE)
            self._put(region, page, content)
            done += PAGE
            if self.lockstep.chance.random() < 0.05:
                break  # The mappings are being changed.
        if done:
            self._wake_now(address, done)
        return done

    def _mapping(self, address: int) -> RegionMapping:
        for region in self.regions:
            for mapping in region.layout.mappings:
                if mapping.address <= address < mapping.address + mapping.length_bytes:
                    return mapping
        raise OSError(errno.ENOENT, "not mapped")

    def _region(self, mapping: RegionMapping) -> int:
        (found,) = [r.index for r in self.regions if mapping in r.layout.mappings]
        return found


def regions_of(layouts: list[RegionLayout], stack: contextlib.ExitStack) -> list[MappedRegion]:
    """With memory files of their own, all holes."""
    made = []
    for index, layout in enumerate(layouts):
        fd = os.memfd_create(layout.name)
        stack.callback(os.close, fd)
        os.ftruncate(fd, layout.size_bytes)
        made.append(MappedRegion(index, fd, layout))
    return made


def layouts() -> list[RegionLayout]:
    """Two regions: one mapped in two pieces, a part of it twice; one as it is."""
    pieces = [(0x10000, 0, 14), (0x40000, 14, 10), (0x80000, 10, 8)]
    return [
        RegionLayout(
            name="ram",
            size_bytes=24 * PAGE,
            page_size_bytes=PAGE,
            mappings=tuple(
                RegionMapping(
                    address=address, length_bytes=pages * PAGE, region_offset_bytes=first * PAGE
                )
                for address, first, pages in pieces
            ),
        ),
        RegionLayout(
            name="hotplugged",
            size_bytes=12 * PAGE,
            page_size_bytes=PAGE,
            mappings=(
                RegionMapping(address=0xC0000, length_bytes=12 * PAGE, region_offset_bytes=0),
            ),
        ),
    ]


def pages_of(layout: RegionLayout) -> Iterator[int]:
    yield from range(layout.size_bytes // PAGE)
