"""What a destination fills in while the guest runs, without a guest."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

import pytest

from migrator import ranges
from migrator.engine import filler as filler_module
from migrator.engine import kernel, missing
from migrator.engine.filler import Filler
from migrator.engine.memory import MappedRegion
from migrator.engine_messages import RegionLayout
from migrator.errors import EngineError

PAGE = 4096
SIZE = 16 * PAGE


class _Placer:
    """In the place of one that fills another process's memory."""

    def __init__(self, uffd: int, regions: list[MappedRegion]) -> None:
        self._regions = regions
        self.watched_with_data: list[bool] = []

    def watch(self) -> None:
        self.watched_with_data += [kernel.has_data(r.fd, 0, SIZE) for r in self._regions]

    def arm(self) -> None:
        return

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


def test_holes_are_watched_before_they_are_made(
    region: MappedRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel makes huge pages it fills those that nobody watches with zeros."""
    monkeypatch.setattr(filler_module, "Placer", _Placer)
    os.pwrite(region.fd, b"x" * SIZE, 0)
    filler = Filler(-1, [region], silence_s=5.0, on_done=lambda: None, fault=lambda error: None)
    filler.note(0, ranges.from_pairs([(0, SIZE)]))
    assert not kernel.has_data(region.fd, 0, SIZE)
    placer = filler._placer
    assert isinstance(placer, _Placer)
    assert placer.watched_with_data == [True]
    filler.close()


@pytest.mark.parametrize("held_times", [2, 1_000_000])
def test_what_cant_be_made_a_hole_isnt_missing(
    region: MappedRegion, monkeypatch: pytest.MonkeyPatch, held_times: int
) -> None:
    """A part of a huge page that somebody holds becomes zeros, and stays: a fault never comes."""
    punch_hole, left = kernel.punch_hole, [held_times]

    def punch(fd: int, start: int, end: int) -> None:
        if left[0]:
            left[0] -= 1
            os.pwrite(fd, bytes(end - start), start)
        else:
            punch_hole(fd, start, end)

    monkeypatch.setattr(kernel, "punch_hole", punch)
    os.pwrite(region.fd, b"x" * SIZE, 0)
    if held_times > 2:
        monkeypatch.setattr(missing, "_HELD_S", 0.02)
        with pytest.raises(EngineError, match="region ram can't be emptied at 0x1000: a huge page"):
            missing.make_hole(region, PAGE, 3 * PAGE)
        return
    missing.make_hole(region, PAGE, 3 * PAGE)
    assert kernel.populated_extents(region.fd, SIZE).tolist() == [[0, PAGE], [3 * PAGE, SIZE]]


def test_why_a_page_cant_be_filled_is_told_in_words(region: MappedRegion) -> None:
    """Users read it, from the source: its engines end again and again."""
    faults: list[BaseException] = []

    def fill() -> None:
        raise OSError(errno.ENOMEM, "ioctl")

    filler = Filler(-1, [region], silence_s=5.0, on_done=lambda: None, fault=faults.append)
    filler._guarded(fill)
    filler.close()
    (fault,) = faults
    assert isinstance(fault, EngineError)
    assert str(fault) == "a missing page can't be filled: Cannot allocate memory"
