"""Prefaulting: makes the destination's huge pages present before the bytes for them arrive.

They are received into a mapping, for hugetlbfs can't be written to (`landing.py`). In untouched
memory the receiving thread would pay for the clearing of each page. This thread does ahead of it,
without Python's lock. It is a hint: whatever goes wrong here only makes the stream slower.
"""

from __future__ import annotations

import collections
import sys
import threading
from typing import Final

from migrator.engine import kernel
from migrator.engine.memory import MappedRegion
from migrator.ranges import Ranges

_PIECE_BYTES: Final = 4 * 1024 * 1024
_QUEUE_MAX: Final = 4096
"""Ranges. More than any source announces ahead; what is above is dropped."""


class Prefaulter:
    """One thread, from the first `expect` on. `close` ends it within one piece."""

    def __init__(self, regions: list[MappedRegion]) -> None:
        self._regions = regions
        self._queue: collections.deque[tuple[int, int, int]] = collections.deque()
        self._more = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def expect(self, region: int, content: Ranges) -> None:
        with self._more:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="prefault", daemon=True)
                self._thread.start()
            room = _QUEUE_MAX - len(self._queue)
            self._queue.extend((region, start, end) for start, end in content[:room].tolist())
            self._more.notify()

    def close(self) -> None:
        with self._more:
            self._closed = True
            self._queue.clear()
            self._more.notify()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def _run(self) -> None:
        try:
            while (found := self._next()) is not None:
                index, start, end = found
                address = self._regions[index].address
                while start < end and not self._closed:
                    count = min(end - start, _PIECE_BYTES)
                    kernel.populate_write(address + start, count)
                    start += count
        except OSError as error:
            sys.stderr.write(f"prefaulting ends: {error}\n")
            self._closed = True

    def _next(self) -> tuple[int, int, int] | None:
        with self._more:
            while not self._queue and not self._closed:
                self._more.wait()
            return None if self._closed else self._queue.popleft()
