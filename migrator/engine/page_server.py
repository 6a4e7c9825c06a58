"""Post-copy at the source: answers what the destination asks for, until it misses nothing.

Two streams, a thread each: on FAULTS come pages that a vCPU waits for, answered at once; on BULK
all the others, within the bandwidth cap. The server knows nothing of what the destination has:
a broken stream, a dead engine on either side, is connected anew, and the destination asks again.
The destination is dialled until it is there: once the source's hypervisor has died, this process
is all that has the pages. The guest stands still here, for good unless the handoff fails: its
memory doesn't change.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from migrator import ranges
from migrator.engine import codecs, frames, kernel
from migrator.engine.answers import AnswerPacker
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.channel import ChannelHealth
from migrator.engine.control import ChannelLostError, HelperWaiter, Signal, StoppedError, Waiter
from migrator.engine.fault_turns import FaultTurns
from migrator.engine.frames import FrameKind, RegionShape, StreamHello, StreamKind
from migrator.engine.memory import MappedRegion
from migrator.engine.packing_policy import PACK_BYTES_MIN, PackingPolicy
from migrator.engine.page_socket import PageSocket, StreamEndedError
from migrator.engine.short_queue import ShortQueue
from migrator.engine.stream import Endpoint, StreamBrokenError, open_welcomed
from migrator.errors import FerryError, RemoteProtocolError
from migrator.model import PAGE_SIZE_BYTES
from migrator.ranges import Ranges

_BACKOFF_S: Final = 0.1
_REFUSED_S: Final = 1.0
"""After a refusal, by another engine at that address, say; or when `reconnect_s` are over."""
_JOIN_S: Final = 2.0
_KINDS: Final = (StreamKind.FAULTS, StreamKind.BULK)


class PageServer:
    """Use: `connect` or not, `start`, `close`. A thread's failure is reported by `fault`."""

    def __init__(
        self,
        endpoint: Endpoint,
        hello: Callable[[StreamKind], StreamHello],
        regions: list[MappedRegion],
        bucket: TokenBucket,
        health: ChannelHealth,
        policy: PackingPolicy,
        *,
        reconnect_s: float,
        fault: Callable[[BaseException], None],
    ) -> None:
        self._endpoint = endpoint
        self._hello = hello
        self._regions = regions
        self._shapes = [RegionShape(r.size_bytes, r.page_size_bytes) for r in regions]
        self._pages_in_all = sum(r.size_bytes for r in regions) // PAGE_SIZE_BYTES
        self._bucket = bucket
        self._health = health
        self._reconnect_s = reconnect_s
        self._fault = fault
        self._stop = Signal()
        self._closed = False
        """Nothing of it is open any more."""
        self._sockets: dict[StreamKind, PageSocket] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._queue = ShortQueue()
        """Of the bulk stream, as it is now."""
        self._turns = FaultTurns()
        self._answers = AnswerPacker(policy)
        self._unopened = set(_KINDS)
        self._on_open: Callable[[], None] = lambda: None
        self._unended = set(_KINDS)
        self._on_over: Callable[[], None] = lambda: None
        self._fault_bytes = 0
        self.bytes_sent = 0
        self.left_pages = 0
        """As the destination last said."""
        self.over = False
        """The destination said that nothing is missing."""

    def connect(self, waiter: Waiter) -> None:
        """Open what isn't open. ChannelLostError if the destination can't be reached in time."""
        for kind in _KINDS:
            if kind not in self._sockets:
                self._sockets[kind] = self._open(kind, waiter)

    def start(
        self,
        on_open: Callable[[], None] = lambda: None,
        on_over: Callable[[], None] = lambda: None,
    ) -> None:
        """Serve. The threads open what isn't open; when all is, one of them calls `on_open`; and
        `on_over` when the destination has said on each stream that nothing is missing.
        """
        self._on_open, self._on_over = on_open, on_over
        for kind in _KINDS:
            thread = threading.Thread(target=self._run, args=(kind,), daemon=True)
            self._threads.append(thread)
            thread.start()

    @property
    def started(self) -> bool:
        return bool(self._threads)

    def close(self) -> None:
        """Idempotent. An engine may outlive many servers: one an engine of the destination."""
        if self._closed:
            return
        self._stop.set()
        for sock in list(self._sockets.values()):
            sock.shut_down()
        for thread in self._threads:
            thread.join(_JOIN_S)
        for sock in list(self._sockets.values()):
            sock.close()
        if not any(thread.is_alive() for thread in self._threads):
            self._stop.close()  # Else it is looked at yet: its number must not be another's.
            self._closed = True

    def _open(self, kind: StreamKind, waiter: Waiter) -> PageSocket:
        deadline = time.monotonic() + self._reconnect_s
        while True:
            try:
                sock, welcome = open_welcomed(self._endpoint, self._hello(kind), waiter)
            except StreamBrokenError as error:
                if time.monotonic() > deadline:
                    raise ChannelLostError(
                        f"the destination's engine could not be reached for "
                        f"{self._reconnect_s:g} s: {error}"
                    ) from error
                waiter.wait(None, 0, _BACKOFF_S)
            else:
                opened = PageSocket(sock, self._shapes, self._endpoint.silence_s)
                self._answers.usable = codecs.usable(welcome.pull_codecs)
                if kind is StreamKind.BULK:
                    self._queue = ShortQueue()
                    opened.limit_queue(self._queue.bytes)
                return opened

    def _run(self, kind: StreamKind) -> None:
        waiter = HelperWaiter(self._stop)
        try:
            if kind not in self._sockets:
                self._open_again(kind, waiter)
            self._health.restored(-kind)  # If a server before this one had lost it.
            self._note_open(kind)
            while True:
                try:
                    self._serve(kind, self._sockets[kind], waiter)
                    self._note_over(kind)
                    return
                except (StreamEndedError, RemoteProtocolError) as error:
                    waiter.tick()
                    self._health.broke(-kind, str(error))
                    if not self._sockets[kind].carries:  # Not as fast as it goes.
                        waiter.wait(None, 0, _BACKOFF_S)
                self._sockets[kind].close()
                self._open_again(kind, waiter)
                self._health.restored(-kind)
        except StoppedError:
            return
        except BaseException as error:
            self._fault(error)

    def _open_again(self, kind: StreamKind, waiter: Waiter) -> None:
        """For as long as it takes, and as nobody names another address. It is told why it lasts."""
        while True:
            try:
                self._sockets[kind] = self._open(kind, waiter)
                break
            except FerryError as error:
                self._health.stays_broken(-kind, str(error))
                waiter.wait(None, 0, _REFUSED_S)
        waiter.tick()  # A `close` that came before this one was there has shut down the others.

    def _note_open(self, kind: StreamKind) -> None:
        with self._lock:
            self._unopened.discard(kind)
            all_open = not self._unopened
        if all_open:
            self._on_open()

    def _note_over(self, kind: StreamKind) -> None:
        with self._lock:
            self._unended.discard(kind)
            all_over = not self._unended
        if all_over:
            self.left_pages = 0
            self._on_over()

    def _serve(self, kind: StreamKind, sock: PageSocket, waiter: Waiter) -> None:
        """Until BYE. StreamEndedError, RemoteProtocolError."""
        while True:
            header, content = sock.receive()
            match header.kind:
                case FrameKind.PULL if content is not None:
                    self._note_left(header.sequence)
                    if kind is StreamKind.FAULTS:
                        self._turns.asked()
                    self._answer(kind, sock, header.region, content, waiter)
                case FrameKind.LIST:
                    self._list(sock)
                case FrameKind.BYE:
                    self.over = True
                    return
                case _:
                    raise RemoteProtocolError(f"a destination doesn't send {header.kind.name}")

    def _note_left(self, pages: int) -> None:
        if pages > self._pages_in_all:
            raise RemoteProtocolError(f"{pages} pages can't be missing of this memory")
        self.left_pages = pages

    def _answer(
        self, kind: StreamKind, sock: PageSocket, index: int, content: Ranges, waiter: Waiter
    ) -> None:
        while len(content):
            if kind is StreamKind.BULK:
                content = self._answer_bulk(sock, index, content, waiter)
                continue
            head, content = ranges.take(content, frames.FRAME_BYTES_MAX, frames.FRAME_RANGES_MAX)
            vector = self._answers.fault(self._regions[index], head).vector(index)
            sock.send_vector(vector)
            size = self._spend(vector)
            self._fault_bytes += size
            self._turns.answered(size, self._queue.bytes_per_s)

    def _answer_bulk(self, sock: PageSocket, index: int, content: Ranges, waiter: Waiter) -> Ranges:
        """Send a piece of it within the cap; what is left of it."""
        if self._turns.holds_back(self._queue.bytes_per_s):
            self._queue.restart()
        elif self._queue.note(time.monotonic(), sock.figures(), self._fault_bytes):
            sock.limit_queue(self._queue.bytes)
        while (wait_s := self._bucket.wait_s(time.monotonic())) > 0:
            waiter.wait(None, 0, min(wait_s, 0.1))
        piece_bytes = self._bucket.piece_bytes(PACK_BYTES_MIN)
        piece_bytes = max(PAGE_SIZE_BYTES, piece_bytes - piece_bytes % PAGE_SIZE_BYTES)
        head, left = ranges.take(content, piece_bytes, frames.FRAME_RANGES_MAX)
        rates = (self._queue.bytes_per_s, self._bucket.bytes_per_s)
        rate = min((each for each in rates if each is not None), default=None)
        answer = self._answers.bulk(self._regions[index], head, rate)
        if len(answer.zeroes):
            sock.send(FrameKind.ZERO, region=index, content=answer.zeroes)
        if len(answer.content):
            vector = answer.vector(index)
            sock.send_vector(vector, self._bulk_step)
            self._spend(vector)
        return left

    def _bulk_step(self) -> int:
        """What bulk may hand to the kernel at once, when it is its turn."""
        return self._turns.wait(self._queue.bytes_per_s) or self._queue.bytes // 2

    def _spend(self, vector: list[bytes | memoryview]) -> int:
        """It was sent, and has so many bytes."""
        count = sum(map(len, vector))
        self._bucket.spend(count, time.monotonic())
        self.bytes_sent += count
        return count

    def _list(self, sock: PageSocket) -> None:
        """What isn't a hole here: all that the destination can miss."""
        for region in self._regions:
            found = kernel.populated_extents(region.fd, region.size_bytes)
            extents = ranges.align_outward(found, PAGE_SIZE_BYTES)
            for at in range(0, len(extents), frames.FRAME_RANGES_MAX):
                part = extents[at : at + frames.FRAME_RANGES_MAX]
                sock.send(FrameKind.EXTENTS, region=region.index, content=part)
        sock.send(FrameKind.BARRIER)
