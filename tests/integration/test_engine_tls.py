"""The engines' connections over mutual TLS: pages, the device channel, post-copy, and refusals."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme

from migrator.engine_messages import (
    ChannelRestored,
    Connect,
    DeviceChannelOpen,
    EndPass,
    EngineFailed,
    OpenDeviceChannel,
    PassDone,
    PostCopyArmed,
    PostCopyDone,
    PullAll,
    Report,
    RunPass,
    SetBandwidth,
    Stopped,
)
from migrator.model import PassKind, Role
from tests.integration.engine_lab.lab import (
    MIB,
    PAGE,
    Pair,
    Proxy,
    as_fast_as_its_cap,
    pair_of,
    tls_files,
)

SIZE = 64 * MIB

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfd needs root")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def pair(binary: Path, tmp_path: Path, authority: trustme.CA) -> AsyncIterator[Pair]:
    """Both engines with TLS, in one cluster."""
    async with pair_of(binary, tmp_path, SIZE) as made:
        for role, name in made.names.items():
            made.tls[role] = tls_files(tmp_path, authority, name)
        yield made


async def test_memory_arrives_through_cuts_and_nothing_readable_is_on_the_wire(pair: Pair) -> None:
    guest = pair.source_guest
    guest.fill_with_noise(48 * MIB)  # Packed pages might never reach the cut.
    secret = b"a page that nobody else may read" * 128
    os.pwrite(guest.fd, secret, 50 * MIB)
    listening = await pair.configure(streams=2)
    proxy = Proxy(listening.port)
    await proxy.start()
    try:
        await pair.connect(proxy.port)
        guest.tell(f"run 3000 0 {48 * MIB}")
        proxy.cut_after_bytes = 20 * MIB
        first = await pair.run_pass(PassKind.FIRST)
        assert first.pages + first.deferred_pages >= 48 * MIB // PAGE
        await pair.run_pass(PassKind.DIRTY)
        proxy.cut()  # Between passes, too.
        await pair.source.expect(ChannelRestored)
        await pair.run_pass(PassKind.DIRTY)
        assert guest.tell("pause") > 0
        final = await pair.run_pass(PassKind.FINAL)
        assert final.pending_pages == 0
        assert pair.same_memory()
        assert proxy.carried_bytes > 48 * MIB
        assert secret[:32] not in proxy.sample
        await pair.stop_engines()
    finally:
        await proxy.close()


async def test_the_bandwidth_cap_counts_what_is_on_the_wire(pair: Pair) -> None:
    """Records' headers and tags are a part of it: as exact as without TLS (test_engine.py)."""
    cap = 8 * MIB  # Of which a slow machine is capable, too.
    pair.source_guest.fill_with_noise(12 * MIB)

    async def one_pass() -> tuple[float, float]:
        listening = await pair.configure(bandwidth_bytes_per_s=cap)
        proxy = Proxy(listening.port)
        await proxy.start()
        try:
            await pair.connect(proxy.port)
            before = proxy.carried_bytes
            first = await pair.run_pass(PassKind.FIRST)
            carried = proxy.carried_bytes - before
            assert first.bytes_sent >= 12 * MIB
            assert abs(carried / first.bytes_sent - 1) < 0.01
            return first.seconds, carried / cap
        finally:
            await proxy.close()
            await pair.stop_engines()

    await as_fast_as_its_cap(one_pass)


async def test_the_device_channel_carries_both_ways(pair: Pair, tmp_path: Path) -> None:
    await pair.start()
    source_path, destination_path = tmp_path / "s.sock", tmp_path / "d.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(destination_path))
        listener.listen(1)
        pair.destination.process.send(OpenDeviceChannel(path=str(destination_path)))
        pair.source.process.send(OpenDeviceChannel(path=str(source_path)))
        await pair.source.expect(DeviceChannelOpen)
        await pair.destination.expect(DeviceChannelOpen)
        source = socket.socket(socket.AF_UNIX)
        source.connect(str(source_path))
        destination, _ = listener.accept()
    with source, destination:
        for sock in (source, destination):
            sock.settimeout(30.0)
        blob, answer = os.urandom(2 * MIB), os.urandom(MIB)
        sending = [
            asyncio.create_task(asyncio.to_thread(source.sendall, blob)),
            asyncio.create_task(asyncio.to_thread(destination.sendall, answer)),
        ]
        assert await asyncio.to_thread(_receive, destination, len(blob)) == blob
        assert await asyncio.to_thread(_receive, source, len(answer)) == answer
        await asyncio.gather(*sending)
        source.shutdown(socket.SHUT_WR)
        assert destination.recv(1) == b""


