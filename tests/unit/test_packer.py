"""The threads that pack ahead of a stream: what they are given comes back once, or not at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from migrator import ranges
from migrator.engine import packing
from migrator.engine.codecs import LADDER
from migrator.engine.memory import MappedRegion
from migrator.engine.packing import Job, Packed, Packer
from migrator.engine.packing_policy import PACK_BYTES_MIN, PackingPolicy, Plan
from migrator.engine.stream import Piece
from migrator.engine_messages import RegionLayout

PAGE = 4096
PAGES = 64
PATIENCE_S = 20.0
PLAN = Plan(LADDER[0], LADDER, 2, PACK_BYTES_MIN, hashing=False, cheap=True)


@pytest.fixture
def region() -> Iterator[MappedRegion]:
    fd = os.memfd_create("region")
    os.ftruncate(fd, PAGES * PAGE)
    layout = RegionLayout(name="ram", size_bytes=PAGES * PAGE, page_size_bytes=PAGE)
    made = MappedRegion(0, fd, layout)
    made.view[:] = b"a guest's memory" * (PAGES * PAGE // 16)
    yield made
    os.close(fd)


@pytest.fixture
def packer() -> Iterator[Packer]:
    made = Packer(PackingPolicy(lambda: 8.0))
    yield made
    made.close()
    assert not [each for each in threading.enumerate() if each.name == "pack"]


def _piece(number: int) -> Piece:
    return Piece(0, ranges.from_pairs([(number * PAGE, (number + 1) * PAGE)]))


class _Held:
    """Packing waits for `go`, and says when it has begun."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        run = Job.run

        def held(job: Job) -> Packed:
            self.begun.release()
            assert self.go.acquire(timeout=PATIENCE_S)
            return run(job)

        patch.setattr(Job, "run", held)


def test_each_piece_comes_back_once(region: MappedRegion, packer: Packer) -> None:
    pieces = [_piece(number) for number in range(5)]
    for piece in pieces:
        packer.put(piece, region, PLAN)
    found = []
    while not packer.empty:
        taken = packer.take(PATIENCE_S)
        assert taken is not None
        found.append(taken[0])
        assert len(taken[1].payload) < PAGE
    assert sorted(map(id, found)) == sorted(map(id, pieces))
    assert packer.take(0.0) is None
    assert [worker.waiting for worker in packer._workers] == [0, 0]


def test_what_is_given_up_never_comes(
    region: MappedRegion, packer: Packer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Done already, in the midst of it, or not begun: its thread goes on with what is next."""
    held = _Held(monkeypatch)
    pieces = [_piece(number) for number in range(5)]
    for piece in pieces:
        packer.put(piece, region, PLAN)
    held.go.release()
    for _ in range(3):  # One is done, two are held.
        assert held.begun.acquire(timeout=PATIENCE_S)
    assert packer.take_back(2) == pieces[3:]
    assert packer.take_back() == pieces[:3]
    assert packer.empty
    assert [worker.waiting for worker in packer._workers] == [0, 0]
    last = _piece(9)
    packer.put(last, region, PLAN)
    held.go.release(9)
    taken = packer.take(PATIENCE_S)
    assert taken is not None
    assert taken[0] is last
    assert packer.empty


def test_a_failure_is_raised_where_it_is_taken(
    region: MappedRegion, packer: Packer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> Packed:
        raise MemoryError("no memory is left")

    monkeypatch.setattr(packing, "pack", failing)
    packer.put(_piece(0), region, PLAN)
    with pytest.raises(MemoryError, match="no memory is left"):
        packer.take(PATIENCE_S)
    monkeypatch.undo()
    packer.put(_piece(1), region, PLAN)  # The thread lives on.
    assert packer.take(PATIENCE_S) is not None


def test_it_waits_as_long_as_asked_and_ends_in_the_midst_of_work(
    region: MappedRegion, packer: Packer, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = _Held(monkeypatch)
    packer.put(_piece(0), region, PLAN)
    assert packer.take(-1.0) is None
    assert packer.take(0.001) is None
    assert held.begun.acquire(timeout=PATIENCE_S)
    closing = threading.Thread(target=packer.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    held.go.release()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    packer.close()
    assert packer.empty
