"""What every fabric driver keeps to, and what only the kernel's bridge can show."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from pyroute2 import IPRoute

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec
from netfabric.bridge import BridgeFabric, announcing, list_taps
from netfabric.drivers import DRIVERS
from netfabric.frames import announcements
from netfabric.taps import TAP_NAME, host_side_mac, tap_name
from tests.contract.fabric_worlds import (
    GAPS_S,
    Body,
    BridgeWorld,
    World,
    eventually,
    learnt,
    run_bridge,
    run_macvtap,
    run_simulated,
    run_vxlan,
)
from tests.contract.moving_guest import guest_frames
from tests.contract.routed_world import run_routed

WEB = DomainName("web")
NIC = NicSpec(mac="52:54:00:aa:bb:cc", bridge="br0", addresses=("10.0.0.5", "2001:db8::5"))
BARE = NicSpec(mac="52:54:00:aa:bb:dd", bridge="br0")
Run = Callable[[Body], None]


@pytest.fixture(
    params=[
        "simulated",
        pytest.param("bridge", marks=pytest.mark.lab),
        pytest.param("vxlan", marks=pytest.mark.lab),
        pytest.param("routed", marks=pytest.mark.lab),
        pytest.param("macvtap", marks=pytest.mark.lab),
    ]
)
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a test's body in the world of one driver."""
    runs: dict[str, Run] = {
        "simulated": run_simulated,
        "bridge": run_bridge,
        "vxlan": run_vxlan,
        "routed": run_routed,
        "macvtap": run_macvtap,
    }
    assert set(runs) == set(DRIVERS)
    return runs[request.param]


def test_check_finds_nothing_wrong(run: Run) -> None:
    async def body(world: World) -> None:
        assert list(await world.fabric.check(NIC)) == []

    run(body)


def test_check_gives_every_reason(run: Run) -> None:
    async def body(world: World) -> None:
        multicast = world.fit(NicSpec(mac="01:00:5e:00:00:01", bridge="br0", mtu_bytes=9000))
        assert len(await world.fabric.check(multicast)) == 2
        missing = NicSpec(mac=NIC.mac, bridge="br9", addresses=("nonsense",))
        reasons = await world.fabric.check(missing)
        assert len(reasons) == 2
        assert any("br9" in reason for reason in reasons)

    run(body)


def test_what_check_refuses_plug_refuses(run: Run) -> None:
    async def body(world: World) -> None:
        for nic in (
            NicSpec(mac=NIC.mac, bridge="br9"),
            world.fit(NicSpec(mac=NIC.mac, bridge="br0", mtu_bytes=9000)),
            NicSpec(mac="ff:ff:ff:ff:ff:ff", bridge="br0"),
        ):
            with pytest.raises(FabricError):
                await world.fabric.plug(WEB, 0, nic)
        with pytest.raises(FabricError):
            await world.fabric.plug(WEB, 100, NIC)
        assert await world.taps() == 0

    run(body)


def test_a_tap_dies_with_its_hypervisor(run: Run) -> None:
    async def body(world: World) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        assert not os.get_inheritable(fd)
        assert await world.taps() == 1
        world.hypervisor_died(WEB, [fd])

        async def gone() -> bool:
            return await world.taps() == 0

        await eventually(gone)
        os.close(await world.fabric.plug(WEB, 0, NIC))

    run(body)


def test_unplug_removes_the_tap_and_is_idempotent(run: Run) -> None:
    async def body(world: World) -> None:
        nics = (NIC, world.fit(BARE))
        fds = [await world.fabric.plug(WEB, index, nic) for index, nic in enumerate(nics)]
        try:
            await world.fabric.unplug(WEB, 0)
            assert await world.taps() == 1
            await world.fabric.unplug(WEB, 0)
            await world.fabric.unplug(WEB, 1)
            assert await world.taps() == 0
            await world.fabric.unplug(DomainName("never"), 0)
        finally:
            for fd in fds:
                os.close(fd)

    run(body)


