"""Two real engine processes between two real address spaces."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrator import wire
from migrator.engine import frames
from migrator.engine_messages import (
    ChannelBroken,
    ChannelRestored,
    Configured,
    Connect,
    Connected,
    EngineFailed,
    Listening,
    PassDone,
    RegionLayout,
    Report,
    RunPass,
    SetBandwidth,
    Stop,
    Stopped,
)
from migrator.model import PassKind, Role
from migrator.ports import RegionMapping
from tests.integration.engine_lab.lab import (
    MIB,
    PAGE,
    Engine,
    Pair,
    Proxy,
    as_fast_as_its_cap,
    configuration,
    free_huge_pages,
    pair_of,
)

SIZE = 128 * MIB
A_PASS_S = 64.0
"""What 64 MiB of noise take at 1 MiB/s: an end that doesn't wait for the pass is far quicker."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfd needs root")


@pytest.fixture
async def pair(binary: Path, tmp_path: Path) -> AsyncIterator[Pair]:
    async with pair_of(binary, tmp_path, SIZE) as made:
        yield made


@pytest.mark.parametrize("streams", [1, 3])
async def test_memory_arrives_while_it_changes(pair: Pair, streams: int) -> None:
    guest = pair.source_guest
    guest.tell(f"fill 0 {48 * MIB}")
    guest.tell(f"fill {100 * MIB} {101 * MIB}")
    await pair.start(streams=streams)
    guest.tell(f"run 5000 0 {64 * MIB}")
    first = await pair.run_pass(PassKind.FIRST)
    assert first.pages + first.deferred_pages >= 49 * MIB // PAGE
    for _ in range(4):
        await pair.run_pass(PassKind.DIRTY)
    assert guest.tell("pause") > 0
    final = await pair.run_pass(PassKind.FINAL)
    assert final.pending_pages == 0
    assert pair.same_memory()


@pytest.mark.parametrize("streams", [1, 3])
async def test_what_is_written_before_its_turn_waits_for_a_later_pass(
    pair: Pair, streams: int
) -> None:
    guest, hot = pair.source_guest, 32 * MIB // PAGE
    guest.fill_with_noise(96 * MIB)
    # So slowly that the guest, whenever it gets a core, is ahead of most of their turns.
    await pair.start(streams=streams, bandwidth_bytes_per_s=16 * MIB)
    guest.tell(f"run 500000 {64 * MIB} {96 * MIB}")
    first = await pair.run_pass(PassKind.FIRST)
    pair.source_says(SetBandwidth(bandwidth_bytes_per_s=None))
    assert first.deferred_pages > hot // 2
    assert first.bytes_sent < 97 * MIB - first.deferred_pages * PAGE
    assert first.pending_pages >= first.deferred_pages
    second = await pair.run_pass(PassKind.DIRTY)
    assert second.pages + second.zero_pages == first.pending_pages
    assert second.deferred_pages == 0
    assert guest.tell("pause") > 0
    final = await pair.run_pass(PassKind.FINAL)
    assert (final.deferred_pages, final.pending_pages) == (0, 0)
    assert pair.same_memory()


async def test_holes_are_neither_read_nor_sent(pair: Pair) -> None:
    guest = pair.source_guest
    guest.tell(f"touch 500 0 {SIZE}")
    in_use = guest.in_use_bytes()
    await pair.start()
    first = await pair.run_pass(PassKind.FIRST)
    assert first.bytes_sent <= 1.05 * in_use
    assert guest.in_use_bytes() == in_use
    await pair.run_pass(PassKind.FINAL)
    assert pair.destination_guest.in_use_bytes() == in_use
    assert pair.same_memory()


async def test_a_clean_guest_costs_nothing(pair: Pair) -> None:
    pair.source_guest.tell(f"fill 0 {8 * MIB}")
    await pair.start()
    await pair.run_pass(PassKind.FIRST)
    final = await pair.run_pass(PassKind.FINAL)
    assert (final.pages, final.bytes_sent) == (0, 0)


