"""Directory pools: copies, cancelled and failed calls, and a hypervisor that holds an image."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.errors import ConflictError, FenceError, InvalidRequest, NotFoundError, StorageError
from migrator.model import DiskFormat, FencingToken, FileSource, PoolName, VolumeName
from storage import copying
from storage.copying import CopyCancelled, copy_image
from storage.directory import DirectoryPool, driver, files
from storage.directory.locks import image_in_use, image_written, pool_lock
from storage.qcow2 import HEADER_BYTES, parse_header

POOL = PoolName("default")
DISK = VolumeName("web-1.disk_0")
MIB = 1024**2
BOTH = list(DiskFormat)
needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")


def t(number: int) -> FencingToken:
    return FencingToken(number)


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, timeout=30)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pool"
    path.mkdir()
    return path


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".ferry.lock")


async def test_a_raw_image_is_copied_with_its_holes_and_grown(folder: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.write(b"begin")
        file.seek(40 * MIB)
        file.write(b"end")
        file.truncate(50 * MIB)
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

    monkeypatch.setattr(driver, "copy_image", full)
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    pool = DirectoryPool(POOL, folder)
    with pytest.raises(StorageError, match="is full"):
        await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW, image=image)
    assert leftovers(folder) == []


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

    monkeypatch.setattr(driver, "copy_image", slow)
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


# --- a hypervisor that holds the image -------------------------------------------------------


@pytest.fixture
def image(folder: Path) -> Path:
    path = folder / f"{DISK}.raw"
    path.write_bytes(bytes(MIB))
    return path


class Holder:
    """A qemu-io that has an image open, as a running guest's QEMU has."""

    def __init__(self, image: Path, *flags: str) -> None:
        self.process = subprocess.Popen(
            ["qemu-io", *flags, "-f", "raw", str(image)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + 10
        while not image_in_use(image):
            assert time.monotonic() < deadline_s
            time.sleep(0.005)

    def end(self) -> None:
        """Idempotent."""
        if self.process.poll() is None:
            self.process.communicate(b"quit\n", timeout=10)


@pytest.fixture
def writer(image: Path) -> Iterator[Holder]:
    holder = Holder(image)
    yield holder
    holder.end()


@pytest.mark.skipif(not shutil.which("qemu-io"), reason="needs qemu-io")
class TestHypervisorLocks:
    def test_a_reader_is_no_writer(self, image: Path) -> None:
        assert not image_in_use(image)
        holder = Holder(image, "-r")
        try:
            assert image_in_use(image)
            assert not image_written(image)
        finally:
            holder.end()
        assert not image_in_use(image)

    async def test_a_volume_in_use_is_not_deleted(self, folder: Path, writer: Holder) -> None:
        pool = DirectoryPool(POOL, folder)
        with pytest.raises(ConflictError, match="uses"):
            await pool.delete(DISK)
        await asyncio.to_thread(writer.end)
        await pool.delete(DISK)

    async def test_a_writer_under_an_older_token_stops_the_fence(
        self, folder: Path, writer: Holder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(driver, "FENCE_WAIT_S", 0.05)
        pool = DirectoryPool(POOL, folder)
        with pytest.raises(FenceError, match="still writes"):
            await pool.fence(DISK, t(2))
        assert await pool.verify(DISK) is None

    async def test_a_fence_waits_for_a_source_that_lets_go(
        self, folder: Path, writer: Holder
    ) -> None:
        pool = DirectoryPool(POOL, folder)
        fencing = asyncio.create_task(pool.fence(DISK, t(2)))
        await asyncio.sleep(0.05)
        assert not fencing.done()
        await asyncio.to_thread(writer.end)
        await fencing
        assert await pool.verify(DISK) == 2

    async def test_a_repeated_fence_allows_its_owner_to_write(
        self, folder: Path, image: Path
    ) -> None:
        pool = DirectoryPool(POOL, folder)
        await pool.fence(DISK, t(2))
        holder = await asyncio.to_thread(Holder, image)
        try:
            await pool.fence(DISK, t(2))
        finally:
            await asyncio.to_thread(holder.end)


# --- the qcow2 header ------------------------------------------------------------------------


@needs_qemu_img
@pytest.mark.parametrize("options", ["compat=0.10", "compat=1.1", "cluster_size=2M"])
def test_the_header_of_what_qemu_makes(tmp_path: Path, options: str) -> None:
    path = tmp_path / "x.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "123M")
    header = parse_header(path.read_bytes()[:HEADER_BYTES])
    assert header.capacity_bytes == 123 * MIB
    assert header.version == (2 if "0.10" in options else 3)
    assert header.cluster_bytes == (2 * MIB if "2M" in options else 65536)
    assert not header.backing_file
    assert not header.external_data


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"QFI\xfb",
        b"\x00" * HEADER_BYTES,
        b"QFI\xfb" + (9).to_bytes(4, "big") + bytes(96),
        b"QFI\xfb" + (3).to_bytes(4, "big") + bytes(96),
        b"QFI\xfb" + (3).to_bytes(4, "big") + bytes(12) + (16).to_bytes(4, "big") + bytes(50),
    ],
)
def test_what_is_no_qcow2_header_is_refused(head: bytes) -> None:
    with pytest.raises(StorageError):
        parse_header(head)
