"""Fewer bytes on the wire: pages are copied, zero pages told apart, the rest compressed by LZ4.

    ready ─► snapshot ─► zero pages apart ─► what is known apart ─► LZ4 ─► frame    (in threads)
                                                                     └───► as it is, where LZ4
                                                                           gains nothing

Only where the link is what a stream waits for: `PackingPolicy` holds the link's measured rate
against the measured speed of packing. On a faster link pages go by sendfile, as if this didn't
exist. On a slow one they still do whenever no packed frame is ready before the link runs dry: a
host that is too busy to pack is no slower than one that doesn't.

Pages are compressed from a copy, never from the guest's memory: LZ4 encodes a repetition as a
reference to bytes that it has already written out. If the guest changed those in between, the
*other* page, which refers to them and which nobody wrote to, would arrive wrong.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Final

import lz4.block
import msgspec
import numpy as np
import numpy.typing as npt

from migrator import ranges
from migrator.engine.known import Digests, KnownPages
from migrator.engine.memory import MappedRegion
from migrator.engine.stream import Piece
from migrator.model import PAGE_SIZE_BYTES
from migrator.ranges import Ranges

PACK_BYTES_MAX: Final = 512 * 1024
"""Of guest memory in one frame: larger ones don't compress better, and fill the pipe later."""
_AHEAD: Final = 8
"""Frames packed while one is sent: what evens out a busy host's scheduling."""
_THREADS: Final = min(2, os.cpu_count() or 1)
"""Of a stream."""
_WORDS: Final = PAGE_SIZE_BYTES // 8
_RAW_SHARE: Final = 0.95
"""A frame that LZ4 doesn't make smaller than this isn't worth unpacking."""

_SPEED_ASSUMED: Final = 0.7e9
"""Bytes a second of one core, until it was measured (LZ4 on a Linux guest's memory: 0.7-1.2e9)."""
_SPEED_MARGIN: Final = 1.25
_CORES_FACTOR: Final = 1.3
"""Packing needs so much more than LZ4 itself. On a host without idle cores it isn't only rude: the
sending thread then waits for the packing ones (measured: a first pass took 1.3 times as long)."""
_FADING: Final = 0.9
"""What the figures of the frame before still count: the last ten or so matter."""
_PRIOR_BYTES: Final = 4 * PACK_BYTES_MAX
_CHEAP: Final = 2.0
"""Packing so many times faster than the link is always tried."""
_TRIALS_APART: Final = 16
"""Where LZ4 gains nothing, one frame in so many tries whether it does now."""


class Packed(msgspec.Struct, frozen=True):
    """What a piece became."""

    content: Ranges
    """The pages of `payload`, in order."""
    zeroes: Ranges
    payload: memoryview
    compressed: bool
    core_seconds: float
    same: Ranges = ranges.empty()
    """Pages that the destination has already."""
    digests: Digests | None = None
    """Of `content`; None: nobody looked."""


