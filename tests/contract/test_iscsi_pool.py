"""Pools on iSCSI, against a real tgtd: the volume contract, the fences, and what can be wrong."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import pytest

from migrator.errors import (
    ConflictError,
    FenceError,
    InvalidRequest,
    NotFoundError,
    StorageError,
    TooLargeError,
)
from migrator.model import DiskFormat, IscsiSource, NodeName, VolumeName
from migrator.ports import VolumeDriver
from storage.holder_keys import key_of
from storage.iscsi import IscsiPool, make_iscsi_pool
from storage.iscsi.reservations import ForeignReservationError, Reservations, fence
from storage.iscsi.session import Credentials, IscsiSession, LoginError, LunAddress
from storage.iscsi.tgt_control import TgtControl
from storage.settings import IscsiSettings
from tests.contract.tgt_world import SECRET, TgtWorld, missing_tools, running_tgt
from tests.contract.volume_contract import DISK, MIB, STALE_S, FenceContract, VolumeContract, t
from tests.contract.writers import Writer

pytestmark = [
    pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools())),
    pytest.mark.timeout(180),
    pytest.mark.allow_blocking("qemu-io is driven by plain pipes"),
]
Pools = tuple[IscsiPool, IscsiPool]
VolumePools = tuple[VolumeDriver, VolumeDriver]


@pytest.fixture(scope="module")
def tgt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TgtWorld]:
    with running_tgt(tmp_path_factory.mktemp("t")) as world:
        yield world


@pytest.fixture
async def nodes(tgt: TgtWorld) -> AsyncIterator[Pools]:
    await asyncio.to_thread(tgt.clean)
    pools = tgt.pool("a"), tgt.pool("b")
    yield pools
    for pool in pools:
        await pool.shut_down()


@pytest.fixture
def pool(nodes: Pools) -> IscsiPool:
    return nodes[0]


@pytest.fixture
def writers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


async def new_volume(nodes: Pools) -> None:
    await nodes[0].create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)


async def hypervisor(pool: IscsiPool, token: int, mark: int, writers: ExitStack) -> Writer:
    """What `pool`'s node runs under `token`."""
    source = await pool.open(DISK, t(token), read_only=False)
    writer = await asyncio.to_thread(Writer, source, mark)
    writers.callback(writer.end)
    return writer


class TestContract(VolumeContract):
    """What every driver keeps to."""

    formats = frozenset({DiskFormat.RAW})


class TestFences(FenceContract):
    """The LUN refuses every other session."""

    async def test_any_node_completes_a_fence(self, nodes: VolumePools) -> None:
        """Here the winner's node alone: the target admits no other. Nothing changes."""
        a, b = nodes
        await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
        source = await self.writer(a, 1, 0xA1)
        await a.fence(DISK, t(1))
        destination = await self.writer(b, 2, 0xB2)
        await b.fence(DISK, t(2))
        with pytest.raises(FenceError, match="another node"):
            await a.fence(DISK, t(2))
        assert destination.write()
        assert not source.write(within_s=STALE_S)
        for writer in (source, destination):
            writer.end()


async def test_two_luns_behind_one_name_are_told_apart(
    nodes: Pools, tmp_path: Path, writers: ExitStack
) -> None:
    """By who is registered at the LUN, by whichever portal and target name it is reached."""
    source, destination = nodes
    await new_volume(nodes)
    await hypervisor(source, 1, 0xA1, writers)
    await source.fence(DISK, t(1))
    with running_tgt(tmp_path) as other:
        elsewhere = other.pool("b")
        assert await elsewhere.mark() not in (None, await source.mark())
        await elsewhere.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
        await elsewhere.open(DISK, t(2), read_only=False)
        await elsewhere.reach(DISK)
        assert await source.shows_opened(DISK, NodeName("b"), t(2)) is False
        await asyncio.to_thread(other.kill)
        with pytest.raises(StorageError, match="portal can't be reached"):
            await elsewhere.reach(DISK)
        await elsewhere.shut_down()
    await destination.open(DISK, t(2), read_only=False)
    assert await source.shows_opened(DISK, NodeName("b"), t(2)) is True


