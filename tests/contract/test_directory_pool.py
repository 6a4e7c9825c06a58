"""Directory pools: copies, linked clones, cancelled and failed calls."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.errors import (
    ConflictError,
    InvalidRequest,
    NotFoundError,
    StorageError,
    TooLargeError,
)
from migrator.model import DiskFormat, FileSource, VolumeName
from storage import copying
from storage.copying import CopyCancelled, copy_image
from storage.directory import DirectoryPool, files
from storage.directory.locks import pool_lock
from tests.contract.volume_contract import (
    BOTH,
    DISK,
    MIB,
    POOL,
    image_with_holes,
    needs_qemu_img,
    qemu_img,
    t,
)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".ferry.lock")


async def test_a_raw_image_is_copied_with_its_holes_and_grown(folder: Path, tmp_path: Path) -> None:
    image = image_with_holes(tmp_path)
    pool = DirectoryPool(POOL, folder)
    info = await pool.create(DISK, capacity_bytes=60 * MIB, format=DiskFormat.RAW, image=image)
    assert info.capacity_bytes == 60 * MIB
    assert info.allocated_bytes < MIB
    copy = (folder / f"{DISK}.raw").read_bytes()
    assert copy == image.read_bytes() + bytes(10 * MIB)
    assert leftovers(folder) == [f"{DISK}.raw"]


async def test_nodes_can_tell_whether_they_have_the_same_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, also_here = DirectoryPool(POOL, folder), DirectoryPool(POOL, folder)
    marks = await asyncio.gather(*(pool.mark() for pool in (here, also_here, here)))
    assert len(set(marks)) == 1 and marks[0]
    (other := tmp_path / "other").mkdir()
    assert await DirectoryPool(POOL, other).mark() not in (None, marks[0])
    assert leftovers(folder) == [".ferry.mark"]
    with pytest.raises(StorageError, match="is missing: is it mounted"):
        await DirectoryPool(POOL, tmp_path / "missing").mark()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (folder / ".ferry.mark").unlink()
    monkeypatch.setattr(os, "link", full)
    assert await here.mark() is None
    assert leftovers(folder) == []


@needs_qemu_img
async def test_a_qcow2_image_is_copied_and_grown(folder: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    await asyncio.to_thread(qemu_img, "create", "-q", "-f", "qcow2", image, "8M")
    pool = DirectoryPool(POOL, folder)
    info = await pool.create(DISK, capacity_bytes=32 * MIB, format=DiskFormat.QCOW2, image=image)
    assert info.capacity_bytes == 32 * MIB
    await asyncio.to_thread(qemu_img, "check", "-q", "-f", "qcow2", folder / f"{DISK}.qcow2")


@needs_qemu_img
async def test_an_image_that_leans_on_another_or_lies_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    base, overlay = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    create = ("create", "-q", "-f", "qcow2")
    await asyncio.to_thread(qemu_img, *create, base, "8M")
    await asyncio.to_thread(qemu_img, *create, "-b", base, "-F", "qcow2", overlay)
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(MIB))
    pool = DirectoryPool(POOL, folder)
    for image, kind in (
        (overlay, DiskFormat.QCOW2),
        (raw, DiskFormat.QCOW2),
        (base, DiskFormat.RAW),
    ):
        with pytest.raises(InvalidRequest):
            await pool.create(DISK, capacity_bytes=32 * MIB, format=kind, image=image)
    assert leftovers(folder) == []


async def test_a_full_pool_says_so_and_is_left_clean(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: int, destination: int, cancelled: threading.Event) -> None:
        os.pwrite(destination, b"half", 0)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("storage.copying.copy_image", full)
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    pool = DirectoryPool(POOL, folder)
    with pytest.raises(StorageError, match="is full"):
        await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW, image=image)
    assert leftovers(folder) == []


@pytest.fixture
def short_files() -> Iterator[None]:
    """As on a file system whose files end somewhere: this process's may have 64 MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * MIB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("short_files")
