"""What each fabric driver finds out about a migration's tunnel before it sends frames by it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from migrator.model import DomainName, NicSpec
from migrator.ports import TunnelReport
from netfabric import tunnel_tests
from netfabric.drivers import DRIVERS
from netfabric.frames import ethernet, parse_mac
from netfabric.taps import VNET_HEADER_BYTES
from tests.contract.fabric_worlds import eventually
from tests.contract.namespaces import run_in_world
from tests.contract.two_nodes import Pair, two_nodes

WEB = DomainName("web")
NIC = NicSpec(mac="52:54:00:aa:bb:cc", bridge="br0", addresses=("10.0.0.5",))
BOTH = TunnelReport(short=True, full=True)
KERNEL = [
    pytest.param(name, marks=pytest.mark.lab) for name in ("bridge", "macvtap", "routed", "vxlan")
]
IN_FRAGMENTS = KERNEL[:-1]
"""What carries a VXLAN's full frames carries the tunnel's, whose headers are the same."""
PAYLOAD = b"what is for the guest"


def with_nodes(driver: str, body: Callable[[Pair], Awaitable[None]]) -> None:
    run_in_world(lambda: two_nodes(driver), body)


def send_to_guest(driver: str) -> None:
    """As somebody beyond the near node's uplink; where it has none, the node itself."""
    if driver == "routed":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(PAYLOAD, (NIC.addresses[0], 9))
        return
    frame = ethernet(parse_mac(NIC.mac), b"\x52\x54\0\0\0\x01", 0x88B6, PAYLOAD)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        sender.sendto(frame, ("br0" if driver == "vxlan" else "up1", 0))


@contextlib.asynccontextmanager
async def on_its_way(pair: Pair) -> AsyncIterator[int]:
    """A guest plugged at both nodes, both ends of its tunnel made; the far tap's descriptor."""
    near_fd = await pair.near.plug(WEB, 0, NIC)
    far_fd = await pair.there(lambda: pair.far.plug(WEB, 0, NIC))
    try:
        await pair.near.prepare_departure(WEB, [NIC], pair.out)
        await pair.there(lambda: pair.far.prepare_arrival(WEB, [NIC], pair.back))
        yield far_fd
        await pair.near.reopen(WEB, [NIC])
        await pair.there(lambda: pair.far.end_arrival(WEB))
    finally:
        os.close(near_fd)
        os.close(far_fd)


async def heard(pair: Pair) -> TunnelReport:
    (report,) = await pair.there(lambda: pair.far.heard_through(WEB, [NIC]))
    return report


def lengths_in(frames: list[bytes]) -> list[int]:
    return [found for found in map(tunnel_tests.length_in, frames) if found is not None]


def frames_in(fd: int) -> list[bytes]:
    frames: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while True:
            frames.append(os.read(fd, 4096)[VNET_HEADER_BYTES:])
    return frames


@pytest.mark.parametrize("driver", ["simulated", *KERNEL])
def test_test_frames_come_out_at_the_other_end(driver: str) -> None:
    assert driver in DRIVERS

    async def body(pair: Pair) -> None:
        async with on_its_way(pair):
            assert await heard(pair) == TunnelReport(), "nothing was sent yet"
            assert list(await pair.near.send_through(WEB, [NIC])) == [True]

            async def came() -> bool:
                return await heard(pair) == BOTH

            await eventually(came)
            for _ in range(5):
                await pair.near.send_through(WEB, [NIC])
            assert await pair.near.end_departure(WEB) < 10, "they don't count as forwarded"

    with_nodes(driver, body)


@pytest.mark.parametrize("driver", ["simulated", *KERNEL])
def test_where_an_end_is_missing_it_is_told(driver: str) -> None:
    async def body(pair: Pair) -> None:
        assert list(await pair.near.send_through(WEB, [NIC])) == [False]
        assert await heard(pair) == TunnelReport(made=False)

    with_nodes(driver, body)


@pytest.mark.parametrize("driver", KERNEL)
def test_test_frames_reach_no_guest_and_no_network(driver: str) -> None:
    async def body(pair: Pair) -> None:
        async with on_its_way(pair) as fd:
            outside = await pair.listen()
            with outside:
                await pair.near.send_through(WEB, [NIC])

                async def came() -> bool:
                    return await heard(pair) == BOTH

                await eventually(came)
                await pair.there(lambda: pair.far.open_arrival(WEB))
                left: list[bytes] = []
                with contextlib.suppress(BlockingIOError):
                    while True:
                        left.append(outside.recv(4096))
                assert lengths_in(left) == []
                assert lengths_in(frames_in(fd)) == []

    with_nodes(driver, body)


@pytest.mark.parametrize("driver", KERNEL)
def test_a_firewall_between_the_nodes_is_found(driver: str) -> None:
    async def body(pair: Pair) -> None:
        await pair.filter("input priority 0", "udp dport 7782 counter drop")
        async with on_its_way(pair):
            assert list(await pair.near.send_through(WEB, [NIC])) == [True]

            async def dropped() -> bool:
                return await pair.dropped() >= 2

            await eventually(dropped)
            assert await heard(pair) == TunnelReport()

    with_nodes(driver, body)


@pytest.mark.parametrize("driver", IN_FRAGMENTS)
def test_a_firewall_that_drops_fragments_lets_the_short_one_pass(driver: str) -> None:
    async def body(pair: Pair) -> None:
        await pair.filter("prerouting priority -450", "ip frag-off & 0x3fff != 0 counter drop")
        async with on_its_way(pair):
            await pair.near.send_through(WEB, [NIC])

            async def as_expected() -> bool:
                return await pair.dropped() >= 2 and (await heard(pair)).short

            await eventually(as_expected)
            assert await heard(pair) == TunnelReport(short=True, full=False)

    with_nodes(driver, body)


@pytest.mark.parametrize("driver", ["bridge", "macvtap", "routed", "vxlan"])
@pytest.mark.lab
def test_without_a_tunnel_a_guest_is_sent_its_frames_until_the_pause(driver: str) -> None:
    async def body(pair: Pair) -> None:
        fd = await pair.near.plug(WEB, 0, NIC)
        try:
            await pair.near.announce(WEB, [NIC])
            await pair.near.announce(WEB, ())
            await pair.near.prepare_departure(WEB, [NIC], pair.out)
            await pair.near.divert(WEB, {0})
            await asyncio.to_thread(send_to_guest, driver)

            async def arrived() -> bool:
                return any(PAYLOAD in frame for frame in frames_in(fd))

            await eventually(arrived)
            await pair.near.shut(WEB)
            await pair.near.reopen(WEB, [NIC])
            await asyncio.to_thread(send_to_guest, driver)
            await eventually(arrived)
        finally:
            os.close(fd)

    with_nodes(driver, body)
