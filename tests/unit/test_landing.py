"""How pages get from a connection into a memory file, in whatever parts they come."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from migrator import ranges
from migrator.engine import landing as landing_module
from migrator.engine.intake import ConnectionEndedError, Intake
from migrator.engine.landing import Landing
from migrator.engine.memory import MappedRegion
from migrator.engine.transport import limit_waits
from migrator.engine_messages import RegionLayout
from migrator.errors import EngineError
from migrator.ranges import Ranges

PAGE = 4096
MIB = 1024**2
SIZE = 16 * MIB
SILENCE_S = 5.0


class _Buffered(Intake):
    """As with TLS: what comes can't be spliced."""

    can_splice = False


class _Ends:
    def __init__(self, kind: type[Intake], silence_s: float = SILENCE_S) -> None:
        fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, SIZE)
        layout = RegionLayout(name="ram", size_bytes=SIZE, page_size_bytes=PAGE)
        self.region = MappedRegion(0, fd, layout)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.source = socket.create_connection(listener.getsockname())
            self._sock, _ = listener.accept()
        limit_waits(self._sock, silence_s)
        self.intake = kind(self._sock, silence_s)
        self.landing = Landing(self.intake)
        self._threads: list[threading.Thread] = []

    def send(self, data: bytes, parts: Sequence[int] = ()) -> None:
        """In parts of these sizes, and the rest."""

        def work() -> None:
            at = 0
            with contextlib.suppress(OSError):  # The other end, or ours, may have had enough.
                for size in (*parts, len(data)):
                    self.source.sendall(data[at : at + size])
                    at += size

        thread = threading.Thread(target=work)
        self._threads.append(thread)
        thread.start()

    def populated(self) -> int:
        return os.fstat(self.region.fd).st_blocks * 512

    def close(self) -> None:
        self.landing.close()
        self.close_connection()

    def close_connection(self) -> None:
        self._sock.close()
        self.source.close()
        for thread in self._threads:
            thread.join(30.0)
        os.close(self.region.fd)


@pytest.fixture(params=[Intake, _Buffered], ids=["plain", "buffered"])
def ends(request: pytest.FixtureRequest) -> Iterator[_Ends]:
    made = _Ends(request.param)
    yield made
    made.close()


def _scattered() -> Ranges:
    starts = np.arange(0, SIZE, 5 * PAGE)[:900]
    long = ranges.from_pairs([(SIZE - 3 * MIB, SIZE - PAGE)])
    return ranges.union(ranges.from_page_starts(starts, PAGE), long)


@pytest.mark.parametrize(
    "content",
    [ranges.from_pairs([(4 * MIB, 8 * MIB)]), _scattered()],
    ids=["one range", "scattered"],
)
@pytest.mark.parametrize("parts", [(), (1, 4095, 1, 70_000, 5000), (3 * MIB + 7,)], ids=str)
def test_content_lands_where_it_belongs_however_it_comes(
    ends: _Ends, content: Ranges, parts: Sequence[int]
) -> None:
    payload = os.urandom(ranges.byte_count(content))
    ends.send(payload + b"next", parts)
    ends.landing.receive(ends.region, content)
    rest = bytearray(4)
    ends.intake.fill(memoryview(rest))
    assert rest == b"next"
    at = 0
    for start, end in content.tolist():
        assert ends.region.view[start:end] == payload[at : at + end - start]
        at += end - start


def test_nothing_else_is_touched(ends: _Ends) -> None:
    content = ranges.from_page_starts(np.arange(0, 100 * PAGE, 2 * PAGE), PAGE)
    ends.send(os.urandom(50 * PAGE))
    ends.landing.receive(ends.region, content)
    ends.landing.write(ends.region, ranges.from_pairs([(MIB, 2 * MIB)]), memoryview(b"x" * MIB))
    assert ends.populated() == 50 * PAGE + MIB
    assert ends.region.view[MIB : 2 * MIB] == b"x" * MIB
    for start in range(PAGE, 100 * PAGE, 2 * PAGE):
        assert not any(ends.region.view[start : start + PAGE])


