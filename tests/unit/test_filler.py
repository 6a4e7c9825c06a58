"""What a destination fills in while the guest runs, without a guest."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from migrator import ranges
from migrator.engine import filler as filler_module
from migrator.engine.filler import Filler
from migrator.engine.memory import MappedRegion
from migrator.engine_messages import RegionLayout

PAGE = 4096
SIZE = 16 * PAGE


class _Placer:
    """In the place of one that fills another process's memory."""

    def __init__(self, uffd: int, regions: list[MappedRegion]) -> None:
        self.armed_times = 0

    def arm(self) -> None:
        self.armed_times += 1

    def wake_all(self) -> None:
        return


@pytest.fixture
def region() -> Iterator[MappedRegion]:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, SIZE)
    layout = RegionLayout(name="ram", size_bytes=SIZE, page_size_bytes=PAGE)
    yield MappedRegion(0, fd, layout)
    os.close(fd)


def test_what_is_told_again_when_it_was_armed_changes_nothing(
    region: MappedRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream broke before the source heard that it was, so it tells all of it again.

    Pages that have come by then must stay, and a stream is read by one thread.
    """
    monkeypatch.setattr(filler_module, "Placer", _Placer)
    told = ranges.from_pairs([(0, 8 * PAGE)])
    faults: list[BaseException] = []
    uffd = os.eventfd(0, os.EFD_NONBLOCK)
    filler = Filler(uffd, [region], silence_s=5.0, on_done=lambda: None, fault=faults.append)
    with contextlib.closing(filler):
        filler.note(0, told)
        filler.arm()
        threads = list(filler._threads)
        os.pwrite(region.fd, b"x" * PAGE, 0)  # One has come.
        filler._missing.filled(0, 0, PAGE)
        filler.note(0, told)
        filler.arm()
        assert os.pread(region.fd, PAGE, 0) == b"x" * PAGE
        assert filler._missing.left_pages == 7
        assert filler._threads == threads
        assert len(threads) == 2
    os.close(uffd)
    assert not faults
