"""The NFS driver on a real server: the contract, fences against real writers, a hanging server."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator.errors import ConflictError, FenceError, InvalidRequest, NotFoundError, StorageError
from migrator.model import DiskFormat, NfsSource, NodeName, VolumeName
from storage.marks import MARK, OWNER
from storage.nfs import NfsPool, files
from storage.nfs.files import remove_tree
from storage.nfs.layout import READER_ID, Opening
from storage.nfs.libnfs import Export, NfsError
from storage.nfs.making import Maker
from storage.settings import NfsSettings
from tests.contract.storage_servers import ADDRESS, NfsServer, in_new_namespace
from tests.contract.volume_contract import (
    DISK,
    MIB,
    FenceContract,
    VolumeContract,
    image_with_holes,
    t,
)
from tests.contract.writers import Writer

pytestmark = [
    pytest.mark.lab,
    pytest.mark.allow_blocking("qemu-io and the servers are driven by plain pipes"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NfsServer]:
    with in_new_namespace(), NfsServer(tmp_path_factory.mktemp("nfs")) as running:
        yield running


@pytest.fixture
async def nodes(
    server: NfsServer, request: pytest.FixtureRequest
) -> AsyncIterator[tuple[NfsPool, NfsPool]]:
    """The pool as two nodes see it; emptied first."""
    settings = NfsSettings(name="default", server=ADDRESS, export=server.export)
    made = NfsPool(settings, NodeName("a")), NfsPool(settings, NodeName("b"))
    yield made
    for volume in await made[0].list_volumes():
        name = VolumeName(volume.name)
        for node in made:
            await node.close(name, t(1 << 40))
        await made[0].delete(name)
    for left in (MARK, OWNER):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{server.export}/{left}")  # noqa: PTH108 - As below.
    assert os.listdir(server.export) == []  # noqa: PTH208 - Names are what it is about.
    for node in made:
        await node.shut_down()


class TestContract(VolumeContract):
    """What every driver keeps to."""


class TestFences(FenceContract):
    """The server refuses every other uid."""


async def test_two_exports_are_told_apart(
    server: NfsServer, nodes: tuple[NfsPool, NfsPool]
) -> None:
    """By their marks; and by what a node has opened, which shows only where it has."""
    a, b = nodes
    mark = await a.mark()
    assert mark is not None and await b.mark() == mark
    assert sorted(os.listdir(server.export)) == [MARK], "no draft is left"  # noqa: PTH208
    root = a._control.another()
    await root.call(lambda export: export.make_folder("/other", 0o755), timeout_s=10.0)
    settings = NfsSettings(name="default", server=ADDRESS, export=f"{server.export}/other")
    elsewhere = NfsPool(settings, NodeName("b"))
    assert await elsewhere.mark() not in (None, mark)
    for pool in (a, elsewhere):
        await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    await a.open(DISK, t(1), read_only=False)
    await elsewhere.open(DISK, t(2), read_only=False)
    assert await a.shows_opened(DISK, NodeName("b"), t(2)) is False
    await b.open(DISK, t(2), read_only=False)
    assert await a.shows_opened(DISK, NodeName("b"), t(2)) is True
    await elsewhere.close(DISK, t(2))
    await elsewhere.delete(DISK)
    await elsewhere.shut_down()
    await root.call(lambda export: remove_tree(export, "/other"), timeout_s=10.0)
    root.close()


async def test_a_missing_export_and_an_absent_server_are_told(server: NfsServer) -> None:
    for settings in (
        NfsSettings(name="p", server=ADDRESS, export="/nowhere"),
        NfsSettings(name="p", server="192.0.2.1", export="/nowhere"),
    ):
        pool = NfsPool(settings, NodeName("a"))
        health = await pool.health()
        assert not health.reachable
        assert f"NFS server {settings.server} " in (health.reason or "")
        with pytest.raises(StorageError):
            await pool.list_volumes()
        with pytest.raises(FenceError, match="unconfirmed"):
            await pool.fence(DISK, t(1))
        await pool.shut_down()


async def test_a_server_that_hangs_holds_nobody_up_for_ever(
    server: NfsServer, nodes: tuple[NfsPool, NfsPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.nfs.driver.CALL_TIMEOUT_S", 2.0)
    monkeypatch.setattr("storage.nfs.driver.ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr("storage.nfs.driver.HEALTH_TIMEOUT_S", 1.0)
    settings = NfsSettings(name="default", server=ADDRESS, export=server.export)
    pool = NfsPool(settings, NodeName("a"))
    await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    await pool.open(DISK, t(1), read_only=False)
    await pool.fence(DISK, t(1))
    server.nfs.signal(signal.SIGSTOP)
    try:
        health = await pool.health()
        assert not health.reachable
        named = f"NFS server {ADDRESS} (export {server.export}) can't be reached: no answer in "
        assert named in (health.reason or "")
        with pytest.raises(FenceError, match="unconfirmed"):
            await pool.fence(DISK, t(2))
        with pytest.raises(StorageError, match=r"hasn't answered this node for \d+ s\. Is it up"):
            await pool.list_volumes()
        waiting = asyncio.create_task(pool.inspect(DISK))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    finally:
        server.nfs.signal(signal.SIGCONT)
    await pool.fence(DISK, t(2))
    assert await pool.verify(DISK) == 2
    await pool.close(DISK, t(2))
    await pool.shut_down()


async def test_a_server_that_was_restarted_is_used_again(
    server: NfsServer, nodes: tuple[NfsPool, NfsPool]
) -> None:
    a, b = nodes
    await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    await a.open(DISK, t(1), read_only=False)
    await a.fence(DISK, t(1))
    server.nfs.kill()
    with pytest.raises(FenceError, match=r"unconfirmed: .*NFS server .* can't be reached") as told:
        await a.fence(DISK, t(2))
    assert "Input/output error" not in str(told.value)
    assert "nfs_service" not in str(told.value)
    server.nfs.start()
    await a.fence(DISK, t(2))
    assert await b.verify(DISK) == 2


async def test_what_is_open_is_known_after_a_restart_and_not_deleted(
    nodes: tuple[NfsPool, NfsPool], server: NfsServer
) -> None:
    a, b = nodes
    await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    opened = await a.open(DISK, t(1), read_only=False)
    await a.fence(DISK, t(1))
    assert isinstance(opened, NfsSource)
    await b.open(DISK, t(2), read_only=False)
    await b.fence(DISK, t(2))
    restarted = NfsPool(
        NfsSettings(name="default", server=ADDRESS, export=server.export), NodeName("a")
    )
    await restarted.fence(DISK, t(3))
    status = (Path(server.export) / DISK / "disk.raw").stat()
    assert (status.st_uid, status.st_gid) == (opened.user, opened.group)
    await b.close(DISK, t(2))
    with pytest.raises(ConflictError, match="node a has"):
        await restarted.delete(DISK)
    with pytest.raises(ConflictError, match="node a has"):
        await restarted.resize(DISK, 2 * MIB)
    await restarted.close(DISK, t(3))
    assert (await restarted.resize(DISK, 2 * MIB)).capacity_bytes == 2 * MIB
    await restarted.delete(DISK)
    await restarted.shut_down()


@pytest.mark.parametrize("when", ["before qemu-img writes", "before the disk is given to it"])
async def test_a_start_elsewhere_shuts_a_resize_out(
    nodes: tuple[NfsPool, NfsPool],
    server: NfsServer,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    """Two writers would ruin a qcow2: whoever fences last is the only one, as always."""
    a, b = nodes
    await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.QCOW2)
    begin, tool = NfsPool._grow, Maker._tool
    started: list[NfsSource] = []

    async def start() -> None:
        source = await b.open(DISK, t(1), read_only=False)
        await b.fence(DISK, t(1))
        assert isinstance(source, NfsSource)
        started.append(source)

    async def start_then_grow(pool: NfsPool, *arguments: Any) -> None:
        await start()
        await begin(pool, *arguments)

    async def start_then_write(maker: Maker, *arguments: str) -> None:
        await start()
        await tool(maker, *arguments)

    with monkeypatch.context() as patch:
        if when == "before qemu-img writes":
            patch.setattr(Maker, "_tool", start_then_write)
        else:
            patch.setattr(NfsPool, "_grow", start_then_grow)
        with pytest.raises(ConflictError, match=r"was opened (just now|while it was resized)"):
            await a.resize(DISK, 2 * MIB)
    assert (await a.inspect(DISK)).capacity_bytes == MIB
    status = (Path(server.export) / DISK / "disk.qcow2").stat()
    assert (status.st_uid, status.st_gid) == (started[0].user, started[0].group)
    writer = await asyncio.to_thread(Writer, started[0], 0xB2)
    assert writer.write()
    writer.end()
    await b.close(DISK, t(1))
    assert (await a.resize(DISK, 2 * MIB)).capacity_bytes == 2 * MIB
    assert await a.verify(DISK) == 1
    again = await b.open(DISK, t(2), read_only=False)
    await b.fence(DISK, t(2))
    writer = await asyncio.to_thread(Writer, again, 0xB3)
    assert writer.reads(0xB2) and writer.write(MIB)
    writer.end()


async def test_what_may_have_been_written_to_meanwhile_is_not_cloned(
    nodes: tuple[NfsPool, NfsPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is closed again by then; and while somebody has it open."""
    a, b = nodes
    await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    piece = Maker._piece

    async def piece_then_start(maker: Maker, *arguments: Any) -> None:
        await piece(maker, *arguments)
        await b.open(DISK, t(1), read_only=False)
        await b.fence(DISK, t(1))
        await b.close(DISK, t(1))

    with monkeypatch.context() as patch:
        patch.setattr(Maker, "_piece", piece_then_start)
        with pytest.raises(ConflictError, match="opened or resized while it was copied"):
            await a.clone(DISK, VolumeName("copy"))
    await b.open(DISK, t(2), read_only=False)
    with pytest.raises(ConflictError, match=r"node b has .* it was not cloned"):
        await a.clone(DISK, VolumeName("copy"))
    await b.close(DISK, t(2))
    await b.open(DISK, t(2), read_only=True)
    await a.clone(DISK, VolumeName("copy"))


