"""The engines' device channel, and how engines end, between two real address spaces."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrator.engine_messages import (
    ChannelRestored,
    Configured,
    Connect,
    DeviceChannelOpen,
    EngineFailed,
    Listening,
    OpenDeviceChannel,
    PostCopyArmed,
    PostCopyDone,
    PullAll,
    Report,
    Stopped,
)
from migrator.model import PassKind, Role
from tests.integration.engine_lab.lab import (
    MIB,
    PAGE,
    Engine,
    Guest,
    Pair,
    configuration,
    pair_of,
)

SIZE = 128 * MIB

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfd needs root")


@pytest.fixture
async def pair(binary: Path, tmp_path: Path) -> AsyncIterator[Pair]:
    async with pair_of(binary, tmp_path, SIZE) as made:
        yield made


async def _device_channel(pair: Pair, folder: Path) -> tuple[socket.socket, socket.socket]:
    """Both hypervisors' ends: (source, destination)."""
    source_path, destination_path = folder / "s.sock", folder / "d.sock"
    pair.destination.process.send(OpenDeviceChannel(path=str(destination_path)))
    pair.source.process.send(OpenDeviceChannel(path=str(source_path)))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(destination_path))  # After the engine was told: it tries again.
    listener.listen(1)
    await pair.source.expect(DeviceChannelOpen)
    await pair.destination.expect(DeviceChannelOpen)
    assert source_path.stat().st_mode & 0o777 == 0o600
    source = socket.socket(socket.AF_UNIX)
    source.connect(str(source_path))
    destination, _ = listener.accept()
    listener.close()
    for sock in (source, destination):
        sock.settimeout(30.0)
    return source, destination


async def test_the_device_channel_carries_both_ways_and_half_closes(
    pair: Pair, tmp_path: Path
) -> None:
    await pair.start()
    source, destination = await _device_channel(pair, tmp_path)
    with source, destination:
        blob = os.urandom(3 * MIB)
        sending = asyncio.create_task(asyncio.to_thread(source.sendall, blob))
        got = await asyncio.to_thread(_receive, destination, len(blob))
        await sending
        assert got == blob
        destination.sendall(b"return path")
        assert source.recv(100) == b"return path"
        source.shutdown(socket.SHUT_WR)
        assert destination.recv(100) == b""
        destination.sendall(b"last words")
        destination.close()
        assert _receive(source, 10) == b"last words"
        assert source.recv(100) == b""


def _receive(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = sock.recv(count - len(data))
        assert part
        data += part
    return bytes(data)


@pytest.mark.parametrize("victim", ["source", "destination", "hypervisor"])
async def test_the_source_sees_its_device_channel_closed(
    pair: Pair, tmp_path: Path, victim: str
) -> None:
    await pair.start()
    source, destination = await _device_channel(pair, tmp_path)
    with source, destination:
        source.sendall(b"begin")
        assert _receive(destination, 5) == b"begin"
        if victim == "hypervisor":
            destination.close()
        else:
            getattr(pair, victim).process.kill()
        try:
            assert source.recv(1) == b""
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                source.sendall(b"more")
        except ConnectionResetError:
            pass  # Any end will do; none (the socket's time runs out) won't.


@pytest.mark.parametrize("role", list(Role))
async def test_a_stop_on_the_heels_of_the_configuration(
    binary: Path, tmp_path: Path, role: Role
) -> None:
    guest = Guest(binary, SIZE)
    engine = await Engine.spawn(tmp_path / "log")
    try:
        engine.process.send(configuration(role, guest), guest.fds)
        assert await engine.process.stop(timeout_s=30.0)
        assert engine.exit_status == 0
        assert not guest.tracked()
    finally:
        guest.close()


async def test_a_guest_that_died_doesnt_hang_the_engine(binary: Path, tmp_path: Path) -> None:
    guest = Guest(binary, SIZE)
    engine = await Engine.spawn(tmp_path / "log")
    engine.process.send(configuration(Role.SOURCE, guest), guest.fds)
    await engine.expect(Configured)
    guest.close()
    assert await engine.process.stop(timeout_s=30.0)
    assert engine.exit_status == 0


async def test_an_engine_that_wasnt_needed_stops(tmp_path: Path) -> None:
    engine = await Engine.spawn(tmp_path / "log")
    assert await engine.process.stop(timeout_s=30.0)
    assert engine.exit_status == 0


async def test_an_address_that_isnt_here_is_refused_at_once(pair: Pair) -> None:
    """Pages never leave by another network than the one that was configured."""
    listening = await pair.configure()
    await pair.source.process.stop(timeout_s=10.0)
    pair.source = await Engine.spawn(pair.folder / "source.log")
    astray = configuration(Role.SOURCE, pair.source_guest, bind_address="192.0.2.77")
    pair.source.process.send(astray, pair.source_guest.fds)
    pair.source.process.send(Connect(host="127.0.0.1", port=listening.port))
    failed = await pair.source.expect(EngineFailed, 10.0)
    assert "192.0.2.77" in failed.reason
    assert await pair.source.exited() == 1


async def _successor(pair: Pair, name: str) -> Engine:
    """Takes over the destination from an engine that was killed."""
    pair.destination.process.kill()
    await pair.destination.exited()
    pair.destination = await Engine.spawn(pair.folder / name)
    configure = configuration(Role.DESTINATION, pair.destination_guest, post_copy=True, peer="n1")
    pair.destination.process.send(configure, pair.destination_guest.fds)
    return pair.destination


async def test_a_successor_tells_whether_pages_are_missing(pair: Pair) -> None:
    """One that died while they were, and one that had filled in all and was never heard."""
    pair.source_guest.tell(f"fill 0 {8 * MIB}")  # The rest stays holes, on both sides.
    await pair.start(reconnect_s=300.0)
    await pair.run_pass(PassKind.FIRST)
    pair.source_guest.tell(f"fill {4 * MIB} {8 * MIB}")
    await pair.run_pass(PassKind.STALE)
    await pair.run_pass(PassKind.MISSING)
    await pair.destination.expect(PostCopyArmed)
    dead = next(each for each in pair.destination.heard if isinstance(each, Listening))
    second = await _successor(pair, "second.log")
    # It goes on dialling where it was told to, until it hears of another place.
    pair.source.process.send(Connect(host="127.0.0.1", port=dead.port, secret=b"s" * 32))
    listening = await second.expect(Listening)
    assert not [each for each in second.heard if isinstance(each, PostCopyDone)]
    pair.source.process.send(Connect(host="127.0.0.1", port=listening.port, secret=b"s" * 32))
    await pair.source.expect(ChannelRestored)
    second.process.send(PullAll())
    assert (await second.expect(PostCopyDone)).pages >= 4 * MIB // PAGE
    while (report := await pair.source.expect(Report)).remaining_bytes:
        pass
    assert await pair.source.process.stop(timeout_s=30.0)
    assert report.bytes_sent == (await pair.source.expect(Stopped)).bytes_sent, "told at once"
    third = await _successor(pair, "third.log")
    assert (await third.expect(PostCopyDone)).pages == 0
    await third.expect(Listening)  # Behind it.
    assert pair.same_memory()


async def test_a_source_that_has_nothing_to_pack_is_one_thread(pair: Pair) -> None:
    """On a host of 64 cores, too: no library starts one for each of them."""
    await pair.start()
    assert _threads(pair.source) == 1


def _threads(engine: Engine) -> int:
    return len(list(Path(f"/proc/{engine.process.pid}/task").iterdir()))