def pack(
    region: MappedRegion, content: Ranges, *, compress: bool, known: KnownPages | None = None
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
    same, digests = ranges.empty(), None
    if known is not None and len(words):
        digests = known.hash(words.data.cast("B"))
        alike = known.same(region.index, content, digests)
        words, content, same = _without(words, content, alike)
        digests = digests[~alike]
    payload = words.data.cast("B") if len(words) else memoryview(b"")
    compressed = False
    if compress and len(payload):
        smaller = lz4.block.compress(payload, store_size=False)
        if len(smaller) < _RAW_SHARE * len(payload):
            payload, compressed = memoryview(smaller), True
    core_seconds = time.thread_time() - began
    return Packed(content, zeroes, payload, compressed, core_seconds, same, digests)


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


class PackingPolicy:
    """Whether packing pays, by figures. Remembers over passes. Pure but for `idle_cores`."""

    def __init__(self, idle_cores: Callable[[], float]) -> None:
        self._idle_cores = idle_cores
        self._trial_in = 0
        self._link_bytes_per_s = math.inf
        self._bytes = float(_PRIOR_BYTES)
        self._core_seconds = _PRIOR_BYTES / _SPEED_ASSUMED
        self._wire_bytes = float(_PRIOR_BYTES)

    @property
    def ratio(self) -> float:
        """Bytes of guest memory to one on the wire, of late."""
        return self._bytes / max(self._wire_bytes, 0.01 * self._bytes)

    @property
    def _speed(self) -> float:
        """Bytes a second of one core, of late."""
        return self._bytes / self._core_seconds

    def pays(self, link_bytes_per_s: float | None) -> bool:
        """Whether a stream on a link of this rate (None: not the bottleneck) should be packed.

        A core has to be faster than the link, and as many as packing takes have to be idle.
        """
        if link_bytes_per_s is None:
            return False
        self._link_bytes_per_s = link_bytes_per_s
        speed = self._speed
        if speed < _SPEED_MARGIN * link_bytes_per_s:
            return False
        cores = _CORES_FACTOR * link_bytes_per_s * self.ratio / speed
        return self._idle_cores() >= min(cores, _THREADS)

    def should_compress(self) -> bool:
        """Asked for each frame: False for most of them while LZ4 gains nothing.

        Unless trying is cheap beside sending: what can be made small lies in between.
        """
        if self.ratio * _RAW_SHARE > 1.0 or self._speed >= _CHEAP * self._link_bytes_per_s:
            return True
        self._trial_in -= 1
        if self._trial_in < 0:
            self._trial_in = _TRIALS_APART
            return True
        return False

    def note(self, guest_bytes: int, packed: Packed, *, tried: bool) -> None:
        """A frame was packed. `tried`: `should_compress` had said so."""
        if tried:
            self._bytes = _FADING * self._bytes + guest_bytes
            self._core_seconds = _FADING * self._core_seconds + packed.core_seconds
            self._wire_bytes = _FADING * self._wire_bytes + len(packed.payload)


class Packer:
    """Threads that pack ahead of one delivery; they are started by the first piece.

    Pages may leave in any order within a pass, so what is ready first goes first.
    """

    def __init__(self, policy: PackingPolicy, known: KnownPages | None = None) -> None:
        self._policy = policy
        self._known = known
        self._pool: ThreadPoolExecutor | None = None
        self._queue: list[tuple[Piece, bool, Future[Packed]]] = []

    @property
    def room(self) -> bool:
        return len(self._queue) < _AHEAD

    @property
    def empty(self) -> bool:
        return not self._queue

    def put(self, piece: Piece, region: MappedRegion) -> None:
        """Begin with a piece of at most PACK_BYTES_MAX."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="pack")
        compress = self._policy.should_compress()
        known = self._known if self._known is not None and self._known.should_hash() else None
        future = self._pool.submit(pack, region, piece.content, compress=compress, known=known)
        self._queue.append((piece, compress, future))

    def take(self, wait_s: float) -> tuple[Piece, Packed] | None:
        """The oldest piece that is ready within `wait_s`; None if none is."""
        for _ in range(2):
            for index, (piece, tried, future) in enumerate(self._queue):
                if future.done():
                    del self._queue[index]
                    packed = future.result()
                    self._policy.note(ranges.byte_count(piece.content), packed, tried=tried)
                    return piece, packed
            if wait_s <= 0.0:
                return None
            wait([future for _, _, future in self._queue], wait_s, FIRST_COMPLETED)
        return None

    def take_back(self, count_max: int = _AHEAD) -> list[Piece]:
        """The newest pieces that weren't taken, oldest first; what is made of them is dropped."""
        kept = max(0, len(self._queue) - count_max)
        pieces = [piece for piece, _, _ in self._queue[kept:]]
        for _, _, future in self._queue[kept:]:
            future.cancel()
        del self._queue[kept:]
        return pieces

    def close(self) -> None:
        """End the threads, which are at most in the midst of one piece each. Idempotent."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


class IdleCores:
    """How many of the host's cores this process may have without taking any from another.

    That is what it uses plus what is idle, by /proc/stat, of late. Looked at now and then. Until
    there are two looks to compare, the load average has to do: most pages that LZ4 makes small
    lie at the memory's beginning.
    """

    _APART_S: Final = 0.2

    def __init__(self) -> None:
        self._at_s = time.monotonic()
        self._unused_s = self._look()
        self._cores = _cores_by_load()

    def __call__(self) -> float:
        """Cores; 0.0 without /proc."""
        now = time.monotonic()
        if now - self._at_s >= self._APART_S:
            unused_s = self._look()
            self._cores = (unused_s - self._unused_s) / (now - self._at_s)
            self._at_s, self._unused_s = now, unused_s
        return self._cores

    @staticmethod
    def _look() -> float:
        """Core seconds since the start that nobody else used."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
            idle_ticks = int(fields[4]) + int(fields[5])  # proc(5): idle, iowait.
        except (OSError, IndexError, ValueError):
            return 0.0
        return idle_ticks / os.sysconf("SC_CLK_TCK") + time.process_time()


def _cores_by_load() -> float:
    try:
        return max(0.0, (os.cpu_count() or 1) - os.getloadavg()[0])
    except OSError:
        return 0.0
