"""Connection tracking that moves: the port's contract, and real connections through real rules."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from migrator.model import DomainName
from migrator.ports import Connection, TakenConnections
from netfabric import filters
from netfabric.connections import messages, tracker
from netfabric.netlink_format import attribute
from node_agent.doctor import links
from node_agent.doctor.findings import Level
from node_agent.doctor.links import check_connection_tracking
from tests.contract.connection_worlds import (
    CLIENT,
    GUEST,
    GUEST6,
    Body,
    KernelWorld,
    SimulatedWorld,
    World,
    on_kernel,
)
from tests.contract.fabric_worlds import eventually

WEB = DomainName("web")


@pytest.fixture(params=["simulated", pytest.param("kernel", marks=pytest.mark.lab)])
def run(request: pytest.FixtureRequest) -> Callable[[Body], None]:
    def simulated(body: Body) -> None:
        async def inside() -> None:
            await body(SimulatedWorld())

        asyncio.run(inside())

    return simulated if request.param == "simulated" else on_kernel


def test_what_began_before_and_what_begins_later_is_taken_once(
    run: Callable[[Body], None],
) -> None:
    async def body(world: World) -> None:
        assert await world.tracker.take(WEB, [GUEST]) == TakenConnections()
        assert world.tracker.take_new(WEB) == TakenConnections()
        await world.connect()
        assert len((await world.tracker.take(WEB, [GUEST])).connections) == 1
        await world.connect()
        await world.connect("10.0.0.6")
        new = world.tracker.take_new(WEB)
        assert len(new.connections) == 1
        assert world.tracker.take_new(WEB) == TakenConnections()
        both = await world.tracker.take(WEB, [GUEST])
        assert len(both.connections) == 2
        assert both.translated == 0
        assert (await world.tracker.take(WEB, ["10.0.0.7"])).connections == ()

    run(body)


def test_what_passes_this_node_on_is_not_forgotten(run: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        await world.connect()
        assert await world.tracker.forget([GUEST], [CLIENT, GUEST]) == 0
        assert await world.tracker.forget([GUEST], [GUEST]) == 1
        assert await world.tracker.forget([GUEST], []) == 0

    run(body)


def test_connections_of_other_addresses_are_not_installed(run: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        await world.connect()
        taken = (await world.tracker.take(WEB, [GUEST])).connections
        await world.tracker.forget([GUEST], [])
        assert await world.tracker.install(taken, ["10.0.0.6"]) == 0
        assert (await world.tracker.take(WEB, [GUEST])).connections == ()
        assert await world.tracker.install(taken, [GUEST]) == 1
        assert await world.tracker.install(taken, [GUEST]) == 1, "again is no error"
        assert len((await world.tracker.take(WEB, [GUEST])).connections) == 1

    run(body)


@pytest.mark.lab
@pytest.mark.parametrize("version", [4, 6])
def test_a_connection_lives_on_where_it_was_told_and_is_cut_where_not(version: int) -> None:
    """What the node forgets it drops; what it is told it lets pass, both ways."""

    async def body(world: KernelWorld) -> None:
        address = GUEST if version == 4 else GUEST6
        await world.wait_links()
        near, far = await world.pair(await world.listen(version))
        far.settimeout(20.0)
        near.settimeout(20.0)
        taken = (await world.tracker.take(WEB, [address])).connections
        assert len(taken) == 1
        assert await world.tracker.forget([address], []) == 1
        before = await world.dropped()
        near.send(b"to the guest")

        async def cut() -> bool:
            return await world.dropped() > before

        await eventually(cut)
        assert await world.tracker.install(taken, [address]) == 1
        assert await asyncio.to_thread(far.recv, 100) == b"to the guest"  # sent again by TCP
        far.send(b"to the client")
        assert await asyncio.to_thread(near.recv, 100) == b"to the client"

    on_kernel(body)


def test_what_is_not_known_here_is_loosened_without_a_word(run: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        await world.connect()
        taken = (await world.tracker.take(WEB, [GUEST])).connections
        await world.tracker.loosen(taken)
        assert (await world.tracker.take(WEB, [GUEST])).connections != ()
        await world.tracker.forget([GUEST], [])
        await world.tracker.loosen(taken)
        assert (await world.tracker.take(WEB, [GUEST])).connections == ()

    run(body)


@pytest.mark.lab
def test_a_loosened_connection_is_checked_no_more_and_else_the_same() -> None:
    async def body(world: KernelWorld) -> None:
        near, far = await world.pair(await world.listen())
        (before,) = await asyncio.to_thread(as_others_read)
        await world.tracker.loosen((await world.tracker.take(WEB, [GUEST])).connections)
        (after,) = await asyncio.to_thread(as_others_read)
        was, now = tcp_of(before), tcp_of(after)
        for kind in ("CTA_PROTOINFO_TCP_FLAGS_ORIGINAL", "CTA_PROTOINFO_TCP_FLAGS_REPLY"):
            liberal = was.get_attr(kind)[0] | 0x8
            assert now.get_attr(kind)[0] == liberal, "IP_CT_TCP_FLAG_BE_LIBERAL"
        for kind in ("STATE", "WSCALE_ORIGINAL", "WSCALE_REPLY"):
            name = f"CTA_PROTOINFO_TCP_{kind}"
            assert now.get_attr(name) == was.get_attr(name)
        assert after.get_attr("CTA_STATUS") == before.get_attr("CTA_STATUS")
        near.send(b"to the guest")
        assert await asyncio.to_thread(far.recv, 100) == b"to the guest"

    on_kernel(body)


def tcp_of(entry: Any) -> Any:
    return entry.get_attr("CTA_PROTOINFO").get_attr("CTA_PROTOINFO_TCP")


@pytest.mark.lab
def test_of_many_connections_the_kernel_is_asked_by_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracker, "_FEW", 0)

    async def body(world: KernelWorld) -> None:
        for _ in range(3):
            await world.connect()
        both = [GUEST, GUEST6, CLIENT]
        assert len((await world.tracker.take(WEB, both)).connections) == 3
        assert len((await world.tracker.take(WEB, [CLIENT])).connections) == 3
        assert (await world.tracker.take(WEB, ["10.0.0.6", GUEST6])).connections == ()
        assert await world.tracker.forget([GUEST], []) == 3

    on_kernel(body)


@pytest.mark.lab
def test_a_handshake_under_way_counts_as_done() -> None:
    """Its end may pass the old node after it was asked, and before the pause."""

    async def body(world: KernelWorld) -> None:
        await world.tracker.take(WEB, [GUEST])
        await world.pair(await world.listen())
        taken = world.tracker.take_new(WEB).connections  # as it began: a SYN, unanswered
        assert len(taken) == 1
        await world.tracker.forget([GUEST], [])
        assert await world.tracker.install(taken, [GUEST]) == 1
        (told,) = await asyncio.to_thread(as_others_read)
        assert told.get_attr("CTA_STATUS") & 0x2, "answered"
        info = told.get_attr("CTA_PROTOINFO").get_attr("CTA_PROTOINFO_TCP")
        assert info.get_attr("CTA_PROTOINFO_TCP_STATE") == 3, "established"

    on_kernel(body)


@pytest.mark.lab
def test_another_library_reads_what_was_told() -> None:
    async def body(world: KernelWorld) -> None:
        near, _ = await world.pair(await world.listen())
        await asyncio.to_thread(
            filters.run, "add rule inet stateful forward ct mark set 77", "test"
        )
        (before,) = await asyncio.to_thread(as_others_read)
        taken = (await world.tracker.take(WEB, [GUEST])).connections
        await world.tracker.forget([GUEST], [])
        assert await asyncio.to_thread(as_others_read) == []
        await world.tracker.install(taken, [GUEST])
        (after,) = await asyncio.to_thread(as_others_read)
        for name in ("CTA_TUPLE_ORIG", "CTA_TUPLE_REPLY", "CTA_MARK"):
            assert str(after.get_attr(name)) == str(before.get_attr(name))
        assert abs(after.get_attr("CTA_TIMEOUT") - before.get_attr("CTA_TIMEOUT")) <= 5
        assert after.get_attr("CTA_STATUS") & 0x6 == 0x6, "answered, assured"
        assert str(near.getsockname()[1]) in str(after.get_attr("CTA_TUPLE_ORIG"))

    on_kernel(body)


def as_others_read() -> list[Any]:
    with NFCTSocket() as sock:
        return list(sock.dump())


@pytest.mark.lab
def test_the_doctor_says_whether_connections_can_move(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(world: KernelWorld) -> None:
        finding = await asyncio.to_thread(check_connection_tracking)
        assert finding.level is Level.OK, finding
        assert finding.detail.endswith("can move; 0 known now")
        missing = Path("/proc/sys/net/netfilter/no_such_thing")
        monkeypatch.setattr(links, "_CONNECTIONS", missing)
        assert "tracks no connections" in check_connection_tracking().detail

    on_kernel(body)


# --- pure parts ------------------------------------------------------------------------------


def tuple_of(source: str, destination: str, ports: tuple[int, int]) -> bytes:
    ip = attribute(1, socket.inet_aton(source)) + attribute(2, socket.inet_aton(destination))
    proto = attribute(1, b"\x06") + b"".join(
        attribute(kind, struct.pack("!H", port)) for kind, port in zip((2, 3), ports, strict=True)
    )
    return attribute(1 | 0x8000, ip) + attribute(2 | 0x8000, proto)


def entry_of(there: bytes, back: bytes) -> messages.Entry:
    payload = messages.generic(4) + attribute(1, there) + attribute(2, back)
    entry = messages.parse(payload + attribute(messages.TIMEOUT, bytes(4)))
    assert entry is not None
    return entry


def test_what_a_node_translates_is_counted_and_left() -> None:
    there = tuple_of(GUEST, "192.0.2.9", (1000, 80))
    plain = entry_of(there, tuple_of("192.0.2.9", GUEST, (80, 1000)))
    masked = entry_of(there, tuple_of("192.0.2.9", "192.0.2.1", (80, 1000)))
    other_port = entry_of(there, tuple_of("192.0.2.9", GUEST, (80, 1001)))
    assert [each.translated for each in (plain, masked, other_port)] == [False, True, True]
    taken = tracker._sorted([plain, masked, other_port])
    assert (len(taken.connections), taken.translated) == (1, 2)


@pytest.mark.parametrize("cut_bytes", range(0, 60, 7))
def test_what_is_cut_short_is_no_connection(cut_bytes: int) -> None:
    """Another node's word is checked before the kernel gets it."""
    whole = messages.told(
        entry_of(
            tuple_of(GUEST, CLIENT, (1000, 80)),
            tuple_of(CLIENT, GUEST, (80, 1000)),
        )
    )
    assert messages.received(whole) is not None
    cut = Connection(version=4, entry=whole.entry[:cut_bytes])
    assert messages.received(cut) is None
    assert messages.received(Connection(version=5, entry=whole.entry)) is None
