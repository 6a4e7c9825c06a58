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

import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from migrator import ranges
from migrator.engine import codecs
from migrator.engine.codecs import Codec
from migrator.engine.known import Digests, KnownPages
from migrator.engine.memory import MappedRegion
from migrator.engine.packing_policy import RAW_SHARE, Order, PackingPolicy, Plan, Trial
from migrator.engine.stream import Piece
from migrator.model import PAGE_SIZE_BYTES
from migrator.ranges import Ranges

PACK_BYTES_MAX: Final = 512 * 1024
"""Of guest memory in one frame: larger ones don't compress better, and fill the pipe later."""
_AHEAD: Final = 8
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
    trials: tuple[Trial, ...] = ()
    """What each codec that was asked for made of it."""
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
    smallest, codec, trials = _smallest(payload, order.codecs if len(payload) else ())
    return Packed(
        content,
        zeroes,
        smallest,
        codec,
        copied - began,
        trials,
        hash_seconds,
        same,
        digests,
    )


def _smallest(
    payload: memoryview, tried: tuple[Codec, ...]
) -> tuple[memoryview, Codec | None, tuple[Trial, ...]]:
    """(what to send, by which codec, what each made of it)."""
    best, best_codec = payload, None
    trials = []
    limit = RAW_SHARE * len(payload)
    for codec in tried:
        began = time.thread_time()
        smaller = codecs.compress(codec, payload)
        trials.append(Trial(codec, len(payload), len(smaller), time.thread_time() - began))
        if len(smaller) < limit:
            best, best_codec, limit = memoryview(smaller), codec, len(smaller)
    return best, best_codec, tuple(trials)


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


class _Job(NamedTuple):
    piece: Piece
    order: Order
    worker: int
    future: Future[Packed]


class Packer:
    """Threads that pack ahead of one delivery; they are started by the first piece.

    Pages may leave in any order within a pass, so what is ready first goes first.
    """

    def __init__(self, policy: PackingPolicy, known: KnownPages | None = None) -> None:
        self._policy = policy
        self._known = known
        self._workers: list[ThreadPoolExecutor] = []
        """Of one thread each: a plan says how many of them get work."""
        self._queue: list[_Job] = []

    @property
    def room(self) -> bool:
        """For another piece: in the queue, and in the time of the cores that are idle."""
        return len(self._queue) < _AHEAD and self._policy.affordable

    @property
    def empty(self) -> bool:
        return not self._queue

    def put(self, piece: Piece, region: MappedRegion, plan: Plan) -> None:
        """Begin with a piece of at most PACK_BYTES_MAX."""
        while len(self._workers) < plan.threads:
            self._workers.append(ThreadPoolExecutor(1, thread_name_prefix="pack"))
        order = self._policy.order(plan, ranges.byte_count(piece.content))
        known = self._known if order.hashing else None
        if known is not None and not known.should_hash():
            known = None
        worker = min(range(plan.threads), key=self._waiting_for)
        future = self._workers[worker].submit(pack, region, piece.content, order, known)
        self._queue.append(_Job(piece, order, worker, future))

    def take(self, wait_s: float) -> tuple[Piece, Packed] | None:
        """The oldest piece that is ready within `wait_s`; None if none is."""
        for _ in range(2):
            for index, job in enumerate(self._queue):
                if job.future.done():
                    del self._queue[index]
                    packed = job.future.result()
                    self._policy.note(
                        job.order,
                        ranges.byte_count(job.piece.content),
                        packed.trials,
                        copy_seconds=packed.copy_seconds,
                        hash_seconds=packed.hash_seconds,
                    )
                    return job.piece, packed
            if wait_s <= 0.0:
                return None
            wait([job.future for job in self._queue], wait_s, FIRST_COMPLETED)
        return None

    def take_back(self, count_max: int = _AHEAD) -> list[Piece]:
        """The newest pieces that weren't taken, oldest first; what is made of them is dropped."""
        kept = max(0, len(self._queue) - count_max)
        pieces = [job.piece for job in self._queue[kept:]]
        for job in self._queue[kept:]:
            job.future.cancel()
        del self._queue[kept:]
        return pieces

    def close(self) -> None:
        """End the threads, which are at most in the midst of one piece each. Idempotent."""
        for worker in self._workers:
            worker.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.shutdown(wait=True)
        self._workers.clear()

    def _waiting_for(self, worker: int) -> int:
        """How many pieces that thread has before it."""
        return sum(job.worker == worker and not job.future.done() for job in self._queue)
