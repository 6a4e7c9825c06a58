"""A guest's memory region as this process has it mapped."""

from __future__ import annotations

import mmap
import os

import numpy as np

from migrator.engine_messages import Configure, RegionLayout
from migrator.errors import EngineError
from migrator.model import PAGE_SIZE_BYTES


class MappedRegion:
    """A shared mapping of a region's file. It lives as long as the process: pages are in use by
    the kernel and by other threads until then.

    Reading a hole through the mapping populates it; `sendfile` and `pread` don't.
    """

    def __init__(self, index: int, fd: int, layout: RegionLayout) -> None:
        """EngineError if the descriptor isn't a file of the region's size."""
        self.index = index
        self.fd = fd
        self.layout = layout
        try:
            if os.fstat(fd).st_size < layout.size_bytes:
                raise EngineError(f"memory region {layout.name}: its file is too short")
            self._mapping = mmap.mmap(fd, layout.size_bytes)
        except (OSError, ValueError) as error:
            raise EngineError(f"memory region {layout.name} can't be mapped: {error}") from error
        self.view = memoryview(self._mapping)
        self.words = np.frombuffer(self._mapping, dtype=np.uint64)
        self.address = int(self.words.ctypes.data)

    @property
    def size_bytes(self) -> int:
        return self.layout.size_bytes

    @property
    def page_size_bytes(self) -> int:
        return self.layout.page_size_bytes

    @property
    def can_pwrite(self) -> bool:
        """hugetlbfs can't."""
        return self.page_size_bytes == PAGE_SIZE_BYTES

    @property
    def can_sendfile(self) -> bool:
        """hugetlbfs can't: it lacks splice_read."""
        return self.page_size_bytes == PAGE_SIZE_BYTES


def map_regions(configure: Configure, descriptors: list[int]) -> list[MappedRegion]:
    """The regions of a configuration. EngineError names the one that is wrong."""
    return [
        MappedRegion(index, fd, layout)
        for index, (fd, layout) in enumerate(zip(descriptors, configure.regions, strict=True))
    ]
