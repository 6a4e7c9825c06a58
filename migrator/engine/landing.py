"""How the content of pages gets from a connection into the guest's memory file.

    plain    socket ──splice──► pipe ──splice──► file       one copy, by the kernel
    TLS      socket ──decrypt─► buffer ──pwrite─► file      on two threads
    packed   buffer ──unpack──► buffer ──pwrite─► file
    huge     socket ──recv────► mapping                     hugetlbfs can't be written to

By the file, and not through a mapping of it: a page that nobody has mapped costs no page fault,
and one that is written as a whole needn't be cleared first. Cold memory, 768 MiB over loopback on
two cores: 2.1 GB/s by splice; into a mapping 1.6 with a thread that populates it ahead, and 2.1
where it was populated beforehand (docs/measurements.md). Allocating ahead by fallocate(2)
doesn't help: that and whoever writes take turns at the file's lock.

A frame may end within: what came of it lies in the file then, also a part of a page, as it would in
a mapping. Nobody reads it before the source has sent it again. What can't be written (ENOSPC,
ENOMEM: no memory is left; EFAULT of a mapping) is EngineError, and the end of the migration. The
same numbers said of the connection are that connection's end alone (`engine.intake`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from migrator.engine.intake import Intake
from migrator.engine.memory import MappedRegion
from migrator.errors import EngineError
from migrator.ranges import Ranges

_PIPE_BYTES: Final = 1024 * 1024
"""What an unprivileged process may have (fs.pipe-max-size); with 256 KiB it is 0.8 GB/s."""
_BUFFER_BYTES: Final = 512 * 1024
_BUFFERS: Final = 3
"""One is filled, one written, and one lies between. By TLS 0.72 GB/s, and 0.61 on one thread."""
_JOIN_S: Final = 5.0
_F_SETPIPE_SZ: Final = 1031  # linux/fcntl.h


class Landing:
    """Of one connection; use it from one thread, and `close` it."""

    def __init__(self, intake: Intake) -> None:
        """OSError: no descriptors are left."""
        self._intake = intake
        self._writer = None if intake.can_splice else _Writer()
        self._out, self._in = os.pipe()
        with contextlib.suppress(OSError):  # All of this user's pipes are too large, or no memory.
            fcntl.fcntl(self._in, _F_SETPIPE_SZ, _PIPE_BYTES)

    def close(self) -> None:
        """Once, when nobody is in another method. Nothing is written any more when it returns.

        EngineError: a write doesn't end, and could land on what comes later.
        """
        os.close(self._out)
        os.close(self._in)
        if self._writer is not None:
            self._writer.close()

    def receive(self, region: MappedRegion, content: Ranges) -> None:
        """A frame's payload: these ranges' content, joined. ConnectionEndedError, EngineError."""
        if not region.can_pwrite:
            views = [region.view[start:end] for start, end in content.tolist()]
            try:
                self._intake.fill_scattered(views)
            except OSError as error:
                raise unwritable(region, error) from error
            return
        left = sum(end - start for start, end in content.tolist())
        places = _Places(content)
        if self._writer is not None:
            self._receive_buffered(self._writer, region, places, left)
            return
        while left:
            came = self._intake.splice(self._in, left)
            for at, count in places.next(came):
                self._splice(region, at, count)
            left -= came

    def _receive_buffered(
        self, writer: _Writer, region: MappedRegion, places: _Places, left: int
    ) -> None:
        if left <= _BUFFER_BYTES:  # Another thread would only take longer.
            view = writer.own[:left]
            self._intake.fill(view)
            _write(region, places.next(left), view)
            return
        while left:
            came = min(left, _BUFFER_BYTES)
            buffer = writer.take()
            self._intake.fill(buffer[:came])
            writer.put(region, list(places.next(came)), buffer)
            left -= came
        writer.settle()

    def write(self, region: MappedRegion, content: Ranges, payload: memoryview) -> None:
        """As `receive`, of content that has come already. EngineError."""
        places = _Places(content).next(len(payload))
        if region.can_pwrite:
            _write(region, places, payload)
            return
        done = 0
        for at, count in places:
            region.view[at : at + count] = payload[done : done + count]
            done += count

    def _splice(self, region: MappedRegion, at: int, count: int) -> None:
        """From the pipe, which has that much."""
        while count:
            try:
                done = os.splice(self._out, region.fd, count, offset_dst=at)
            except OSError as error:
                raise unwritable(region, error) from error
            at += done
            count -= done


class _Writer:
    """Writes to memory files on a thread of its own, while the next part is being decrypted."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(memoryview(bytearray(_BUFFER_BYTES)))
        self.own = memoryview(bytearray(_BUFFER_BYTES))
        """For the connection's thread alone."""
        self._error: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def take(self) -> memoryview:
        """A buffer to fill; it is waited for as long as a write takes."""
        return self._free.get()

    def put(
        self, region: MappedRegion, places: Sequence[tuple[int, int]], buffer: memoryview
    ) -> None:
        """Write a buffer's content there, and give it back."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="landing", daemon=True)
            self._thread.start()
        self._jobs.put((region, places, buffer))

    def settle(self) -> None:
        """Until all is written. EngineError if something can't be."""
        for buffer in [self._free.get() for _ in range(_BUFFERS)]:
            self._free.put(buffer)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """What waits isn't written any more. EngineError if what is being written doesn't end."""
        self._closed = True
        if self._thread is None:
            return
        self._jobs.put(None)
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            raise EngineError(f"guest memory can't be written to: a write takes over {_JOIN_S:g} s")

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            region, places, buffer = job
            try:
                if self._error is None and not self._closed:
                    _write(region, places, buffer)
            except BaseException as error:
                self._error = error  # For the connection's thread.
            finally:
                self._free.put(buffer)


_Job = tuple[MappedRegion, Sequence[tuple[int, int]], memoryview]


def _write(region: MappedRegion, places: Iterable[tuple[int, int]], payload: memoryview) -> None:
    done = 0
    for start, size in places:
        at, count = start, size
        while count:
            try:
                written = os.pwrite(region.fd, payload[done : done + count], at)
            except OSError as error:
                raise unwritable(region, error) from error
            done += written
            at += written
            count -= written


class _Places:
    """Where a frame's next bytes belong."""

    def __init__(self, content: Ranges) -> None:
        self._ranges = iter(content.tolist())
        self._at = self._end = 0

    def next(self, count: int) -> Iterator[tuple[int, int]]:
        """(offset, bytes) for the next `count` bytes, ascending. Use all of it before the next."""
        while count:
            if self._at == self._end:
                self._at, self._end = next(self._ranges)
            part = min(count, self._end - self._at)
            yield self._at, part
            self._at += part
            count -= part


def unwritable(region: MappedRegion, error: OSError) -> EngineError:
    """Said of the guest's memory, not of a connection: nothing can go on."""
    return EngineError(f"memory region {region.layout.name} can't be written to: {error.strerror}")
