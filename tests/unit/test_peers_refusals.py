"""The agents' protocol over real sockets: what we don't accept is told why and breaks nothing."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time

import msgspec
import pytest

from migrator.errors import (
    ConflictError,
    FerryError,
    PeerError,
)
from migrator.wire import Frame, FrameDecoder, FrameKind, encode_frame
from node_agent.peers import PeerHub, messages
from node_agent.peers.connection import Timing
from tests.unit.peers_world import LOOPBACK, N2, N3, Text, until, world

# --- what we don't accept --------------------------------------------------------------------

HELLO = encode_frame(FrameKind.HELLO, messages.Hello(version=1, node="n1", agent_version="1"))


def hello(**changes: object) -> bytes:
    fields = {"version": 1, "node": "n1", "agent_version": "1"} | changes
    return encode_frame(FrameKind.HELLO, fields)


def request(**changes: object) -> bytes:
    fields = {"id": 1, "method": "echo", "params": b"", "timeout_s": 1.0} | changes
    return encode_frame(FrameKind.REQUEST, fields)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "not a Ferry frame"),
        (bytes(100), "not a Ferry frame"),
        (b"FY\x02\x01\x00\x00\x00\x00", "frame version 2 is unknown"),
        (b"FY\x01\x63\x00\x00\x00\x00", "frame kind 99 is unknown"),
        (b"FY\x01\x01\x00\xff\x00\x00", "above the cap"),
        (hello(version=2, news="field"), "speaks version 2"),
        (hello(node="n9"), "does not know a node 'n9'"),
        (hello(node="n2"), "two agents have one name"),
        (hello(node=7), "malformed hello frame"),
        (request(), "first frame must be a hello"),
        (HELLO + HELLO, "unexpected hello frame"),
        (HELLO + encode_frame(FrameKind.ENGINE, b""), "unexpected engine frame"),
        (HELLO + request(id="x"), "malformed request frame"),
        (HELLO + request(id=0), "asked twice"),
        (HELLO + encode_frame(FrameKind.RESPONSE, {"id": 5}), "nothing was asked"),
        (HELLO + encode_frame(FrameKind.NOTICE, [1]), "malformed notice frame"),
        (HELLO + b"FY\x01\x02\x00\x10\x00\x01", "above the cap"),
        (
            HELLO + b"FY\x01\x02\x00\x00\x80\x00" + b"\x81\xa1x" + b"\x91" * 32765,
            "nested|malformed",
        ),
        (HELLO + b"FY\x01\x02\x00\x00\x00\x03\x81\xa1\x80", "malformed request frame"),
        (b"", "no HELLO within"),
        (HELLO[:10], "no HELLO within"),
    ],
)
async def test_what_we_do_not_accept_is_told_why_and_breaks_nothing_else(
    data: bytes, reason: str
) -> None:
    async with world() as w:
        await w.one.call(N2, "echo", Text("before"), Text)
        reader, writer = await asyncio.open_connection(*w.two.address)
        writer.write(data)
        async with asyncio.timeout(30):
            answer = await reader.read()
        last = FrameDecoder().feed(answer)[-1].decode(messages.notice_decoder)
        assert last.method == messages.REFUSED
        refused = messages.unpack(last.params, messages.RefusedParams, "")
        assert any(part in refused.reason for part in reason.split("|"))
        writer.close()
        await writer.wait_closed()
        assert await w.one.call(N2, "echo", Text("after"), Text)


async def test_a_caller_hears_of_a_version_mismatch() -> None:
    async with world() as w:
        link = w.one._links[N2]
        link._hello = msgspec.structs.replace(link._hello, version=9)
        with pytest.raises(PeerError, match=r"it refused: n1 .* speaks version 9"):
            await w.one.call(N2, "echo", Text(""), Text)


async def test_more_requests_than_allowed_are_refused_one_by_one() -> None:
    async with world() as w:
        reader, writer = await asyncio.open_connection(*w.two.address)
        hang = messages.pack(Text(""))
        writer.write(HELLO)
        for number in range(1, 71):
            writer.write(request(id=number, method="hang", params=hang, timeout_s=1.0))
        await until(lambda: w.running == 64)
        decoder = FrameDecoder()
        frames: list[Frame] = []
        async with asyncio.timeout(30):
            while len(frames) < 1 + 6:
                frames += decoder.feed(await reader.read(4096))
        errors = [frame.decode(messages.response_decoder).error for frame in frames[1:]]
        assert all(error is not None and "calls are running" in error.message for error in errors)
        writer.close()
        await writer.wait_closed()
        await until(lambda: w.running == 0 and w.cancelled == 64)


async def test_a_silent_client_is_dropped_and_its_handlers_end() -> None:
    async with world() as w:
        reader, writer = await asyncio.open_connection(*w.two.address)
        writer.write(HELLO + request(method="hang", params=messages.pack(Text("")), timeout_s=60.0))
        await until(lambda: w.running == 1)
        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(30):
                while await reader.read(4096):
                    pass
        await until(lambda: w.running == 0 and not w.two._inbound)
        writer.close()


async def test_a_peers_bad_answer_ends_that_connection_only() -> None:
    async def misbehave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        greeting = messages.Hello(version=1, node="n3", agent_version="1")
        writer.write(encode_frame(FrameKind.HELLO, greeting) + request())
        while await reader.read(4096):
            pass
        writer.close()

    server = await asyncio.start_server(misbehave, *LOOPBACK)
    async with world() as w:
        w.one.set_peers({N2: w.two.address, N3: server.sockets[0].getsockname()[:2]})
        with pytest.raises(PeerError, match="a request came from the listening side"):
            await w.one.call(N3, "echo", Text(""), Text)
        assert await w.one.call(N2, "echo", Text(""), Text)
    server.close()
    await server.wait_closed()


async def test_listening_on_a_taken_port_says_so() -> None:
    async with world() as w:
        with pytest.raises(PeerError, match="can't listen on"):
            await PeerHub(N3, w.one.address, {}, "1").start()


async def test_unrelated_error_types_stay_in_the_tree() -> None:
    failure = messages.Failure(code="from-the-future", message="x")
    assert type(messages.from_failure(failure)) is FerryError
    assert type(messages.from_failure(messages.to_failure(ConflictError("x")))) is ConflictError


async def test_a_round_trip_waits_for_nothing_but_the_network() -> None:
    """Beside bare streams in the same run. Measured: 0.2 ms against 0.07."""

    async def repeat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(data)
        writer.close()
        await writer.wait_closed()
        over.set()

    over = asyncio.Event()
    server = await asyncio.start_server(repeat, *LOOPBACK)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
    bare_s, took_s = [], []
    async with world(Timing()) as w:
        for _ in range(300):
            started_s = time.perf_counter()
            writer.write(b"hi")
            await reader.read(4096)
            between_s = time.perf_counter()
            await w.one.call(N2, "echo", Text("hi"), Text)
            bare_s.append(between_s - started_s)
            took_s.append(time.perf_counter() - between_s)
    writer.close()
    await writer.wait_closed()
    await over.wait()
    server.close()
    await server.wait_closed()
    assert statistics.median(took_s) < 20 * statistics.median(bare_s)
