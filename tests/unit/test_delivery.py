"""A delivery against a guest that writes all the while, over a stream that breaks: no page is lost.

The destination is a buffer, frames hold a few pages, and what is packed is packed at once; all else
is as in an engine. A seed replays a failure.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrator import ranges
from migrator.engine import codecs, delivery, frames, packing, packing_policy, sorting
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.channel import ChannelHealth
from migrator.engine.codecs import LADDER, Codec
from migrator.engine.control import Pollable, Waiter
from migrator.engine.delivery import Delivery
from migrator.engine.frames import FrameKind, StreamHello, StreamKind
from migrator.engine.known import KnownPages
from migrator.engine.memory import MappedRegion
from migrator.engine.packing import Job, Outcome, Worker
from migrator.engine.packing_policy import Order, PackingPolicy, Plan
from migrator.engine.precedence import Precedence
from migrator.engine.stream import Endpoint, PageStream, Piece, Sent, StreamBrokenError
from migrator.engine_messages import RegionLayout
from migrator.ranges import Ranges

PAGE = 4096
PAGES = 48
USED = 40
"""The pages behind them are holes."""
TEXT = [(b"line %9d of a guest's memory\n" % number * PAGE)[:PAGE] for number in range(6)]
CONTENT = [bytes(PAGE), *TEXT, *(random.Random(number).randbytes(PAGE) for number in range(3))]


def _pages(numbers: Iterable[int]) -> Ranges:
    return ranges.from_page_starts(np.array(sorted(numbers), dtype=np.int64) * PAGE, PAGE)


def _numbers(content: Ranges) -> set[int]:
    return {start // PAGE for start in ranges.page_starts(content, PAGE).tolist()}


class _World:
    """A guest's memory, what was written of it since it was marked clean, and the destination."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        fd = os.memfd_create("guest")
        os.ftruncate(fd, PAGES * PAGE)
        layout = RegionLayout(name="ram", size_bytes=PAGES * PAGE, page_size_bytes=PAGE)
        self.region = MappedRegion(0, fd, layout)
        os.close(fd)
        for page in range(USED):
            self._put(page, chance.choice(CONTENT))
        self.arrived = bytearray(b"\xff" * PAGES * PAGE)
        self.dirty: set[int] = set()
        self.runs = True
        self.breaks = True
        self.ends = False

    def _put(self, page: int, content: bytes) -> None:
        self.region.view[page * PAGE : (page + 1) * PAGE] = content

    def goes_on(self) -> None:
        """The guest may write some pages, with what they had already or with something else."""
        if not self.runs:
            return
        first = self.chance.randrange(USED)
        for page in range(first, min(USED, first + self.chance.choice((0, 0, 0, 1, 2, 8, 16)))):
            self.dirty.add(page)
            if self.chance.random() < 0.7:
                self._put(page, self.chance.choice(CONTENT))

    def written(self, region: int, content: Ranges) -> Ranges:
        """As `WrittenPages`."""
        self.goes_on()
        return ranges.intersect(_pages(self.dirty), content)

    def breaks_now(self) -> bool:
        return self.breaks and self.chance.random() < 0.04

    def wrong(self) -> set[int]:
        """Pages that are other ones at the destination."""
        return {page for page in range(PAGES) if not self._arrived(page)}

    def _arrived(self, page: int) -> bool:
        part = slice(page * PAGE, (page + 1) * PAGE)
        return self.arrived[part] == self.region.view[part]