async def test_a_target_that_has_forgotten_everybody_isnt_taken_for_another(
    nodes: Pools, tgt: TgtWorld
) -> None:
    source, destination = nodes
    await new_volume(nodes)
    for pool, token in ((source, 1), (destination, 2)):
        await pool.open(DISK, t(token), read_only=False)
    await asyncio.to_thread(tgt.kill)
    await asyncio.to_thread(tgt.start)
    with pytest.raises(StorageError, match="the target was restarted"):
        await source.shows_opened(DISK, NodeName("b"), t(2))


# --- the fences, each alone, and a target that forgets ---


async def test_a_fence_outlives_a_restart_of_the_target(
    nodes: Pools, tgt: TgtWorld, writers: ExitStack
) -> None:
    source, destination = nodes
    await new_volume(nodes)
    old = await hypervisor(source, 1, 0xA1, writers)
    await source.fence(DISK, t(1))
    new = await hypervisor(destination, 2, 0xB2, writers)
    await destination.fence(DISK, t(2))
    await asyncio.to_thread(tgt.kill)
    writing = asyncio.create_task(asyncio.to_thread(new.write))  # It waits.
    await asyncio.to_thread(tgt.start)  # It has forgotten every reservation.
    assert await writing
    assert not old.write(within_s=STALE_S)
    assert new.write()
    assert tgt.bytes_of(DISK, 0, 1) == b"\xb2"
    assert await destination.verify(DISK) == 2
    await destination.fence(DISK, t(3))
    assert new.write()


async def test_a_stale_writer_that_connects_again_stays_out_by_the_reservation_alone(
    nodes: Pools, tgt: TgtWorld, writers: ExitStack
) -> None:
    source, destination = nodes
    await new_volume(nodes)
    old = await hypervisor(source, 1, 0xA1, writers)
    await source.fence(DISK, t(1))
    assert old.write()
    new = await hypervisor(destination, 2, 0xB2, writers)
    await asyncio.to_thread(tgt.kill)
    await asyncio.to_thread(tgt.start)
    assert new.reads(0xA1)
    await destination.fence(DISK, t(2))
    # As if the second fence weren't there: the target admits it, and it connects only now.
    await source.grant(DISK)
    assert not old.write(within_s=STALE_S)
    assert tgt.bytes_of(DISK, 0, 1) == b"\xa1"
    assert new.write()
    assert not old.write(within_s=STALE_S)
    assert new.reads(0xB2)


async def test_a_node_without_an_open_session_fences_too(
    nodes: Pools, tgt: TgtWorld, writers: ExitStack
) -> None:
    """An agent that was restarted in the handoff."""
    source, destination = nodes
    await new_volume(nodes)
    old = await hypervisor(source, 1, 0xA1, writers)
    await source.fence(DISK, t(1))
    new = await hypervisor(destination, 2, 0xB2, writers)
    successor = tgt.pool("b")
    await successor.fence(DISK, t(2))
    assert new.write()
    assert not old.write(within_s=STALE_S)
    await successor.shut_down()


# --- what can be wrong: said before anything changes ---


async def test_a_reader_registers_no_key(nodes: Pools) -> None:
    await new_volume(nodes)
    source = await nodes[0].open(DISK, t(1), read_only=True)
    assert isinstance(source, IscsiSource)
    assert source.reservation_key is None


async def test_an_image_and_a_clone_carry_their_bytes(
    pool: IscsiPool, tgt: TgtWorld, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"begin" + bytes(4091) + b"end" + bytes(509))
    await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW, image=image)
    assert tgt.bytes_of(DISK, 0, 4608) == image.read_bytes()
    await pool.clone(DISK, VolumeName("copy"))
    assert tgt.bytes_of("copy", 0, MIB) == tgt.bytes_of(DISK, 0, MIB)


