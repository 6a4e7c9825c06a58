"""Post-copy at the destination: gets the missing pages while the guest runs.

    hypervisor ──fault──► fault thread ──PULL──► source      FAULTS stream: one page each, at once
                              ▲ │                  │
                              │ └──UFFDIO_COPY     ▼
                              └───────────────── PAGES
    bulk thread ──PULL──► source ──PAGES──► UFFDIO_COPY      BULK stream: what is left,
                                                             from the last fault's page on

The destination asks for everything, so a broken stream costs no more than its time: what
was asked for and didn't come is asked for again. A page that comes twice is dropped the second
time (it is no hole any more); both are the same, for the guest stands still at the source.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np

from migrator import ranges
from migrator.engine import codecs, frames, kernel
from migrator.engine.control import POLL_IN, Signal, poll
from migrator.engine.frames import FrameKind, Header, RegionShape, StreamKind
from migrator.engine.memory import MappedRegion
from migrator.engine.missing import MissingPages, Placer, holes_of, make_hole
from migrator.engine.page_socket import PageSocket, StreamEndedError
from migrator.engine.transport import StreamSocket
from migrator.errors import EngineError, RemoteProtocolError, words
from migrator.model import PAGE_SIZE_BYTES
from migrator.ranges import Ranges

CHUNK_PAGES: Final = 32
"""Asked for at once: 128 KiB."""
_WINDOW_S: Final = 0.02
"""What was asked for on the bulk stream takes so long to arrive. Most of it is still the source's
to send, which keeps the link's queue short (`engine.short_queue`): a fault's page waits for that.
"""
_WINDOW_BUSY_S: Final = 0.006
"""The same while the guest waits for pages again and again, and needs the next ones soon."""
_BUSY_S: Final = 0.1
"""After a fault."""
_CHUNKS: Final = 3
"""In a window: one arrives, one is on its way, one is asked for."""
_CHUNK_PAGES_MIN: Final = 4
_WINDOW_BYTES_MIN: Final = _CHUNKS * _CHUNK_PAGES_MIN * PAGE_SIZE_BYTES
_WINDOW_BYTES_FIRST: Final = 2 * CHUNK_PAGES * PAGE_SIZE_BYTES
_WINDOW_BYTES_MAX: Final = 4 * 1024 * 1024
_HANDOFF_S: Final = 2.0
"""From the armed faults to a running guest, at most; then the rest is pulled all the same."""
_POLL_S: Final = 0.5
_REWAKE_S: Final = 1.0
_JOIN_S: Final = 5.0
_LATENCIES_MAX: Final = 100_000
_ANSWERS: Final = frames.COMPRESSED | {FrameKind.PAGES, FrameKind.ZERO}


class FillReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a post-copy did. Latencies: from reading the fault to the filled page."""

    seconds: float
    pages: int
    faults: int
    fault_ms_median: float
    fault_ms_max: float
    packed_ratio: float
    """Bytes of pages to one of payload."""


