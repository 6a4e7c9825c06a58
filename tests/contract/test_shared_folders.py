"""Directory pools that others use as well: other clusters, and writers on other hosts."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from migrator.errors import ConflictError, StorageError
from migrator.model import DiskFormat, PoolName, PoolOwner, VolumeName
from storage.copying import copy_image
from storage.directory import DirectoryPool, driver

POOL = PoolName("default")
DISK = VolumeName("web-1.disk_0")
MIB = 1024**2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pool"
    path.mkdir()
    return path


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".ferry.lock")


async def test_whose_a_folder_is_when_it_cant_be_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody's: a full folder keeps nobody from his guests. Damaged: nobody goes on."""
    pool, one, other = DirectoryPool(POOL, folder), PoolOwner(identity="1"), PoolOwner(identity="2")
    with pytest.raises(StorageError, match="is missing: is it mounted"):
        await DirectoryPool(POOL, tmp_path / "missing").owner(one)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        assert await pool.owner(one) is None
    assert leftovers(folder) == []
    assert await pool.owner(one) == one
    with monkeypatch.context() as patch:
        patch.setattr("migrator.durable.replace", full)
        with pytest.raises(StorageError, match="is full"):
            await pool.owner(other, instead_of="1")
    assert await pool.owner(other) == one
    (folder / ".ferry.owner").write_text("{")
    with pytest.raises(StorageError, match=r"damaged.*remove the file"):
        await pool.owner(one)
    (folder / ".ferry.owner").unlink()
    assert await pool.owner(other) == other


async def test_what_is_written_to_while_it_is_copied_is_not_cloned(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a resize, which looks for hypervisors only; or from another host."""
    pool = DirectoryPool(POOL, folder)
    await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    image = folder / f"{DISK}.raw"
    os.utime(image, (0, 0))

    def copy_then_write(source: int, destination: int, cancelled: threading.Event) -> None:
        copy_image(source, destination, cancelled)
        image.write_bytes(b"x" * MIB)

    with monkeypatch.context() as patch:
        patch.setattr("storage.copying.copy_image", copy_then_write)
        with pytest.raises(ConflictError, match="written to while it was copied"):
            await pool.clone(DISK, VolumeName("copy"))
    assert leftovers(folder) == [image.name]
    await pool.clone(DISK, VolumeName("copy"))


async def test_of_two_resizes_at_once_the_larger_stands(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smaller one would cut off what a guest has written since."""
    pool = DirectoryPool(POOL, folder)
    await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)

    def another_was_faster(*_: object) -> None:
        os.truncate(folder / f"{DISK}.raw", 8 * MIB)

    monkeypatch.setattr(driver, "check_growth", another_was_faster)
    assert (await pool.resize(DISK, 2 * MIB)).capacity_bytes == 8 * MIB