def test_an_announcement_moves_the_guest_here_before_it_returns(run: Run) -> None:
    async def body(world: World) -> None:
        nics = (NIC, world.fit(BARE))
        fds = [await world.fabric.plug(WEB, index, nic) for index, nic in enumerate(nics)]
        try:
            for nic in nics:
                await world.move_away(nic.mac)
                assert not await world.is_here(nic.mac)
            before = {nic.mac: len(await world.heard(nic.mac)) for nic in nics}
            await world.fabric.announce(WEB, nics)
            for nic in nics:
                assert await world.is_here(nic.mac)
                expected = list(world.round_of(nic))
                heard = (await world.heard(nic.mac))[before[nic.mac] :]
                assert list(heard[: len(expected)]) == expected
        finally:
            for fd in fds:
                os.close(fd)

    run(body)


def test_announcements_are_repeated_and_end(run: Run) -> None:
    async def body(world: World) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            await world.fabric.announce(WEB, [NIC])
            total = len(world.round_of(NIC)) * (1 + len(GAPS_S))

            async def complete() -> bool:
                return len(await world.heard(NIC.mac)) == total

            await eventually(complete)
            await asyncio.sleep(2 * max(GAPS_S))
            assert len(await world.heard(NIC.mac)) == total
        finally:
            os.close(fd)

    run(body)


@pytest.mark.parametrize("how", ["close", "unplug", "announce nothing"])
def test_repeats_can_be_ended(run: Run, how: str) -> None:
    async def body(world: World) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            await world.fabric.announce(WEB, [NIC])
            if how == "close":
                await world.fabric.close()
            elif how == "unplug":
                await world.fabric.unplug(WEB, 0)
            else:
                await world.fabric.announce(WEB, ())
            heard = len(await world.heard(NIC.mac))
            await asyncio.sleep(2 * sum(GAPS_S))
            assert len(await world.heard(NIC.mac)) == heard
            assert [task for task in asyncio.all_tasks() if "announce" in task.get_name()] == []
        finally:
            os.close(fd)

    run(body)


def test_a_second_announcement_replaces_the_first(run: Run) -> None:
    async def body(world: World) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            for _ in range(3):
                await world.fabric.announce(WEB, [NIC])
            running = [task for task in asyncio.all_tasks() if "announce" in task.get_name()]
            assert len(running) == 1
        finally:
            os.close(fd)

    run(body)


def test_a_nic_that_is_not_plugged_is_not_announced(run: Run) -> None:
    async def body(world: World) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            with pytest.raises(FabricError, match=BARE.mac):
                await world.fabric.announce(WEB, [NIC, world.fit(BARE)])
            assert await world.is_here(NIC.mac), "the NIC that is here is announced nevertheless"
            assert list(await world.heard(BARE.mac)) == []
        finally:
            os.close(fd)

    run(body)


# --- the kernel's bridge alone ---------------------------------------------------------------


@pytest.mark.lab
def test_other_guests_hear_an_announcement_and_its_own_does_not() -> None:
    async def body(world: BridgeWorld) -> None:
        own = await world.fabric.plug(WEB, 0, NIC)
        other = await world.fabric.plug(DomainName("db"), 0, BARE)
        try:
            await world.fabric.announce(WEB, [NIC])
            source = bytes.fromhex(NIC.mac.replace(":", ""))
            heard = [frame for frame in guest_frames(other) if frame[6:12] == source]
            assert heard[: len(announcements(NIC))] == list(announcements(NIC))
            assert [frame for frame in guest_frames(own) if frame[6:12] == source] == []
        finally:
            os.close(own)
            os.close(other)

    run_bridge(body)