class _Came:
    """What arrived of pages that aren't zero, on both streams."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._page_bytes = self._payload_bytes = 0

    def note(self, page_bytes: int, payload_bytes: int) -> None:
        with self._lock:
            self._page_bytes += page_bytes
            self._payload_bytes += payload_bytes

    @property
    def ratio(self) -> float:
        return self._page_bytes / self._payload_bytes if self._payload_bytes else 1.0


class Filler:
    """Use: `note` what is missing, `arm`; or `take_over`. `offer` streams; `close`.

    `on_done` is called once, from a helper thread, when nothing is missing; `finish` then.
    """

    def __init__(
        self,
        uffd: int,
        regions: list[MappedRegion],
        *,
        silence_s: float,
        on_done: Callable[[], None],
        fault: Callable[[BaseException], None],
    ) -> None:
        self._uffd = uffd
        self._regions = regions
        self._shapes = [RegionShape(r.size_bytes, r.page_size_bytes) for r in regions]
        self._silence_s = silence_s
        self._on_done = on_done
        self._fault = fault
        self._missing = MissingPages(regions)
        self._placer = Placer(uffd, regions)
        self._unsure = False
        """The source hasn't said yet what it has: every hole counts as missing."""
        self._lock = threading.Lock()
        self._offered: dict[StreamKind, PageSocket] = {}
        self._news = {StreamKind.FAULTS: Signal(), StreamKind.BULK: Signal()}
        self._waited_for: dict[tuple[int, int], float] = {}
        self._latencies: collections.deque[float] = collections.deque(maxlen=_LATENCIES_MAX)
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._done = False
        self._guest_runs = threading.Event()
        self._armed_at_s = 0.0
        self._pages = 0
        self._came = _Came()
        self._fault_at_s = 0.0

    # --- from the engine ---

    def note(self, region: int, content: Ranges) -> None:
        """These pages are stale or missing here: they become holes. EngineError: they can't.

        Once it is armed nothing more is: a source that didn't hear so tells all of it again, and of
        that some has been filled in by now.
        """
        if self._threads:
            return
        # First: the kernel mends holes by zeros where it makes huge pages, unless they are watched.
        self._placer.watch()
        for start, end in content.tolist():
            make_hole(self._regions[region], start, end)
        self._missing.add(region, content)

    def arm(self) -> None:
        """From here on whoever touches a hole waits for us. Idempotent. EngineError."""
        if self._threads:
            return  # Two threads would tear each other's frames.
        self._placer.arm()
        self._armed_at_s = time.monotonic()
        for work in (self._serve_faults, self._pull_bulk):
            thread = threading.Thread(target=self._guarded, args=(work,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def take_over(self) -> bool:
        """Go on where a dead engine stopped: any hole may be missing. EngineError.

        False: it had filled in every page, and died before it could say so. `finish` then.
        """
        try:
            if not self._placer.armed():
                self._done = True
                self._armed_at_s = time.monotonic()
                return False
        except OSError as error:
            raise EngineError(f"what a dead engine left can't be told: {error}") from error
        for region in self._regions:
            self._missing.add(region.index, holes_of(region))
        self._unsure = True
        self._guest_runs.set()
        self.arm()
        return True

    def pull_all(self) -> None:
        """The guest runs: get what nobody waits for, too."""
        self._guest_runs.set()

    def offer(self, kind: StreamKind, sock: StreamSocket) -> None:
        """A stream from the source; it replaces an earlier one of its kind."""
        with self._lock:
            earlier = self._offered.get(kind)
            self._offered[kind] = PageSocket(sock, self._shapes, self._silence_s)
        if earlier is not None:
            earlier.shut_down()
        self._news[kind].set()

    def finish(self) -> FillReport:
        """Nothing is missing: the hypervisor's memory is rid of us."""
        self._placer.disarm()
        seconds = time.monotonic() - self._armed_at_s
        self.close()
        found = np.array(self._latencies or [0.0]) * 1e3
        return FillReport(
            seconds=seconds,
            pages=self._pages,
            faults=len(self._latencies),
            fault_ms_median=float(np.median(found)),
            fault_ms_max=float(found.max()),
            packed_ratio=self._came.ratio,
        )

    def close(self) -> None:
        """End the threads. What is missing stays missing, and is waited for. Idempotent."""
        if self._done:  # Said first: a thread that ends closes its stream.
            for sock in list(self._offered.values()):
                with contextlib.suppress(StreamEndedError):
                    sock.send(FrameKind.BYE)
        self._closed = True
        self._guest_runs.set()
        for signal in self._news.values():
            signal.set()
        for sock in list(self._offered.values()):
            sock.shut_down()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_JOIN_S)

    # --- threads ---

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            if error.errno in (errno.ESRCH, errno.ENOENT) and (self._closed or self._done):
                return
            self._fault(EngineError(f"a missing page can't be filled: {words(error)}"))
        except BaseException as error:
            self._fault(error)

    def _current(self, kind: StreamKind, used: PageSocket | None) -> PageSocket | None:
        """The newest stream of a kind; the one in use so far is closed if it isn't that."""
        with self._lock:
            newest = self._offered.get(kind)
        if used is not None and used is not newest:
            used.close()
        return newest

    def _check_done(self) -> None:
        with self._lock:
            if self._done or self._unsure or self._missing.left_pages:
                return
            self._done = True
        self._on_done()

    def _serve_faults(self) -> None:
        """Faults out, pages in: one thread, so that nothing waits for Python's lock."""
        sock: PageSocket | None = None
        broken = True
        woken_at_s = time.monotonic()
        while not self._closed:
            news = self._news[StreamKind.FAULTS]
            watched = {self._uffd: POLL_IN, news.fileno(): POLL_IN}
            if sock is not None and not broken:
                watched[sock.fileno()] = POLL_IN
            waiting = sock is not None and not broken and sock.buffered
            happened = poll(watched, 0 if waiting else _POLL_S)
            if waiting and sock is not None:
                happened[sock.fileno()] = POLL_IN
            try:
                if news.fileno() in happened:
                    news.clear()
                    sock = self._current(StreamKind.FAULTS, sock)
                    broken = sock is None
                    if sock is not None:
                        self._ask(sock, list(self._waited_for))
                if self._uffd in happened:
                    found = self._read_faults()
                    if sock is not None and not broken:
                        self._ask(sock, found)
                if sock is not None and not broken and sock.fileno() in happened:
                    self._take(sock)
            except (StreamEndedError, RemoteProtocolError):
                broken = True
                if sock is not None:
                    sock.shut_down()
            if time.monotonic() - woken_at_s > _REWAKE_S:
                woken_at_s = time.monotonic()
                self._placer.wake_all()
        if sock is not None:
            sock.close()

    def _read_faults(self) -> list[tuple[int, int]]:
        """The pages to ask for. What the source has as a hole is filled with zeros at once."""
        found: list[tuple[int, int]] = []
        self._fault_at_s = time.monotonic()
        for address in kernel.uffd_faults(self._uffd):
            page = self._placer.locate(address)
            if page is None:
                continue
            if not self._missing.is_missing(*page):
                self._placer.zero(page[0], page[1], page[1] + PAGE_SIZE_BYTES)
            elif page not in self._waited_for:
                self._waited_for[page] = time.monotonic()
                self._missing.move_to(page[0], page[1] + PAGE_SIZE_BYTES)
                found.append(page)
        return found

    def _ask(self, sock: PageSocket, pages: list[tuple[int, int]]) -> None:
        for region, start in pages:
            content = np.array([[start, start + PAGE_SIZE_BYTES]], dtype=np.int64)
            sock.send(
                FrameKind.PULL,
                region=region,
                content=content,
                sequence=self._missing.left_pages,
            )

    def _pull_bulk(self) -> None:
        """Keep enough under way to fill the link, and not more."""
        news = self._news[StreamKind.BULK]
        sock: PageSocket | None = None
        # The handoff isn't over yet, and shouldn't have to share its processors.
        self._guest_runs.wait(_HANDOFF_S)
        while not self._closed:
            if not poll({news.fileno(): POLL_IN}, _POLL_S):
                self._check_done()
                continue
            news.clear()
            sock = self._current(StreamKind.BULK, sock)
            if sock is None or self._closed:
                continue
            self._missing.forget_asked()
            try:
                if self._unsure:
                    self._learn(sock)
                self._pull(sock)
            except (StreamEndedError, RemoteProtocolError):
                sock.shut_down()
        if sock is not None:
            sock.close()

    def _learn(self, sock: PageSocket) -> None:
        """What the source doesn't have isn't missing."""
        found: list[list[Ranges]] = [[] for _ in self._regions]
        sock.send(FrameKind.LIST)
        while True:
            header, content = sock.receive()
            if header.kind is FrameKind.EXTENTS and content is not None:
                found[header.region].append(content)
            elif header.kind is FrameKind.BARRIER:
                break
            else:
                raise RemoteProtocolError(f"{header.kind.name} came instead of EXTENTS")
        for index, parts in enumerate(found):
            self._missing.keep(index, ranges.union(*parts))
        self._unsure = False

    def _pull(self, sock: PageSocket) -> None:
        """Until nothing is left to ask for and all has come. StreamEndedError."""
        under_way = 0
        rate: float | None = None
        began, came = time.monotonic(), 0
        while not self._closed:
            window = self._window_bytes(rate)
            chunk_pages = window // (_CHUNKS * PAGE_SIZE_BYTES)
            while under_way < window:
                asked = self._missing.ask(min(chunk_pages, CHUNK_PAGES))
                if asked is None:
                    break
                region, content = asked
                left = self._missing.left_pages
                sock.send(FrameKind.PULL, region=region, content=content, sequence=left)
                under_way += ranges.byte_count(content)
            if not under_way:
                self._check_done()
                return
            count = self._take(sock)
            under_way -= count
            came += count
            seconds = time.monotonic() - began
            if seconds > _WINDOW_S:
                rate, began, came = came / seconds, time.monotonic(), 0

    def _window_bytes(self, bytes_per_s: float | None) -> int:
        """How much may be under way, at the rate at which it came of late."""
        if bytes_per_s is None:
            return _WINDOW_BYTES_FIRST
        busy = time.monotonic() - self._fault_at_s < _BUSY_S
        fitting = int(bytes_per_s * (_WINDOW_BUSY_S if busy else _WINDOW_S))
        return max(_WINDOW_BYTES_MIN, min(fitting, _WINDOW_BYTES_MAX))

    def _take(self, sock: PageSocket) -> int:
        """Receive one answer and fill it in. Its bytes of guest memory."""
        header, content = sock.receive()
        if content is None or header.kind not in _ANSWERS:
            raise RemoteProtocolError(f"a source doesn't answer by {header.kind.name}")
        size = ranges.byte_count(content)
        if header.kind is not FrameKind.ZERO:
            self._came.note(size, header.payload_bytes)
        if header.kind in frames.COMPRESSED:
            payload = codecs.decompress(header.kind, sock.payload[: header.payload_bytes], size)
            unpacked = np.frombuffer(payload, dtype=np.uint8)
            self._place(sock, header, content, int(unpacked.ctypes.data))
        else:
            self._place(sock, header, content, sock.payload_address)
        return size

    def _place(self, sock: PageSocket, header: Header, content: Ranges, source: int) -> None:
        """`source`: the pages' address, unless they are zeros."""
        region = header.region
        for start, end in content.tolist():
            if header.kind is not FrameKind.ZERO:
                self._placer.copy(region, start, end, source)
                source += end - start
            self._missing.filled(region, start, end)  # A zero page may stay a hole.
            self._pages += (end - start) // PAGE_SIZE_BYTES
            if self._waited_for:
                self._settle_waiting(region, start, end, zero=header.kind is FrameKind.ZERO)
        self._check_done_after_fault(sock)

    def _check_done_after_fault(self, sock: PageSocket) -> None:
        if sock is self._offered.get(StreamKind.FAULTS):
            self._check_done()

    def _settle_waiting(self, region: int, start: int, end: int, *, zero: bool) -> None:
        now = time.monotonic()
        for offset in range(start, end, PAGE_SIZE_BYTES):
            since = self._waited_for.pop((region, offset), None)
            if since is None:
                continue
            self._latencies.append(now - since)
            if zero:
                self._placer.zero(region, offset, offset + PAGE_SIZE_BYTES)
