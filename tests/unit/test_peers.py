"""The agents' protocol over real sockets on loopback: calls, and connections that fail."""

from __future__ import annotations

import asyncio

import pytest

from migrator.errors import (
    FerryError,
    InvalidRequest,
    LocalProtocolError,
    NotFoundError,
    PeerError,
    RefusedError,
    RemoteProtocolError,
    StorageError,
)
from migrator.wire import FrameKind, encode_frame
from node_agent.peers import PeerHub, messages
from node_agent.peers.link import IN_FLIGHT_LIMIT
from tests.unit.peers_world import FAST, LOOPBACK, N1, N2, N3, Text, until, world

# --- calls -----------------------------------------------------------------------------------


async def test_calls_both_ways_and_to_oneself() -> None:
    async with world() as w:
        w.one.handle("add", tuple[int, int], lambda _, pair: _add(pair))
        assert await w.one.call(N2, "echo", Text("hi"), Text) == Text("n1 said hi")
        assert await w.two.call(N1, "add", (2, 3), int) == 5
        assert await w.two.call(N2, "echo", Text("me"), Text) == Text("n2 said me")
        assert await w.one.call(N1, "add", (1, 1), int) == 2


async def _add(pair: tuple[int, int]) -> int:
    return sum(pair)


@pytest.mark.parametrize("caller", ["remote", "local"])
async def test_errors_come_back_with_their_type(caller: str) -> None:
    async with world() as w:
        hub = w.one if caller == "remote" else w.two
        with pytest.raises(RefusedError) as refused:
            await hub.call(N2, "fail", Text("refused"), int)
        assert refused.value.reasons == ("memory", "cpu")
        with pytest.raises(InvalidRequest) as invalid:
            await hub.call(N2, "fail", Text("invalid"), int)
        assert invalid.value.fields == {"a.b": "a number"}
        with pytest.raises(NotFoundError, match="no such domain"):
            await hub.call(N2, "fail", Text("not-found"), int)
        with pytest.raises(StorageError):
            await hub.call(N2, "fail", Text("fence"), int)
        with pytest.raises(FerryError, match="n2 failed in fail: ZeroDivisionError: oops"):
            await hub.call(N2, "fail", Text("bug"), int)
        with pytest.raises(RemoteProtocolError, match="does not know the method nothing"):
            await hub.call(N2, "nothing", None, int)
        with pytest.raises(InvalidRequest, match="params of echo are wrong"):
            await hub.call(N2, "echo", 7, Text)
        with pytest.raises(RemoteProtocolError, match="answer of n2 to echo"):
            await hub.call(N2, "echo", Text("x"), int)
        assert await hub.call(N2, "echo", Text("still here"), Text)


async def test_caps_fail_one_call_and_not_the_connection() -> None:
    async with world() as w:
        with pytest.raises(LocalProtocolError, match="above the cap"):
            await w.one.call(N2, "echo", Text("x" * 1024 * 1024), Text)
        with pytest.raises(FerryError, match="larger than"):
            await w.one.call(N2, "large", 16 * 1024 * 1024, bytes)
        assert len(await w.one.call(N2, "large", 8 * 1024 * 1024, bytes)) == 8 * 1024 * 1024


async def test_notices_arrive() -> None:
    async with world() as w:
        await w.one.notify(N2, "echo", Text("note"))
        await w.two.notify(N2, "echo", Text("self"))
        async with asyncio.timeout(30):
            seen = {await w.noticed.get(), await w.noticed.get()}
        assert seen == {("n1", "note"), ("n2", "self")}
        await w.one.notify(N2, "nothing", None)  # Logged there; the connection goes on.
        assert await w.one.call(N2, "echo", Text("hi"), Text)


async def test_a_late_answer_is_a_peer_error_and_ends_the_handler() -> None:
    async with world() as w:
        await w.one.call(N2, "echo", Text("connected"), Text)
        with pytest.raises(PeerError, match="whether it was carried out is unknown"):
            await w.one.call(N2, "hang", Text(""), Text, timeout_s=0.05)
        await until(lambda: w.running == 0 and w.cancelled == 1)
        with pytest.raises(PeerError, match="gave hang up"):
            await w.two.call(N2, "hang", Text(""), Text, timeout_s=0.05)


async def test_a_cancelled_call_ends_the_handler() -> None:
    async with world() as w:
        call = asyncio.create_task(w.one.call(N2, "hang", Text(""), Text))
        await until(lambda: w.running == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: w.running == 0 and w.cancelled == 1)


async def test_calls_in_flight_are_bounded_and_the_rest_waits() -> None:
    async with world() as w:
        calls = [
            asyncio.create_task(w.one.call(N2, "hang", Text(str(n)), Text)) for n in range(100)
        ]
        await until(lambda: w.running == IN_FLIGHT_LIMIT)
        await asyncio.sleep(1.3 * FAST.silence_s)  # Keepalive isn't behind them.
        assert w.running == IN_FLIGHT_LIMIT
        w.release.set()
        assert await asyncio.gather(*calls) == [Text(str(n)) for n in range(100)]
        assert w.running_most == IN_FLIGHT_LIMIT


async def test_a_method_has_one_handler() -> None:
    async with world() as w:
        with pytest.raises(LocalProtocolError):
            w.two.handle("echo", Text, w.echo)