class _Stream(PageStream):
    """Its frames arrive when they are acknowledged; when it breaks, some do, and one in part."""

    def __init__(self, world: _World) -> None:
        hello = StreamHello(version=1, migration_id="m", secret=b"", kind=StreamKind.PAGES)
        super().__init__(Endpoint(host="", port=0), hello, TokenBucket(None, 0.0))
        self._world = world
        self._on_way: deque[tuple[Ranges, bytes]] = deque()
        self.codecs = LADDER
        self.link.judged = True

    def connect(self, waiter: Waiter) -> None:
        self._sequence = 0

    def gauge(self) -> float | None:
        return 1e6

    @property
    def in_hand_s(self) -> float:
        return self._world.chance.choice((0.0, 1.0))

    def send(self, piece: Piece, region: MappedRegion, waiter: Waiter) -> None:
        content = bytes(ranges.byte_count(piece.content))
        if piece.kind is FrameKind.PAGES:
            content = b"".join(region.view[start:end] for start, end in piece.content.tolist())
        self._carry(piece, content)

    def send_copy(
        self, piece: Piece, payload: memoryview, codec: Codec | None, waiter: Waiter
    ) -> None:
        if codec is not None:
            size = ranges.byte_count(piece.content)
            payload = codecs.decompress(codec.kind, payload, size)
        self._carry(piece, bytes(payload))

    def _carry(self, piece: Piece, content: bytes) -> None:
        assert len(content) == ranges.byte_count(piece.content) > 0
        assert len(piece.content) <= frames.FRAME_RANGES_MAX
        self._world.goes_on()
        self._sequence += 1
        self._unacknowledged.append(Sent(self._sequence, piece))
        self._on_way.append((piece.content, content))
        if self._world.breaks_now():
            self._break()

    def _break(self) -> None:
        count = self._world.chance.randint(0, len(self._on_way))
        for content, data in itertools.islice(self._on_way, count):
            self._land(content, data)
        for content, data in itertools.islice(self._on_way, count, count + 1):
            self._land(content, b"\xee" * len(data))
        self._on_way.clear()
        raise StreamBrokenError("cut")

    def _land(self, content: Ranges, data: bytes) -> None:
        at = 0
        for start, end in content.tolist():
            self._world.arrived[start:end] = data[at : at + end - start]
            at += end - start

    def collect_acks(self) -> bool:
        return self._acknowledge(self._world.chance.randint(0, len(self._on_way)))

    def await_acknowledged(self, waiter: Waiter) -> None:
        if self._world.breaks_now():
            self._break()
        self._acknowledge(len(self._on_way))

    def _acknowledge(self, count: int) -> bool:
        for _ in range(count):
            self._land(*self._on_way.popleft())
            self._unacknowledged.popleft()
        return count > 0


class _Policy(PackingPolicy):
    """Packs as chance will have it."""

    def __init__(self, chance: random.Random, often: float = 0.8) -> None:
        super().__init__(lambda: 8.0)
        self._chance = chance
        self._often = often

    @property
    def affordable(self) -> bool:
        return self._chance.random() <= self._often

    def plan(self, link_bytes_per_s: float | None, usable: Sequence[Codec]) -> Plan | None:
        if self._chance.random() > self._often:
            return None
        return Plan(LADDER[0], LADDER, 2, 2 * PAGE, hashing=True, cheap=True)

    def could_pay(self, link_bytes_per_s: float | None, usable: Sequence[Codec]) -> bool:
        return self._chance.random() < self._often

    def order(self, plan: Plan, guest_bytes: int, *, hashing: bool = False) -> Order:
        return Order(self._chance.choice((None, *LADDER)), compared=plan.usable)


class _Waiter:
    """Never waits, and may end the pass."""

    def __init__(self, world: _World, delivered: Delivery) -> None:
        self._world = world
        self._delivered = delivered

    def wait(self, source: Pollable | None, events: int, timeout_s: float) -> bool:
        return True

    def tick(self) -> None:
        if self._world.ends and self._world.chance.random() < 0.02:
            self._delivered.end()


@contextlib.contextmanager
def _small(chance: random.Random) -> Iterator[None]:
    """Batches of 8 pages, packed frames of 2, and no threads."""

    class Done(queue.SimpleQueue[Outcome]):
        """What is done by now is seen sooner or later."""

        def get(self, block: bool = True, timeout: float | None = None) -> Outcome:
            if chance.random() < 0.2:
                raise queue.Empty
            return super().get(False)

    class AtOnce(Worker):
        def __init__(self, done: queue.SimpleQueue[Outcome]) -> None:
            self.waiting = 0
            self._done = done

        def put(self, job: Job) -> None:
            self.waiting += 1
            self._done.put((job, job.run()))

        def end(self) -> None:
            return

        def join(self) -> None:
            return

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "Worker", AtOnce)
        patch.setattr(packing, "queue", SimpleNamespace(SimpleQueue=Done, Empty=queue.Empty))
        patch.setattr(packing_policy, "PLAN_KEPT_S", 0.0)
        patch.setattr(delivery, "_PACKING_BYTES_MIN", 0)
        patch.setattr(delivery, "_BATCH_BYTES", 8 * PAGE)
        patch.setattr(delivery, "PACK_BYTES_MAX", 2 * PAGE)
        patch.setattr(frames, "FRAME_BYTES_MAX", 4 * PAGE)
        patch.setattr(frames, "FRAME_RANGES_MAX", 3)
        patch.setattr(sorting, "SOFT_BYTES", 4 * PAGE)
        patch.setattr(sorting, "HARD_BYTES", 2 * PAGE)
        patch.setattr(sorting, "AHEAD_BYTES", 8 * PAGE)
        yield