async def test_a_size_that_no_file_has_is_told_without_the_half_made_one(folder: Path) -> None:
    pool = DirectoryPool(POOL, folder)
    with pytest.raises(TooLargeError, match=f"^pool {POOL}: File too large$"):
        await pool.create(DISK, capacity_bytes=65 * MIB, format=DiskFormat.RAW)
    assert leftovers(folder) == []
    await pool.create(DISK, capacity_bytes=64 * MIB, format=DiskFormat.RAW)
    with pytest.raises(TooLargeError):
        await pool.resize(DISK, 65 * MIB)
    assert (await pool.inspect(DISK)).capacity_bytes == 64 * MIB


async def test_a_missing_folder_and_a_missing_tool_are_explained(folder: Path) -> None:
    gone = DirectoryPool(POOL, folder / "gone")
    with pytest.raises(StorageError):
        await gone.list_volumes()
    with pytest.raises(StorageError, match="mounted"):
        await gone.inspect(DISK)
    with pytest.raises(StorageError):
        await gone.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    toolless = DirectoryPool(POOL, folder, qemu_img="no-such-qemu-img")
    with pytest.raises(StorageError, match="no-such-qemu-img"):
        await toolless.create(DISK, capacity_bytes=MIB, format=DiskFormat.QCOW2)
    assert leftovers(folder) == []


async def test_a_tool_that_fails_is_quoted(folder: Path) -> None:
    pool = DirectoryPool(POOL, folder, qemu_img="false")
    with pytest.raises(StorageError, match="status 1"):
        await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.QCOW2)
    assert leftovers(folder) == []


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.02, 0.05])
async def test_a_cancelled_create_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_s: float
) -> None:
    def slow(source: int, destination: int, cancelled: threading.Event) -> None:
        os.pwrite(destination, b"half", 0)
        if cancelled.wait(10):
            raise CopyCancelled

    monkeypatch.setattr("storage.copying.copy_image", slow)
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    pool = DirectoryPool(POOL, folder)
    creating = asyncio.create_task(
        pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW, image=image)
    )
    await asyncio.sleep(after_s)
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert leftovers(folder) == []


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.002, 0.004, 0.008, 0.016])
@needs_qemu_img
async def test_a_create_cancelled_at_any_time_is_whole_or_nothing(
    folder: Path, after_s: float
) -> None:
    pool = DirectoryPool(POOL, folder)
    for kind in BOTH:
        creating = asyncio.create_task(pool.create(DISK, capacity_bytes=MIB, format=kind))
        await asyncio.sleep(after_s)
        if creating.cancel():
            with pytest.raises(asyncio.CancelledError):
                await creating
            assert leftovers(folder) == []
        else:
            await pool.delete(DISK)


async def test_half_made_volumes_are_not_listed_and_old_ones_go(folder: Path) -> None:
    pool = DirectoryPool(POOL, folder)
    fresh, old = folder / ".a.raw.1.tmp", folder / ".b.raw.2.tmp"
    for path in (fresh, old):
        path.touch()
    long_ago = time.time() - files.ABANDONED_AFTER_S - 60
    os.utime(old, (long_ago, long_ago))
    (folder / "notes.txt").write_text("not a volume")
    (folder / "broken.qcow2").write_text("not a volume either")
    (folder / "link.raw").symlink_to("/etc/hostname")
    assert list(await pool.list_volumes()) == []
    await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    assert fresh.exists()
    assert not old.exists()


async def test_a_link_is_no_volume(folder: Path) -> None:
    (folder / "link.raw").symlink_to("/etc/hostname")
    pool = DirectoryPool(POOL, folder)
    with pytest.raises(NotFoundError):
        await pool.open(VolumeName("link"), t(1), read_only=True)
    with pytest.raises(ConflictError):
        await pool.create(VolumeName("link"), capacity_bytes=MIB, format=DiskFormat.RAW)


async def test_a_token_file_cut_short_by_a_power_loss_counts_as_none(folder: Path) -> None:
    pool = DirectoryPool(POOL, folder)
    await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    (folder / f".{DISK}.token").write_text("")
    assert await pool.verify(DISK) is None
    (folder / f".{DISK}.token").write_text("what?")
    with pytest.raises(StorageError):
        await pool.fence(DISK, t(1))