# --- connections -----------------------------------------------------------------------------


async def test_unreachable_and_unknown_peers() -> None:
    async with world() as w:
        with pytest.raises(PeerError, match="not a known peer"):
            await w.one.call(N3, "echo", Text(""), Text)
        await w.two.close()
        with pytest.raises(PeerError, match=r"can't be reached at 127\.0\.0\.1.*nothing was sent"):
            await w.one.call(N2, "echo", Text(""), Text)


async def test_disconnect_in_flight_and_reconnect() -> None:
    async with world() as w:
        changes: list[tuple[str, bool]] = []
        undo = w.one.on_peer_change(lambda node, connected: changes.append((node, connected)))
        call = asyncio.create_task(w.one.call(N2, "hang", Text(""), Text))
        await until(lambda: w.running == 1)
        for inbound in list(w.two._inbound):
            assert inbound.connection is not None
            inbound.connection.abort("test")
        with pytest.raises(PeerError, match=r"lost .* before it answered hang; .* unknown"):
            await call
        await until(lambda: w.running == 0)
        assert await w.one.call(N2, "echo", Text("again"), Text)
        assert changes == [(N2, True), (N2, False), (N2, True)]
        undo()


async def test_a_restarted_peer_is_found_again() -> None:
    async with world() as w:
        await w.one.call(N2, "echo", Text("1"), Text)
        address = w.two.address
        await w.two.close()
        for _ in range(5):
            with pytest.raises(PeerError):
                await w.one.call(N2, "echo", Text("2"), Text)
        again = PeerHub(N2, address, {N1: w.one.address}, "1.1", timing=FAST)
        again.handle("echo", Text, w.echo)
        await again.start()
        try:
            assert await w.one.call(N2, "echo", Text("3"), Text) == Text("n1 said 3")
        finally:
            await again.close()


async def test_closing_fails_calls_in_flight() -> None:
    async with world() as w:
        call = asyncio.create_task(w.one.call(N2, "hang", Text(""), Text))
        await until(lambda: w.running == 1)
        await w.one.close()
        with pytest.raises(PeerError, match="shutting down"):
            await call
        with pytest.raises(PeerError, match="shutting down"):
            await w.one.call(N2, "echo", Text(""), Text)
        await w.one.close()


async def test_peers_come_and_go() -> None:
    async with world() as w:
        await w.one.call(N2, "echo", Text("1"), Text)
        w.two.set_peers({})
        with pytest.raises(PeerError, match="n2 does not know"):
            await until_refused(w.one)
        w.two.set_peers({N1: w.one.address})
        assert await w.one.call(N2, "echo", Text("2"), Text)
        w.one.set_peers({})
        with pytest.raises(PeerError, match="not a known peer"):
            await w.one.call(N2, "echo", Text("3"), Text)


async def until_refused(hub: PeerHub) -> None:
    """Call until it fails; the refusal may arrive after the first call was sent."""
    for _ in range(10):
        try:
            await hub.call(N2, "echo", Text(""), Text, timeout_s=1)
        except PeerError as error:
            if "does not know" in str(error):
                raise


async def test_another_node_at_the_address_is_refused() -> None:
    async with world() as w:
        w.one.set_peers({N3: w.two.address})
        w.two.set_peers({N1: w.one.address})
        with pytest.raises(PeerError, match="n2 is at the address that n3 should be"):
            await w.one.call(N3, "echo", Text(""), Text)


async def test_keepalive_measures_and_survives_idleness() -> None:
    async with world() as w:
        assert w.one.round_trip_ms(N2) is None
        await w.one.call(N2, "echo", Text(""), Text)
        changes: list[bool] = []
        w.one.on_peer_change(lambda _, connected: changes.append(connected))
        await asyncio.sleep(2 * FAST.silence_s)
        assert changes == []
        round_trip_ms = w.one.round_trip_ms(N2)
        assert round_trip_ms is not None and 0 < round_trip_ms < 1000 * FAST.silence_s


async def test_a_peer_that_falls_silent_is_lost() -> None:
    """Half open: it took the connection and greeted, and then nothing comes any more."""

    async def greet_then_hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = messages.Hello(version=1, node="n3", agent_version="1")
        writer.write(encode_frame(FrameKind.HELLO, hello))
        while await reader.read(4096):
            pass
        writer.close()

    server = await asyncio.start_server(greet_then_hang, *LOOPBACK)
    async with world() as w:
        w.one.set_peers({N3: server.sockets[0].getsockname()[:2]})
        with pytest.raises(PeerError, match="silent"):  # That, and not the call's own bound.
            await w.one.call(N3, "echo", Text(""), Text)
    server.close()
    await server.wait_closed()


async def test_a_peer_that_never_greets_is_given_up() -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            pass
        writer.close()

    server = await asyncio.start_server(hang, *LOOPBACK)
    async with world() as w:
        w.one.set_peers({N3: server.sockets[0].getsockname()[:2]})
        with pytest.raises(PeerError, match=r"no HELLO.*nothing was sent"):
            await w.one.call(N3, "echo", Text(""), Text)
        with pytest.raises(PeerError, match="nothing was sent"):
            await w.one.call(N3, "echo", Text(""), Text, timeout_s=0.05)
    server.close()
    await server.wait_closed()