async def test_a_wrong_secret_is_called_one_and_never_shown(
    nodes: Pools, tgt: TgtWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await new_volume(nodes)
    wrong = tmp_path / "wrong"
    wrong.touch(mode=0o600)
    wrong.write_text("not-the-secret-x")
    settings = msgspec.structs.replace(tgt.settings(), chap_secret_file=str(wrong))
    pool = make_iscsi_pool(settings, NodeName("c"))
    with pytest.raises(LoginError, match="CHAP user or secret") as raised:
        await pool.open(DISK, t(1), read_only=False)
    shown = f"{raised.value!r} {raised.value.__cause__!r} {caplog.text}"
    assert "not-the-secret" not in shown
    assert SECRET not in shown
    for mode, text, complaint in (
        (0o644, SECRET, "open to others"),
        (0o600, SECRET + "\n", "line break"),
        (0o600, "short", "12 to 255"),
    ):
        wrong.write_text(text)
        wrong.chmod(mode)
        with pytest.raises(StorageError, match=complaint):
            await pool.open(DISK, t(1), read_only=False)
    await pool.shut_down()


async def test_an_unreachable_portal_and_a_missing_lun_are_told(tgt: TgtWorld) -> None:
    credentials = Credentials("ferry", SECRET)
    with socket.socket() as taken:  # Bound, and nobody listens.
        taken.bind(("127.0.0.1", 0))
        nowhere = LunAddress(f"127.0.0.1:{taken.getsockname()[1]}", "iqn.2026-11.x:y", 1)
        with pytest.raises(LoginError, match="portal can't be reached"):
            await IscsiSession.connect(nowhere, "iqn.2026-11.x:me", credentials)
    with socket.socket() as silent:  # Takes connections, and says nothing.
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        deaf = LunAddress(f"127.0.0.1:{silent.getsockname()[1]}", "iqn.2026-11.x:y", 1)
        with pytest.raises(LoginError, match="no answer"):
            await IscsiSession.connect(deaf, "iqn.2026-11.x:me", credentials, timeout_s=0.2)
    missing = LunAddress(tgt.portal, "iqn.2026-11.x:none", 1)
    with pytest.raises(LoginError, match="no such target"):
        await IscsiSession.connect(missing, "iqn.2026-11.x:me", credentials)


async def test_a_missing_lun_is_told(nodes: Pools, tgt: TgtWorld) -> None:
    await new_volume(nodes)
    lun = await nodes[0].grant(DISK, "iqn.2026-11.x:me")
    with pytest.raises(LoginError, match="no such LUN"):
        await IscsiSession.connect(
            LunAddress(lun.portal, lun.target, 9), "iqn.2026-11.x:me", Credentials("ferry", SECRET)
        )


async def test_a_strangers_lun_is_left_alone(nodes: Pools) -> None:
    await new_volume(nodes)
    lun = await nodes[0].grant(DISK, "iqn.2026-11.x:stranger")
    credentials = Credentials("ferry", SECRET)
    session = await IscsiSession.connect(lun.address, "iqn.2026-11.x:stranger", credentials)
    async with session:
        stranger = Reservations(session)
        await stranger.register(0xABC, persist=False)
        for _ in range(2):
            with pytest.raises(ForeignReservationError, match="stranger"):
                await nodes[0].open(DISK, t(1), read_only=False)
            with pytest.raises(ForeignReservationError, match="nothing was changed"):
                await nodes[0].fence(DISK, t(1))
            assert await stranger.keys() == [0xABC]
            await stranger.reserve(0xABC)
        held = await stranger.holder()
        assert held is not None
        assert held.key == 0xABC
        await stranger.clear(0xABC)
    await nodes[0].open(DISK, t(1), read_only=False)
    await nodes[0].fence(DISK, t(1))


async def test_a_dead_target_costs_a_fence_its_time_and_no_more(
    nodes: Pools, tgt: TgtWorld
) -> None:
    await new_volume(nodes)
    await nodes[0].open(DISK, t(1), read_only=False)
    await asyncio.to_thread(tgt.kill)
    with pytest.raises(FenceError, match="unconfirmed"):
        await nodes[0].fence(DISK, t(1))
    health = await nodes[0].health()
    assert not health.reachable
    assert health.reason
    await asyncio.to_thread(tgt.start)
    await nodes[0].fence(DISK, t(1))
    assert await nodes[1].verify(DISK) == 1


async def test_a_volume_that_somebody_uses_is_not_deleted(nodes: Pools, writers: ExitStack) -> None:
    await new_volume(nodes)
    writer = await hypervisor(nodes[1], 1, 0xA1, writers)
    assert writer.write()
    with pytest.raises(ConflictError, match=f"volume {DISK}: somebody is logged in"):
        await nodes[0].delete(DISK)
    with pytest.raises(ConflictError, match=f"volume {DISK}: somebody is logged in"):
        await nodes[0].resize(DISK, 2 * MIB)
    assert writer.write()


async def test_a_cancelled_create_is_whole_or_nothing(pool: IscsiPool, tgt: TgtWorld) -> None:
    for after_s in (0.0, 0.001, 0.003, 0.01):
        creating = asyncio.create_task(pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW))
        await asyncio.sleep(after_s)
        if creating.cancel():
            with pytest.raises(asyncio.CancelledError):
                await creating
            assert list(await pool.list_volumes()) == []
            control = TgtControl(Path(tgt.settings().tgt_socket or ""))
            assert await asyncio.to_thread(control.targets) == {}
        else:
            await creating
            await pool.delete(DISK)


