"""Fewer bytes on the wire: pages are copied, zero pages told apart, the rest compressed.

    ready ─► snapshot ─► zero pages apart ─► what is known apart ─► codec ─► frame  (in threads)
                                                                     └─────► as it is, where
                                                                             nothing is gained

Only where the link is what a stream waits for: `packing_policy` holds its measured rate against
what each codec was measured to do, and the cores that are idle. On a faster link pages go by
sendfile, as if this didn't exist. On a slow one they still do whenever no packed frame is ready
before the link runs dry: a host that is too busy to pack is no slower than one that doesn't.

Pages are compressed from a copy, never from the guest's memory: a codec encodes a repetition as a
reference to bytes that it has already written out. If the guest changed those in between, the
*other* page, which refers to them and which nobody wrote to, would arrive wrong.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from migrator import ranges
from migrator.engine import codecs
from migrator.engine.codecs import Codec
from migrator.engine.known import Digests, KnownPages
from migrator.engine.memory import MappedRegion
from migrator.engine.packing_policy import (
    COMPARED_BYTES,
    RAW_SHARE,
    Order,
    PackingPolicy,
    Plan,
    Trial,
)
from migrator.engine.stream import Piece
from migrator.model import PAGE_SIZE_BYTES
from migrator.ranges import Ranges

_AHEAD: Final = 6
"""Frames packed while one is sent: what evens out a busy host's scheduling."""
_WORDS: Final = PAGE_SIZE_BYTES // 8


class Packed(msgspec.Struct, frozen=True):
    """What a piece became."""

    content: Ranges
    """The pages of `payload`, in order."""
    zeroes: Ranges
    payload: memoryview
    codec: Codec | None
    """None: the pages as they are."""
    copy_seconds: float
    """Of a core, for all but hashing and compressing."""
    trial: Trial | None = None
    """What the codec that was asked for made of it."""
    compared: tuple[Trial, ...] = ()
    """What each made of a part, where that was asked for."""
    hash_seconds: float | None = None
    """Of a core; None: it wasn't hashed."""
    same: Ranges = ranges.empty()
    """Pages that the destination has already."""
    digests: Digests | None = None
    """Of `content`; None: nobody looked."""