async def test_zeroes_travel_as_ranges_and_overwrite(pair: Pair) -> None:
    guest = pair.source_guest
    pair.destination_guest.tell(f"fill 0 {4 * MIB}")
    pair.destination_guest.tell(f"fill {40 * MIB} {44 * MIB}")  # Where the source has nothing.
    guest.tell(f"zero 0 {16 * MIB}")
    await pair.start()
    first = await pair.run_pass(PassKind.FIRST)
    assert first.zero_pages == 16 * MIB // PAGE
    assert first.bytes_sent < MIB
    await pair.run_pass(PassKind.FINAL)
    assert pair.same_memory()
    assert pair.destination_guest.in_use_bytes() == 0


async def test_memory_given_back_becomes_zeros(pair: Pair) -> None:
    guest = pair.source_guest
    guest.tell(f"fill 0 {16 * MIB}")
    await pair.start()
    await pair.run_pass(PassKind.FIRST)
    guest.tell(f"punch {4 * MIB} {8 * MIB}")
    await pair.run_pass(PassKind.DIRTY)
    await pair.run_pass(PassKind.FINAL)
    assert pair.same_memory()


@pytest.mark.parametrize("streams", [1, 2])
async def test_a_cut_connection_is_restored_and_little_is_sent_again(
    pair: Pair, streams: int
) -> None:
    guest = pair.source_guest
    guest.fill_with_noise(96 * MIB)  # Packed pages might never reach the cut.
    listening = await pair.configure(streams=streams)
    proxy = Proxy(listening.port)
    await proxy.start()
    try:
        await pair.connect(proxy.port)
        guest.tell(f"run 2000 0 {96 * MIB}")
        proxy.cut_after_bytes = 40 * MIB
        first = await pair.run_pass(PassKind.FIRST)
        kinds = [type(message) for message in pair.source.heard]
        assert kinds.index(ChannelBroken) < kinds.index(ChannelRestored)
        # What wasn't acknowledged is in socket buffers: some MiB a hop, not the guest.
        assert first.bytes_sent < (96 + 50) * MIB
        proxy.cut()  # Between passes, too.
        await pair.source.expect(ChannelBroken)
        await pair.source.expect(ChannelRestored)
        dirty = await pair.run_pass(PassKind.DIRTY)
        written = guest.tell("pause")  # However long it all took: that, and nothing again.
        assert dirty.bytes_sent < 1.05 * written * PAGE
        await pair.run_pass(PassKind.FINAL)
        assert pair.same_memory()
        assert any(isinstance(m, ChannelBroken) for m in pair.destination.heard)
        await pair.stop_engines()
    finally:
        await proxy.close()


async def test_a_channel_that_stays_away_fails_the_engine(pair: Pair) -> None:
    listening = await pair.configure(reconnect_s=0.5)
    proxy = Proxy(listening.port)
    await proxy.start()
    try:
        await pair.connect(proxy.port)
        proxy.refuse = True
        proxy.cut()
        await pair.source.expect(ChannelBroken)
        failed = await pair.source.expect(EngineFailed)
        assert "could not be reached" in failed.reason
        assert await pair.source.exited() == 1
        assert not pair.source_guest.tracked()
    finally:
        await proxy.close()


async def test_a_silent_destination_is_noticed(pair: Pair) -> None:
    pair.source_guest.tell(f"fill 0 {64 * MIB}")
    await pair.start(silence_s=0.5, reconnect_s=20.0)
    os.kill(pair.destination.process.pid, signal.SIGSTOP)
    try:
        pair.source.process.send(RunPass(number=1, kind=PassKind.FIRST))
        await pair.source.expect(ChannelBroken)
    finally:
        os.kill(pair.destination.process.pid, signal.SIGCONT)
    await pair.source.expect(PassDone)
    await pair.run_pass(PassKind.FINAL)
    assert pair.same_memory()