def test_what_was_there_is_overwritten(ends: _Ends) -> None:
    ends.region.view[: 2 * MIB] = b"\xff" * (2 * MIB)
    ends.send(b"y" * MIB)
    ends.landing.receive(ends.region, ranges.from_pairs([(PAGE, PAGE + MIB)]))
    assert ends.region.view[:PAGE] == b"\xff" * PAGE
    assert ends.region.view[PAGE : PAGE + MIB] == b"y" * MIB
    assert ends.region.view[PAGE + MIB : 2 * MIB] == b"\xff" * (MIB - PAGE)


def test_an_end_within_a_frame_is_told(ends: _Ends) -> None:
    ends.source.sendall(b"z" * (PAGE + 100))
    ends.source.close()
    with pytest.raises(ConnectionEndedError, match="closed"):
        ends.landing.receive(ends.region, ranges.from_pairs([(0, MIB)]))


def test_a_revoked_stream_ends_within_a_frame(ends: _Ends) -> None:
    ends.source.sendall(b"z" * 100)
    revoking = threading.Timer(0.05, ends.intake.revoke)
    revoking.start()
    with pytest.raises(ConnectionEndedError):
        ends.landing.receive(ends.region, ranges.from_pairs([(0, MIB)]))
    revoking.join()
    with pytest.raises(ConnectionEndedError, match="replaced"):
        ends.landing.receive(ends.region, ranges.from_pairs([(0, MIB)]))


@pytest.mark.parametrize("kind", [Intake, _Buffered])
def test_a_silence_within_a_frame_is_told(kind: type[Intake]) -> None:
    ends = _Ends(kind, silence_s=0.05)
    try:
        ends.source.sendall(b"z" * (PAGE + 100))
        with pytest.raises(ConnectionEndedError, match="silent"):
            ends.landing.receive(ends.region, ranges.from_pairs([(0, MIB)]))
    finally:
        ends.close()


@pytest.mark.parametrize("size", [PAGE, 4 * MIB])
def test_memory_that_cant_be_written_to_is_an_error_of_this_side(ends: _Ends, size: int) -> None:
    """As where none is left. Through a mapping it would be a SIGBUS."""
    f_add_seals, f_seal_future_write = 1033, 0x10  # linux/fcntl.h
    fcntl.fcntl(ends.region.fd, f_add_seals, f_seal_future_write)
    ends.send(b"z" * size)
    with pytest.raises(EngineError, match="region ram can't be written to"):
        ends.landing.receive(ends.region, ranges.from_pairs([(0, size)]))
    with pytest.raises(EngineError, match="region ram can't be written to"):
        ends.landing.write(ends.region, ranges.from_pairs([(0, PAGE)]), memoryview(bytes(PAGE)))


def test_a_write_that_doesnt_end_is_told_and_none_follows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it could land on what the stream that comes next has brought."""
    begun, gate = threading.Event(), threading.Event()
    written: list[Sequence[tuple[int, int]]] = []

    def write(region: MappedRegion, places: Sequence[tuple[int, int]], payload: memoryview) -> None:
        begun.set()
        assert gate.wait(30.0)
        written.append(places)

    monkeypatch.setattr(landing_module, "_write", write)
    monkeypatch.setattr(landing_module, "_JOIN_S", 0.05)
    ends = _Ends(_Buffered)

    def send() -> None:
        ends.source.sendall(b"z" * (MIB + PAGE))  # Two buffers full, and some of a third.
        ends.source.shutdown(socket.SHUT_WR)

    sending = threading.Thread(target=send)
    sending.start()
    with pytest.raises(ConnectionEndedError):
        ends.landing.receive(ends.region, ranges.from_pairs([(0, 4 * MIB)]))
    sending.join()
    assert begun.wait(30.0)
    with pytest.raises(EngineError, match="can't be written to: a write takes"):
        ends.landing.close()
    gate.set()
    writer = ends.landing._writer
    assert writer is not None
    assert writer._thread is not None
    writer._thread.join(30.0)
    assert written == [[(0, MIB // 2)]]
    ends.close_connection()