def _receive(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = sock.recv(count - len(data))
        assert part
        data += part
    return bytes(data)


async def test_post_copy_fills_every_page_while_the_guest_faults(pair: Pair) -> None:
    pair.source_guest.tell(f"fill 0 {32 * MIB}")
    await pair.start()
    stale = await pair.run_pass(PassKind.STALE)
    assert stale.pages == 32 * MIB // PAGE
    await pair.run_pass(PassKind.MISSING)
    await pair.destination.expect(PostCopyArmed)
    # Each of these waits for its page: a fault, answered on a stream of its own.
    words = pair.destination_guest.tell
    await asyncio.to_thread(words, f"time {8 * MIB} {9 * MIB}")
    pair.source_guest.tell(f"time {8 * MIB} {9 * MIB}")  # The same change here.
    pair.destination.process.send(PullAll())
    done = await pair.destination.expect(PostCopyDone)
    assert done.pages >= 32 * MIB // PAGE
    assert done.faults > 0
    told = [each for each in pair.source.heard if isinstance(each, Report)]
    assert await pair.source.process.stop(timeout_s=10.0)
    stopped = next(each for each in pair.source.heard if isinstance(each, Stopped))
    # What was asked for counts, too.
    assert stopped.bytes_sent > 32 * MIB / done.packed_ratio
    assert all(each.number == 0 for each in told)
    assert pair.same_memory()


@pytest.mark.parametrize("streams", [1, 2])
async def test_a_pass_that_is_ended_leaves_the_rest_pending(pair: Pair, streams: int) -> None:
    """As without TLS (test_engine_passes.py); what OpenSSL had begun to send goes out whole."""
    guest, say, used = pair.source_guest, pair.source_says, 48 * MIB
    os.pwrite(guest.fd, os.urandom(used), 0)
    await pair.start(streams=streams, bandwidth_bytes_per_s=2 * MIB)
    guest.tell(f"run 1000 0 {used}")
    say(RunPass(number=1, kind=PassKind.FIRST))
    await pair.source.expect(Report)
    say(EndPass(number=1))
    first = (await pair.source.expect(PassDone)).report
    assert first.seconds < 12.0, "all of it would take 24 s"
    assert used // PAGE // 3 < first.cut_pages <= first.pending_pages
    assert first.pages + first.cut_pages + first.deferred_pages == used // PAGE
    say(SetBandwidth(bandwidth_bytes_per_s=None))
    say(RunPass(number=2, kind=PassKind.DIRTY))
    second = (await pair.source.expect(PassDone)).report
    assert second.pages + second.zero_pages + second.same_pages == first.pending_pages
    assert guest.tell("pause") > 0
    say(RunPass(number=3, kind=PassKind.FINAL))
    assert (await pair.source.expect(PassDone)).report.pending_pages == 0
    assert pair.same_memory()


async def _refusal(pair: Pair) -> str:
    """Why the source's engine gave up, before any page."""
    listening = await pair.configure(reconnect_s=20.0)
    pair.source.process.send(Connect(host="127.0.0.1", port=listening.port))
    failed = await pair.source.expect(EngineFailed, 10.0)  # At once, not after reconnect_s.
    assert pair.destination_guest.in_use_bytes() == 0
    return failed.reason


@pytest.mark.parametrize("plain", list(Role))
async def test_one_side_without_tls_is_refused_with_the_reason(pair: Pair, plain: Role) -> None:
    pair.source_guest.tell(f"fill 0 {MIB}")
    del pair.tls[plain]
    assert "tls.mode" in await _refusal(pair)


@pytest.mark.parametrize("stranger", list(Role))
async def test_another_clusters_certificate_is_refused(
    pair: Pair, tmp_path: Path, stranger: Role
) -> None:
    folder = tmp_path / "elsewhere"
    pair.tls[stranger] = tls_files(folder, trustme.CA(), pair.names[stranger])
    reason = await _refusal(pair)
    assert "certificate" in reason or "unknown ca" in reason


@pytest.mark.parametrize("role", list(Role))
async def test_another_node_of_the_cluster_is_refused(
    pair: Pair, tmp_path: Path, authority: trustme.CA, role: Role
) -> None:
    pair.tls[role] = tls_files(tmp_path, authority, "n9")
    reason = await _refusal(pair)
    assert pair.names[role] in reason


async def test_a_listener_uses_the_certificate_that_was_renewed_since(
    pair: Pair, tmp_path: Path, authority: trustme.CA
) -> None:
    """The old one may have ended by the time that a stream is connected again: in post-copy a guest
    would wait for ever. Here it names another node, which needs no waiting.
    """
    files = pair.tls[Role.DESTINATION] = tls_files(tmp_path, authority, "n9")
    listening = await pair.configure()
    renewed = tls_files(tmp_path, authority, pair.names[Role.DESTINATION])
    await asyncio.to_thread(Path(renewed.certificate_path).replace, files.certificate_path)
    await pair.connect(listening.port)