# --- the fence's race, step by step ---


async def test_a_fence_that_was_overtaken_says_so(nodes: Pools) -> None:
    await new_volume(nodes)
    await nodes[0].open(DISK, t(2), read_only=False)  # It has seen that nobody holds the LUN.
    lun = await nodes[0].grant(DISK, "iqn.2026-11.x:other")
    credentials = Credentials("ferry", SECRET)
    session = await IscsiSession.connect(lun.address, "iqn.2026-11.x:other", credentials)
    async with session:
        reservations = Reservations(session)
        key = key_of(NodeName("other"), t(5))
        await fence(reservations, key, "it", persist=False)
        with pytest.raises(FenceError, match="token 5"):
            await nodes[0].fence(DISK, t(2))
        held = await reservations.holder()
        assert held is not None
        assert held.key == key.value
        assert await reservations.keys() == [key.value]
    with pytest.raises(NotFoundError):
        await nodes[0].fence(VolumeName("none"), t(9))


# --- LUNs made by a hook ---


@contextmanager
def longest_file(size_bytes: int) -> Iterator[None]:
    """As on a file system whose files end there, for this process and the programs that it runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_hook_is_asked_and_its_errors_are_told(
    tgt: TgtWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample's other half, which does on a storage host what the agents do in the lab."""
    for limit in ("driver.HEALTH_TIMEOUT_S", "driver.FENCE_TIMEOUT_S"):
        monkeypatch.setattr(f"storage.iscsi.{limit}", 60.0)  # A busy machine starts it slowly.
    monkeypatch.setattr("storage.iscsi.provisioner.HOOK_FENCE_TIMEOUT_S", 60.0)
    await asyncio.to_thread(tgt.clean)
    given = tmp_path / "pool.json"
    given.write_bytes(msgspec.json.encode(tgt.settings()))
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\nexec {sys.executable} -m storage.iscsi.tgt_hook {given}\n")
    hook.chmod(0o755)
    settings = msgspec.structs.replace(
        tgt.settings(), portal=None, tgt_folder=None, tgt_socket=None, hook=str(hook)
    )
    settings = msgspec.structs.replace(settings, hook_fences=True)
    a, b = (make_iscsi_pool(settings, NodeName(name)) for name in "ab")
    assert (await a.health()).reachable
    await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    assert [each.name for each in await b.list_volumes()] == [DISK]
    with pytest.raises(ConflictError, match="already"):
        await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    with longest_file(8 * MIB), pytest.raises(TooLargeError, match=r"volumes: File too large$"):
        await a.create(VolumeName("huge"), capacity_bytes=9 * MIB, format=DiskFormat.RAW)
    assert [each.name for each in await b.list_volumes()] == [DISK]
    await a.open(DISK, t(1), read_only=False)
    await a.fence(DISK, t(1))
    await b.open(DISK, t(2), read_only=False)
    await b.fence(DISK, t(2))
    assert await a.verify(DISK) == 2
    with pytest.raises(FenceError, match="token 2"):
        await a.fence(DISK, t(1))
    await b.delete(DISK)
    with pytest.raises(NotFoundError):
        await a.inspect(DISK)
    for pool in (a, b):
        await pool.shut_down()


def test_settings_that_do_not_go_together_are_refused() -> None:
    portal = IscsiSettings(name="p", portal="10.0.0.5:3260")
    half = IscsiSettings(name="p", hook="/bin/true", chap_user="ferry")
    both = IscsiSettings(name="p", hook="/bin/true", tgt_folder="/srv")
    for settings, field in ((portal, "hook"), (half, "chap_secret_file"), (both, "hook")):
        with pytest.raises(InvalidRequest) as raised:
            make_iscsi_pool(settings, NodeName("a"))
        assert field in raised.value.fields