def pack(
    region: MappedRegion, content: Ranges, order: Order, known: KnownPages | None = None
) -> Packed:
    """Copy pages of 4 KiB and make them small. Runs in any thread, mostly without Python's lock.

    `known`: leave out what the destination has.
    """
    began = time.thread_time()
    words = np.empty(ranges.byte_count(content) // 8, dtype=np.uint64)
    at = 0
    for start, end in (content // 8).tolist():
        words[at : at + end - start] = region.words[start:end]
        at += end - start
    words, content, zeroes = _without_zeroes(words, content)
    copied = time.thread_time()
    same, digests, hash_seconds = ranges.empty(), None, None
    if known is not None and len(words):
        digests = known.hash(words.data.cast("B"))
        alike = known.same(region.index, content, digests)
        words, content, same = _without(words, content, alike)
        digests = digests[~alike]
        hash_seconds = time.thread_time() - copied
    payload = words.data.cast("B") if len(words) else memoryview(b"")
    compared = _compared(payload, order.compared) if len(payload) else ()
    codec, trial = None, None
    if order.codec is not None and len(payload):
        smaller, trial = _trial(order.codec, payload)
        if len(smaller) < RAW_SHARE * len(payload):
            payload, codec = smaller, order.codec
    return Packed(
        content,
        zeroes,
        payload,
        codec,
        copied - began,
        trial,
        compared,
        hash_seconds,
        same,
        digests,
    )


def _trial(codec: Codec, content: memoryview) -> tuple[memoryview, Trial]:
    began = time.thread_time()
    smaller = codecs.compress(codec, content)
    seconds = time.thread_time() - began
    return memoryview(smaller), Trial(codec, len(content), len(smaller), seconds)


def _compared(content: memoryview, tried: Sequence[Codec]) -> tuple[Trial, ...]:
    """What each makes of the middle of it."""
    at = max(0, len(content) - COMPARED_BYTES) // 2
    part = content[at : at + COMPARED_BYTES]
    return tuple(_trial(codec, part)[1] for codec in tried)


def _without_zeroes(
    words: npt.NDArray[np.uint64], content: Ranges
) -> tuple[npt.NDArray[np.uint64], Ranges, Ranges]:
    """(words, content) without zero pages, and these."""
    pages = words.reshape(-1, _WORDS)
    zero = pages[:, 0] == 0
    suspects = np.flatnonzero(zero)
    zero[suspects] = ~pages[suspects].any(axis=1)
    return _without(words, content, zero)


def _without(
    words: npt.NDArray[np.uint64], content: Ranges, left_out: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.uint64], Ranges, Ranges]:
    """(words, content) without the pages that are marked, and these."""
    if not left_out.any():
        return words, content, ranges.empty()
    starts = ranges.page_starts(content, PAGE_SIZE_BYTES)
    taken = ranges.from_page_starts(starts[left_out], PAGE_SIZE_BYTES)
    filled = words.reshape(-1, _WORDS)[~left_out]
    return filled.reshape(-1), ranges.subtract(content, taken), taken


class Job:
    """A piece that a thread packs, until it is taken or given up."""

    __slots__ = ("given_up", "known", "order", "piece", "region", "worker")

    def __init__(
        self,
        piece: Piece,
        region: MappedRegion,
        order: Order,
        known: KnownPages | None,
        worker: Worker,
    ) -> None:
        self.piece, self.region, self.order, self.known = piece, region, order, known
        self.worker = worker
        self.given_up = False

    def run(self) -> Packed:
        return pack(self.region, self.piece.content, self.order, self.known)


Outcome = tuple[Job, Packed | BaseException]


class Worker:
    """A thread that packs what it is given, in turn.

    Nothing of concurrent.futures: that takes the sending thread 0.15 ms a frame, and this 0.08.
    """

    def __init__(self, done: queue.SimpleQueue[Outcome]) -> None:
        self._done = done
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.waiting = 0
        """Jobs that the other thread, which owns this, hasn't heard the end of."""
        self._thread = threading.Thread(target=self._work, name="pack", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        self.waiting += 1
        self._jobs.put(job)

    def end(self) -> None:
        """After what it was given. Idempotent; `join` waits for it."""
        self._jobs.put(None)

    def join(self) -> None:
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.given_up:
                continue
            try:
                self._done.put((job, job.run()))
            except BaseException as error:  # Whoever takes it raises it.
                self._done.put((job, error))


class Packer:
    """Threads that pack ahead of one delivery; they are started by the first piece.

    Pages may leave in any order within a pass, so what is ready first goes first.
    """

    def __init__(self, policy: PackingPolicy, known: KnownPages | None = None) -> None:
        self._policy = policy
        self._known = known
        self._workers: list[Worker] = []
        """A plan says how many of them get work."""
        self._jobs: list[Job] = []
        """Oldest first."""
        self._done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

    @property
    def room(self) -> bool:
        """For another piece: in the queue, and in the time of the cores that are idle."""
        return len(self._jobs) < _AHEAD and self._policy.affordable

    @property
    def empty(self) -> bool:
        return not self._jobs

    def put(self, piece: Piece, region: MappedRegion, plan: Plan) -> None:
        """Begin with a piece of at most what the plan says."""
        while len(self._workers) < plan.threads:
            self._workers.append(Worker(self._done))
        known = self._known if plan.hashing else None
        if known is not None and not known.should_hash():
            known = None
        size = ranges.byte_count(piece.content)
        order = self._policy.order(plan, size, hashing=known is not None)
        worker = min(self._workers[: plan.threads], key=lambda each: each.waiting)
        job = Job(piece, region, order, known, worker)
        worker.put(job)
        self._jobs.append(job)

    def take(self, wait_s: float) -> tuple[Piece, Packed] | None:
        """The first piece that is ready within `wait_s`; None if none is."""
        while True:
            try:
                job, packed = self._done.get(wait_s > 0.0, max(0.0, wait_s))
            except queue.Empty:
                return None
            if job.given_up:
                continue
            job.worker.waiting -= 1
            self._jobs.remove(job)
            if isinstance(packed, BaseException):
                raise packed
            self._policy.note(
                ranges.byte_count(job.piece.content),
                packed.trial,
                packed.compared,
                copy_seconds=packed.copy_seconds,
                hash_seconds=packed.hash_seconds,
            )
            return job.piece, packed

    def take_back(self, count_max: int = _AHEAD) -> list[Piece]:
        """The newest pieces that weren't taken, oldest first; what is made of them is dropped."""
        kept = max(0, len(self._jobs) - count_max)
        dropped = self._jobs[kept:]
        for job in dropped:
            job.given_up = True
            job.worker.waiting -= 1
        del self._jobs[kept:]
        return [job.piece for job in dropped]

    def close(self) -> None:
        """End the threads, which are at most in the midst of one piece each. Idempotent."""
        self.take_back()
        for worker in self._workers:
            worker.end()
        for worker in self._workers:
            worker.join()
        self._workers.clear()