async def test_the_bandwidth_cap_is_exact_and_can_change(pair: Pair) -> None:
    pair.source_guest.fill_with_noise(24 * MIB)  # A cap counts bytes on the wire, as packed.
    reports: list[Report] = []

    async def one_pass() -> tuple[float, float]:
        """By this clock, which the cap is changed by: the engine may begin a moment later."""
        await pair.start(bandwidth_bytes_per_s=8 * MIB)
        began = time.monotonic()
        pair.source.process.send(RunPass(number=1, kind=PassKind.FIRST))
        await asyncio.sleep(1.0)
        slow_s = time.monotonic() - began
        pair.source.process.send(SetBandwidth(bandwidth_bytes_per_s=16 * MIB))
        await pair.source.expect(PassDone)
        took_s = time.monotonic() - began
        reports[:] = [m for m in pair.source.heard if isinstance(m, Report)]
        await pair.stop_engines()
        return took_s, slow_s + (24 - 8 * slow_s) / 16

    await as_fast_as_its_cap(one_pass)
    assert len(reports) >= 5
    assert [r.remaining_bytes for r in reports] == sorted(
        (r.remaining_bytes for r in reports), reverse=True
    )


async def test_a_wrong_secret_is_refused_with_a_reason(pair: Pair) -> None:
    listening = await pair.configure(secret=b"x" * 32)
    pair.source.process.send(Connect(host="127.0.0.1", port=listening.port))
    failed = await pair.source.expect(EngineFailed)
    assert "secret" in failed.reason
    assert await pair.source.exited() == 1
    assert not pair.source_guest.tracked()
    assert pair.destination.process.running


def _hello(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "version": 1,
        "migration_id": "m-1",
        "secret": b"s" * 32,
        "kind": 1,
        **changes,
    }
    return wire.encode_frame(wire.FrameKind.HELLO, fields)


@pytest.mark.parametrize(
    "changes", [{"version": 9}, {"migration_id": "m-2"}, {"kind": 0}, {"kind": 9}, {"index": 7}]
)
async def test_bad_hellos_are_refused(pair: Pair, changes: dict[str, object]) -> None:
    listening = await pair.configure()
    reader, writer = await asyncio.open_connection("127.0.0.1", listening.port)
    writer.write(_hello(**changes))
    answer = await asyncio.wait_for(reader.read(), 30)
    (frame,) = wire.FrameDecoder().feed(answer)
    assert b"refusal" in frame.body
    assert len(frame.body) > 20
    writer.close()
    await writer.wait_closed()


