"""A stream's beginning: the hello, its answer, and what follows the answer in the same breath."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import trustme

from migrator import wire
from migrator.engine import frames
from migrator.engine.control import HelperWaiter, Signal
from migrator.engine.frames import (
    FrameKind,
    RegionShape,
    StreamHello,
    StreamKind,
    StreamWelcome,
)
from migrator.engine.page_socket import PageSocket
from migrator.engine.stream import Endpoint, StreamRefusedError, open_stream
from migrator.engine.transport import (
    ListenerTls,
    StreamSocket,
    limit_waits,
    secure_incoming,
    tls_peer,
)
from migrator.model import PAGE_SIZE_BYTES
from migrator.ranges import from_pairs
from tests.unit.test_tls import files_of

SILENCE_S = 5.0
HELLO = StreamHello(
    version=frames.STREAM_VERSION,
    migration_id="m",
    secret=b"s" * 32,
    kind=StreamKind.BULK,
    index=0,
    streams=1,
)
SHAPES = [RegionShape(64 * PAGE_SIZE_BYTES, PAGE_SIZE_BYTES)]
WELCOME = wire.encode_frame(wire.FrameKind.HELLO, StreamWelcome())
PULL = frames.encode(
    FrameKind.PULL, region=0, content=from_pairs([(0, PAGE_SIZE_BYTES)]), sequence=7
)


@contextmanager
def answered(tmp_path: Path, answer: list[bytes], *, secure: bool) -> Iterator[StreamSocket]:
    """A stream to a destination that answers the hello by `answer`, each part in one write."""
    authority = trustme.CA()
    n1, n2 = (files_of(tmp_path, authority, name) for name in ("n1", "n2"))
    over = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        accepted = listener.accept()[0]
        context = ListenerTls(n2).context() if secure else None
        with accepted:
            stream = secure_incoming(accepted, context, SILENCE_S)
            limit_waits(stream, SILENCE_S)
            stream.recv(4096)
            for part in answer:
                stream.sendall(part)
            over.wait(SILENCE_S)
            stream.close()

    thread = threading.Thread(target=serve)
    thread.start()
    endpoint = Endpoint(
        host="127.0.0.1",
        port=listener.getsockname()[1],
        silence_s=SILENCE_S,
        tls=tls_peer(n1, "n2") if secure else None,
    )
    try:
        with closing(open_stream(endpoint, HELLO, HelperWaiter(Signal()))) as sock:
            yield sock
    finally:
        over.set()
        thread.join()
        listener.close()


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_what_comes_with_the_welcome_belongs_to_the_stream(tmp_path: Path, secure: bool) -> None:
    """A destination asks for the pages that its guest waits for as soon as a stream is there.

    Swallowed, such a question would never be answered, and the guest wait for ever.
    """
    with answered(tmp_path, [WELCOME + PULL], secure=secure) as sock:
        header, content = PageSocket(sock, SHAPES, SILENCE_S).receive()
    assert (header.kind, header.sequence) == (FrameKind.PULL, 7)
    assert content is not None
    assert content.tolist() == [[0, PAGE_SIZE_BYTES]]


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_a_welcome_may_come_in_pieces(tmp_path: Path, secure: bool) -> None:
    pieces = [WELCOME[:3], WELCOME[3:-1], WELCOME[-1:] + PULL[:5], PULL[5:]]
    with answered(tmp_path, pieces, secure=secure) as sock:
        assert PageSocket(sock, SHAPES, SILENCE_S).receive()[0].kind is FrameKind.PULL


def test_a_refusal_says_why(tmp_path: Path) -> None:
    refusal = wire.encode_frame(wire.FrameKind.HELLO, StreamWelcome(refusal="another migration"))
    with (
        pytest.raises(StreamRefusedError, match="another migration"),
        answered(tmp_path, [refusal], secure=False),
    ):
        pass