async def test_a_pool_whose_lock_is_held_is_given_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.directory.locks.POOL_LOCK_TIMEOUT_S", 0.05)
    pool = DirectoryPool(POOL, folder)
    await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    with pool_lock(folder), pytest.raises(StorageError, match="was held"):
        await pool.fence(DISK, t(1))
    await pool.fence(DISK, t(1))


def test_copying_by_hand_where_the_kernel_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "across devices")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(copying, "CHUNK_BYTES", 1000)
    content = os.urandom(10_000)
    (tmp_path / "a").write_bytes(content)
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("w+b") as destination:
        copy_image(source.fileno(), destination.fileno(), threading.Event())
    assert (tmp_path / "b").read_bytes() == content


# --- linked clones ---------------------------------------------------------------------------


@needs_qemu_img
@pytest.mark.parametrize("kind", BOTH)
async def test_a_linked_clone_leans_on_its_base_which_is_only_read(
    folder: Path, kind: DiskFormat
) -> None:
    pool, clone = DirectoryPool(POOL, folder), VolumeName("clone")
    await pool.create(DISK, capacity_bytes=8 * MIB, format=kind)
    made = await pool.clone(DISK, clone, linked=True)
    assert (made.backing, made.format, made.capacity_bytes) == (DISK, DiskFormat.QCOW2, 8 * MIB)
    opened = await pool.open(clone, t(1), read_only=False)
    assert isinstance(opened, FileSource) and opened.backing is not None
    assert (opened.read_only, opened.backing.read_only) == (False, True)
    assert (opened.backing.path, opened.backing.format) == (f"{folder}/{DISK}.{kind.value}", kind)
    with pytest.raises(ConflictError, match="lean"):
        await pool.open(DISK, t(1), read_only=False)
    with pytest.raises(ConflictError, match="lean"):
        await pool.delete(DISK)
    with pytest.raises(ConflictError, match="lean"):
        await pool.resize(DISK, 16 * MIB)
    await pool.open(DISK, t(1), read_only=True)
    await pool.clone(clone, VolumeName("third"), linked=True)
    with pytest.raises(ConflictError):
        await pool.delete(clone)
    await pool.delete(VolumeName("third"))
    await pool.delete(clone)
    await pool.open(DISK, t(2), read_only=False)
    await pool.delete(DISK)
    assert leftovers(folder) == []


@needs_qemu_img
async def test_a_chain_that_leaves_the_pool_or_loops_is_not_opened(
    folder: Path, tmp_path: Path
) -> None:
    create = ("create", "-q", "-f", "qcow2")
    rebase = ("rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b")
    for name in "ab":
        await asyncio.to_thread(qemu_img, *create, folder / f"{name}.qcow2", "8M")
    await asyncio.to_thread(qemu_img, *create, tmp_path / "secret.qcow2", "8M")
    pool, a = DirectoryPool(POOL, folder), VolumeName("a")
    for bad in (
        "../secret.qcow2",
        str(tmp_path / "secret.qcow2"),
        "none.qcow2",
        ".b.qcow2",
        "nbd:x",
    ):
        await asyncio.to_thread(qemu_img, *rebase, bad, folder / "a.qcow2")
        with pytest.raises(StorageError, match="no volume of the pool"):
            await pool.open(a, t(1), read_only=False)
    await asyncio.to_thread(qemu_img, *rebase, "b.qcow2", folder / "a.qcow2")
    await pool.open(a, t(1), read_only=False)
    await asyncio.to_thread(qemu_img, *rebase, "a.qcow2", folder / "b.qcow2")
    with pytest.raises(StorageError, match="loop"):
        await pool.open(a, t(1), read_only=False)


async def test_an_image_that_is_no_file_is_refused(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    pool = DirectoryPool(POOL, folder)
    for image in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(InvalidRequest, match="no file"):
            await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW, image=image)
    assert leftovers(folder) == []


async def test_a_missing_folder_is_told_by_its_health(folder: Path) -> None:
    health = await DirectoryPool(POOL, folder / "gone").health()
    assert not health.reachable
    assert "mounted" in (health.reason or "")