async def test_bad_frames_close_the_stream_and_touch_nothing(pair: Pair) -> None:
    listening = await pair.configure()
    before = pair.destination_guest.digest()
    for content, payload in (
        ((SIZE, SIZE + PAGE), PAGE),  # outside
        ((100, 100 + PAGE), PAGE),  # not aligned
        ((0, 2 * PAGE), PAGE),  # doesn't add up
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", listening.port)
        writer.write(_hello())
        await reader.readexactly(1)
        header = struct.pack(
            "<2sBBHHIIQQ", b"FP", 1, frames.FrameKind.PAGES, 0, 0, 1, 0, 1, payload
        )
        writer.write(header + struct.pack("<qq", *content) + b"\xff" * payload)
        with contextlib.suppress(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 30)
        writer.close()
    assert pair.destination_guest.digest() == before
    assert pair.destination.process.running


async def test_the_agents_death_ends_the_engine_and_its_tracking(pair: Pair) -> None:
    await pair.start()
    assert pair.source_guest.tracked()
    pair.source.process._sock.shutdown(socket.SHUT_RDWR)
    assert await pair.source.exited() == 0
    assert not pair.source_guest.tracked()


async def test_agents_death_in_the_middle_of_a_pass(pair: Pair) -> None:
    pair.source_guest.fill_with_noise(64 * MIB)
    await pair.start(bandwidth_bytes_per_s=MIB)
    pair.source.process.send(RunPass(number=1, kind=PassKind.FIRST))
    await pair.source.expect(Report)
    began = time.monotonic()
    pair.source.process._sock.shutdown(socket.SHUT_RDWR)
    assert await pair.source.exited() == 0
    assert time.monotonic() - began < A_PASS_S / 4
    assert not pair.source_guest.tracked()


@pytest.mark.parametrize("how", ["stop", "sigterm", "sigkill"])
async def test_cancel_in_a_pass_and_migrate_again(pair: Pair, how: str) -> None:
    guest = pair.source_guest
    guest.fill_with_noise(64 * MIB)
    await pair.start(bandwidth_bytes_per_s=MIB)
    pair.source.process.send(RunPass(number=1, kind=PassKind.FIRST))
    await pair.source.expect(Report)
    began = time.monotonic()
    if how == "stop":
        pair.source.process.send(Stop())
        await pair.source.expect(Stopped)
    else:
        os.kill(pair.source.process.pid, getattr(signal, how.upper()))
    await pair.source.exited()
    assert time.monotonic() - began < A_PASS_S / 4
    assert guest.tracked() == (how == "sigkill")
    await pair.stop_engines()
    guest.tell(f"fill 0 {2 * MIB}")
    await pair.start()
    guest.tell(f"run 2000 0 {32 * MIB}")
    await pair.run_pass(PassKind.FIRST)
    await pair.run_pass(PassKind.DIRTY)
    guest.tell("pause")
    await pair.run_pass(PassKind.FINAL)
    assert pair.same_memory()
    await pair.stop_engines()
    assert not guest.tracked()


async def test_several_regions_and_mappings(binary: Path, tmp_path: Path) -> None:
    """One address space's memory as two regions, the first of them mapped in two pieces."""
    async with pair_of(binary, tmp_path, SIZE) as pair:
        half = SIZE // 2
        pair.source_guest.tell(f"fill {20 * MIB} {100 * MIB}")
        source, _ = await two_region_engines(pair, half)
        source.process.send(RunPass(number=1, kind=PassKind.FIRST))
        await source.expect(PassDone)
        pair.source_guest.tell(f"touch 300 0 {SIZE}")
        source.process.send(RunPass(number=2, kind=PassKind.FINAL))
        report = (await source.expect(PassDone)).report
        assert report.pages == 300
        assert pair.same_memory()


async def two_region_engines(pair: Pair, half: int) -> tuple[Engine, Engine]:
    """Engines that see the first half of the file as region 0, and all of it as region 1.

    Region 1's mapping covers the second half only, so each page is tracked once.
    """
    engines = []
    for guest, role in (
        (pair.source_guest, Role.SOURCE),
        (pair.destination_guest, Role.DESTINATION),
    ):
        quarter = half // 2
        pieces = tuple(
            RegionMapping(address=guest.address + at, length_bytes=quarter, region_offset_bytes=at)
            for at in (0, quarter)
        )
        upper = RegionMapping(
            address=guest.address + half, length_bytes=half, region_offset_bytes=half
        )
        layouts = (
            RegionLayout(name="a", size_bytes=half, page_size_bytes=PAGE, mappings=pieces),
            RegionLayout(name="b", size_bytes=2 * half, page_size_bytes=PAGE, mappings=(upper,)),
        )
        engine = await Engine.spawn(pair.folder / f"{role}.log")
        setattr(pair, role.value, engine)
        configure = configuration(role, guest, regions=layouts, streams=2)
        engine.process.send(configure, (*guest.fds, guest.fd))
        engines.append(engine)
    source, destination = engines
    await source.expect(Configured)
    listening = await destination.expect(Listening)
    source.process.send(Connect(host="127.0.0.1", port=listening.port))
    await source.expect(Connected)
    return source, destination


@pytest.mark.skipif(free_huge_pages() < 24, reason="no huge pages are set aside")
async def test_huge_pages(binary: Path, tmp_path: Path) -> None:
    async with pair_of(binary, tmp_path, 20 * MIB, huge=True) as pair:
        guest = pair.source_guest
        guest.tell(f"fill 0 {10 * MIB}")
        await pair.start()
        await pair.run_pass(PassKind.FIRST)
        guest.tell(f"touch 1 {4 * MIB} {6 * MIB}")
        guest.tell(f"touch 1 {14 * MIB} {16 * MIB}")
        dirty = await pair.run_pass(PassKind.FINAL)
        assert dirty.pages == 2 * 512
        assert pair.same_memory()