@pytest.mark.lab
def test_a_restarted_agent_announces_a_tap_that_it_did_not_plug() -> None:
    async def body(world: BridgeWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        successor = BridgeFabric(gaps_s=())
        try:
            await world.move_away(NIC.mac)
            await successor.announce(WEB, [NIC])
            assert await world.is_here(NIC.mac)
        finally:
            await successor.close()
            os.close(fd)

    run_bridge(body)


@pytest.mark.lab
def test_an_announced_guest_that_moves_on_is_learnt_elsewhere() -> None:
    async def body(world: BridgeWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            await world.fabric.announce(WEB, [NIC])
            await world.fabric.announce(WEB, ())
            await world.move_away(NIC.mac)
            assert await learnt(NIC.mac) == {"br0": "up0", "sw0": "far0"}
        finally:
            os.close(fd)

    run_bridge(body)


@pytest.mark.lab
def test_a_tap_leaves_its_bridge_as_it_was() -> None:
    """Neither the bridge's MTU nor its MAC follows a guest that comes and goes."""

    async def body(world: BridgeWorld) -> None:
        def bridge() -> tuple[int, str]:
            with IPRoute() as route:
                for name in ("up0", "up1", "sw0"):
                    route.link("set", index=route.link_lookup(ifname=name)[0], mtu=9000)
                (link,) = route.link("get", ifname="br0")
                return link.get_attr("IFLA_MTU"), link.get_attr("IFLA_ADDRESS")

        before = await asyncio.to_thread(bridge)
        assert before[0] == 9000
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            assert await asyncio.to_thread(bridge) == before
            assert list(await list_taps()) != []
            assert (await list_taps())[0].bridge == "br0"
            with pytest.raises(FabricError, match="holds it"):
                await world.fabric.plug(WEB, 0, NIC)
        finally:
            os.close(fd)
        assert await asyncio.to_thread(bridge) == before

    run_bridge(body)


@pytest.mark.lab
def test_a_bridge_that_is_down_or_no_bridge_is_refused() -> None:
    async def body(world: BridgeWorld) -> None:
        def down() -> None:
            with IPRoute() as route:
                route.link("set", index=route.link_lookup(ifname="br0")[0], state="down")

        await asyncio.to_thread(down)
        assert any("down" in reason for reason in await world.fabric.check(NIC))
        veth = NicSpec(mac=NIC.mac, bridge="up0")
        assert any("not a bridge" in reason for reason in await world.fabric.check(veth))

    run_bridge(body)


@pytest.mark.lab
def test_a_cancelled_plug_leaves_no_tap() -> None:
    async def body(world: BridgeWorld) -> None:
        def descriptors() -> int:
            return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

        before = descriptors()
        for delay_s in (0.0, 0.001, 0.003, 0.006, 0.01):
            plugging = asyncio.create_task(world.fabric.plug(WEB, 0, NIC))
            await asyncio.sleep(delay_s)
            if plugging.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await plugging
            else:
                os.close(plugging.result())

            async def gone() -> bool:
                return await world.taps() == 0 and descriptors() == before

            await eventually(gone)

    run_bridge(body)


@pytest.mark.lab
def test_the_first_frames_are_on_the_far_wire_before_anything_is_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the kernel's stamps, which are made within the call that sends. How fast is a bench's."""
    look_up, looked_up_ns = announcing.first_round, list[int]()

    def first_round(*given: Any) -> None:
        looked_up_ns.append(time.time_ns())
        look_up(*given)

    monkeypatch.setattr(announcing, "first_round", first_round)

    async def body(world: BridgeWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            for _ in range(5):
                world.arrivals(NIC.mac)
                world.frames.clear()
                looked_up_ns.clear()
                asked_ns = time.time_ns()
                await world.fabric.announce(WEB, [NIC])
                await world.fabric.announce(WEB, ())
                first = world.arrivals(NIC.mac)[: len(announcements(NIC))]
                assert [frame for _, frame in first] == list(announcements(NIC))
                assert all(asked_ns <= at_ns <= looked_up_ns[0] for at_ns, _ in first)
        finally:
            os.close(fd)

    run_bridge(body)


@pytest.mark.lab
def test_a_tap_is_what_qemu_expects() -> None:
    async def body(world: BridgeWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            request = fcntl.ioctl(fd, 0x800454D2, bytes(40))  # TUNGETIFF, as QEMU probes it
            assert request[:16].rstrip(b"\x00").decode() == tap_name(WEB, 0)
            flags = int.from_bytes(request[16:18], "little")
            assert flags & 0x0002, "IFF_TAP"
            assert flags & 0x4000, "IFF_VNET_HDR"
            assert not flags & 0x0800, "IFF_PERSIST"
        finally:
            os.close(fd)

    run_bridge(body)


# --- pure parts of the bridge driver ---------------------------------------------------------


def test_tap_names_are_stable_short_and_distinct() -> None:
    names = {tap_name(DomainName(f"d{n}"), index) for n in range(500) for index in (0, 9, 99)}
    assert len(names) == 1500
    assert all(len(name) <= 15 and TAP_NAME.fullmatch(name) for name in names)
    assert tap_name(DomainName("vm1"), 0) == "fy397b6948ecn0"


def test_a_taps_own_mac_differs_from_the_guests() -> None:
    for first in ("52", "fe", "fa"):
        assert host_side_mac(mac := bytes.fromhex(f"{first}5400aabbcc")) != mac
        assert not host_side_mac(mac)[0] & 1
