"""A pool without any room left: what must be written all the same, and what is refused whole.

A guest that doesn't write anything new runs on there, and may be moved away, when its fence is due.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.errors import FenceError, StorageError
from migrator.model import DiskFormat, FencingToken, VolumeName
from storage.directory import DirectoryPool
from storage.nbd.volumes import ExportState, VolumeFolder, VolumeState
from tests.contract.storage_servers import fill, small_file_system
from tests.contract.volume_contract import DISK, MIB, POOL, needs_qemu_img

pytestmark = pytest.mark.lab


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "pool", MIB) as made:
        yield made


def visible(folder: Path) -> list[str]:
    """The volumes, and what may be left of half made ones."""
    return sorted(path.name for path in folder.iterdir() if "lock" not in path.name)


async def test_a_directory_pool_is_fenced_though_it_is_full(folder: Path) -> None:
    """Else a guest that was just handed over would stand still until somebody makes room."""
    pool = DirectoryPool(POOL, folder)
    await pool.create(DISK, capacity_bytes=16 * MIB, format=DiskFormat.RAW)
    await pool.fence(DISK, FencingToken(9))
    filler = fill(folder)
    for token in (10, 11):
        await pool.fence(DISK, FencingToken(token))
        assert await pool.verify(DISK) == token
    with pytest.raises(FenceError):
        await pool.fence(DISK, FencingToken(10))
    filler.unlink()
    await pool.fence(DISK, FencingToken(12))
    assert await pool.verify(DISK) == 12
    assert visible(folder) == [f".{DISK}.token", f"{DISK}.raw"]


def test_an_nbd_provisioner_writes_its_fences_down_though_its_folder_is_full(folder: Path) -> None:
    volumes = VolumeFolder(folder)
    volumes.publish(volumes.make_draft(DISK, 16 * MIB), DISK)
    exports = tuple(ExportState(node=name, token=7, port=10810) for name in ("n1", "n2"))
    volumes.write_state(DISK, VolumeState(fence=7, exports=exports))
    fill(folder)
    for state in (VolumeState(fence=8, exports=exports), VolumeState(fence=9)):
        volumes.write_state(DISK, state)
        assert volumes.read_state(DISK) == state
    many = tuple(ExportState(node=f"n{number}", token=7, port=number) for number in range(200))
    with pytest.raises(OSError, match="No space left"):
        volumes.write_state(DISK, VolumeState(fence=10, exports=many))
    assert volumes.read_state(DISK) == VolumeState(fence=9), "what doesn't fit changes nothing"


@needs_qemu_img
@pytest.mark.parametrize("format", list(DiskFormat))
async def test_what_doesnt_fit_is_refused_in_words_and_leaves_nothing(
    folder: Path, tmp_path: Path, format: DiskFormat
) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 4 * MIB)
    if format is DiskFormat.QCOW2:
        image = tmp_path / "image.qcow2"
        pool = DirectoryPool(POOL, tmp_path)
        await pool.create(VolumeName("image"), capacity_bytes=4 * MIB, format=format)
        with image.open("ab") as file:
            file.write(b"x" * 4 * MIB)
    pool = DirectoryPool(POOL, folder)
    with pytest.raises(StorageError, match="pool default is full"):
        await pool.create(DISK, capacity_bytes=16 * MIB, format=format, image=image)
    assert visible(folder) == []
    await pool.create(DISK, capacity_bytes=16 * MIB, format=DiskFormat.RAW)