async def test_a_volume_that_is_opened_just_before_it_goes_stays(
    nodes: tuple[NfsPool, NfsPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one who deletes has looked already whether anybody has it open."""
    a, b = nodes
    await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    delete = files.delete

    def open_then_delete(export: Export, volume: VolumeName) -> Opening | None:
        opening = Opening(NodeName("b"), t(1), read_only=False)
        files.touch(export, f"/{volume}/{opening.name}")
        return delete(export, volume)

    with monkeypatch.context() as patch:
        patch.setattr(files, "delete", open_then_delete)
        with pytest.raises(ConflictError, match=r"node b has .* it was not deleted"):
            await a.delete(DISK)
    await b.open(DISK, t(1), read_only=False)
    await b.fence(DISK, t(1))
    assert [each.name for each in await a.list_volumes()] == [DISK]


async def test_readers_are_neither_owner_nor_group(nodes: tuple[NfsPool, NfsPool]) -> None:
    a, b = nodes
    await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    reading = await b.open(DISK, t(1), read_only=True)
    assert isinstance(reading, NfsSource)
    assert (reading.user, reading.group, reading.read_only) == (READER_ID, READER_ID, True)
    reader = await asyncio.to_thread(Writer, reading, 1)
    assert reader.reads(0)
    reader.end()
    with pytest.raises(ConflictError, match="node b has"):
        await a.delete(DISK)


async def test_a_closed_destination_loses_what_it_was_given(
    nodes: tuple[NfsPool, NfsPool],
) -> None:
    a, b = nodes
    await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    await a.open(DISK, t(1), read_only=False)
    await a.fence(DISK, t(1))
    stale = await asyncio.to_thread(Writer, await b.open(DISK, t(2), read_only=False), 0xB2)
    assert stale.write(), "both ends may, until the fence"
    await b.close(DISK, t(2))
    assert not stale.write(within_s=1.5)
    stale.end()


async def test_an_image_is_copied_with_its_holes_and_a_failed_copy_leaves_nothing(
    nodes: tuple[NfsPool, NfsPool], server: NfsServer, tmp_path: Path
) -> None:
    a, _ = nodes
    image = image_with_holes(tmp_path)
    made = await a.create(DISK, capacity_bytes=60 * MIB, format=DiskFormat.RAW, image=image)
    assert made.capacity_bytes == 60 * MIB
    assert made.allocated_bytes < 2 * MIB
    copied = (Path(server.export) / DISK / "disk.raw").read_bytes()
    assert copied == image.read_bytes() + bytes(10 * MIB)
    clone = await a.clone(DISK, VolumeName("clone"))
    assert clone.allocated_bytes < 2 * MIB
    assert (Path(server.export) / "clone" / "disk.raw").read_bytes() == copied
    qcow2 = tmp_path / "not.qcow2"
    qcow2.write_bytes(bytes(MIB))
    with pytest.raises(InvalidRequest, match="not a qcow2 image"):
        await a.create(VolumeName("late"), capacity_bytes=MIB, format=DiskFormat.QCOW2, image=qcow2)
    with pytest.raises(NotFoundError):
        await a.inspect(VolumeName("late"))


async def test_a_cancelled_copy_leaves_nothing(
    nodes: tuple[NfsPool, NfsPool],
    server: NfsServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> None:
        begun.set()
        go_on.wait(30)

    monkeypatch.setattr("storage.nfs.making._write_piece", slow)
    image = tmp_path / "image"
    image.write_bytes(b"x" * MIB)
    creating = asyncio.create_task(
        nodes[0].create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW, image=image)
    )
    assert await asyncio.to_thread(begun.wait, 30)
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert os.listdir(server.export) == []  # noqa: PTH208 - Names are what it is about.
    go_on.set()


async def test_a_full_export_says_so_and_is_left_clean(
    nodes: tuple[NfsPool, NfsPool],
    server: NfsServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise NfsError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("storage.nfs.making._write_piece", full)
    image = tmp_path / "image"
    image.write_bytes(b"x" * MIB)
    with pytest.raises(StorageError, match="is full"):
        await nodes[0].create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW, image=image)
    assert os.listdir(server.export) == []  # noqa: PTH208 - Names are what it is about.


async def test_a_size_that_no_file_can_have_changes_nothing(
    nodes: tuple[NfsPool, NfsPool], server: NfsServer
) -> None:
    with pytest.raises(StorageError):
        await nodes[0].create(DISK, capacity_bytes=1 << 62, format=DiskFormat.RAW)
    await nodes[0].create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    with pytest.raises(StorageError):
        await nodes[0].resize(DISK, 1 << 62)
    assert (await nodes[0].inspect(DISK)).capacity_bytes == MIB
    assert os.listdir(server.export) == [DISK]  # noqa: PTH208 - Names are what it is about.