def _deliver(
    world: _World,
    stream: _Stream,
    pieces: list[Piece],
    policy: PackingPolicy,
    known: KnownPages | None = None,
    written: Callable[[int, Ranges], Ranges] | None = None,
) -> Delivery:
    bucket = TokenBucket(None, 0.0)
    made = Delivery(
        stream,
        pieces,
        [world.region],
        bucket,
        policy,
        skip_zeroes=world.runs,
        known=known,
        written=written,
    )
    made.run(ChannelHealth(lambda message: None), 30.0, _Waiter(world, made))
    assert made.empty
    assert made.left_bytes == 0
    return made


@given(st.integers(0, 2**32), st.booleans(), st.booleans())
@settings(max_examples=120, deadline=None)
def test_whatever_the_guest_writes_and_wherever_the_stream_breaks_each_page_arrives(
    seed: int, breaks: bool, ends: bool
) -> None:
    """Or the next pass has it to send."""
    chance = random.Random(seed)
    world = _World(chance)
    world.breaks, world.ends = breaks, ends
    stream, known, policy = _Stream(world), KnownPages([world.region]), _Policy(chance)
    holes = Piece(0, _pages(range(USED, PAGES)), FrameKind.ZERO, hole=True)
    pieces, written = [holes, Piece(0, _pages(range(USED)))], world.written
    with _small(chance):
        for number in range(5):
            world.runs = number < 4
            made = _deliver(world, stream, pieces, policy, known, written if number == 0 else None)
            pending, world.dirty = world.dirty, set()
            assert {page for _, each in made.deferred for page in _numbers(each)} <= pending
            pending |= {page for _, each in made.cut for page in _numbers(each)}
            assert world.wrong() <= pending, f"lost in pass {number}"
            pieces = [Piece(0, _pages(pending))]
            world.ends = ends and number < 3
    assert world.wrong() == set()


def test_what_is_written_in_between_leaves_no_frame_of_too_many_parts() -> None:
    """A guest could end its own migration by that, and so a drain."""
    chance = random.Random(1)
    world = _World(chance)
    world.runs = world.breaks = False
    for page in range(USED):
        world.region.view[page * PAGE : (page + 1) * PAGE] = TEXT[page % len(TEXT)]
    every_other = _pages(range(1, USED, 2))
    looks = itertools.count()

    def written(region: int, content: Ranges) -> Ranges:
        """Nothing when a batch is prepared, and every other page when it goes."""
        return ranges.empty() if next(looks) < 1 else ranges.intersect(every_other, content)

    with _small(chance), pytest.MonkeyPatch.context() as patch:
        patch.setattr(delivery, "_BATCH_BYTES", USED * PAGE)
        patch.setattr(frames, "FRAME_BYTES_MAX", 16 * PAGE)
        patch.setattr(delivery, "_WARY_BYTES", 16 * PAGE)
        made = _deliver(
            world,
            _Stream(world),
            [Piece(0, _pages(range(USED)))],
            _Policy(chance, often=0.0),
            written=written,
        )
    assert world.wrong() & set(range(0, USED, 2)) == set()
    assert made.pages == USED // 2


def test_a_pass_goes_on_where_all_that_was_prepared_has_been_written_meanwhile() -> None:
    """By a guest that is where the pass is, at the very moment."""
    chance = random.Random(1)
    world = _World(chance)
    world.runs = world.breaks = False
    for page in range(USED):
        world.region.view[page * PAGE : (page + 1) * PAGE] = TEXT[page % len(TEXT)]
    batch = _pages(range(8))
    looks: list[Ranges] = []

    def written(region: int, content: Ranges) -> Ranges:
        """Nothing yet, when the first batch is prepared; and all of it when it would be packed."""
        looks.append(content)
        return ranges.empty() if len(looks) == 1 else ranges.intersect(batch, content)

    with _small(chance):
        made = _deliver(
            world,
            _Stream(world),
            [Piece(0, _pages(range(USED)))],
            _Policy(chance, often=1.0),
            written=written,
        )
    assert _numbers(looks[0]) == set(range(8))
    assert {page for _, each in made.deferred for page in _numbers(each)} == set(range(8))
    assert world.wrong() & set(range(USED)) == set(range(8))


@pytest.mark.parametrize(("packs", "expected"), [(1.0, [True, False]), (0.0, [])])
def test_the_sending_thread_goes_first_on_slow_links_and_in_no_case_after_the_pass(
    packs: float, expected: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def give(wanted: bool) -> bool:
        asked.append(wanted)
        return True

    monkeypatch.setattr(delivery, "Precedence", lambda: Precedence(give, lambda: 0.0))
    world = _World(random.Random(1))
    policy = _Policy(world.chance, packs)
    with _small(world.chance):
        _deliver(world, _Stream(world), [Piece(0, _pages(range(USED)))], policy)
    assert asked == expected
