"""What every storage driver keeps to, and what the simulated one records."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from migrator.errors import ConflictError, FenceError, InvalidRequest, NotFoundError, StorageError
from migrator.model import DiskFormat, FencingToken, FileSource, NodeName, PoolName, VolumeName
from migrator.ports import VolumeDriver
from storage.directory import DirectoryPool
from storage.drivers import DRIVERS
from storage.simulated import PoolFaults, SharedVolumes, SimulatedPool

POOL = PoolName("default")
DISK = VolumeName("web-1.disk_0")
MIB = 1024**2
BOTH = list(DiskFormat)
needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")


def t(number: int) -> FencingToken:
    return FencingToken(number)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pool"
    path.mkdir()
    return path


@pytest.fixture(params=["simulated", "directory"])
def nodes(request: pytest.FixtureRequest, folder: Path) -> tuple[VolumeDriver, VolumeDriver]:
    """The same pool as two nodes see it."""
    assert set(DRIVERS) == {"simulated", "directory"}
    if request.param == "directory":
        return DirectoryPool(POOL, folder), DirectoryPool(POOL, folder)
    shared = SharedVolumes()
    first, second = (SimulatedPool(POOL, shared, NodeName(name)) for name in "ab")
    return first, second


@pytest.fixture
def pool(nodes: tuple[VolumeDriver, VolumeDriver]) -> VolumeDriver:
    return nodes[0]


@needs_qemu_img
@pytest.mark.parametrize("format", BOTH)
async def test_a_created_volume_is_there_on_every_node(
    nodes: tuple[VolumeDriver, VolumeDriver], format: DiskFormat
) -> None:
    created = await nodes[0].create(DISK, capacity_bytes=64 * MIB, format=format)
    assert (created.pool, created.name, created.format) == (POOL, DISK, format)
    assert created.capacity_bytes == 64 * MIB
    assert created.allocated_bytes < MIB, "sparse"
    for node in nodes:
        assert await node.inspect(DISK) == created
        assert list(await node.list_volumes()) == [created]


async def test_a_name_is_taken_once(nodes: tuple[VolumeDriver, VolumeDriver]) -> None:
    await nodes[0].create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    for kind in BOTH:
        with pytest.raises(ConflictError):
            await nodes[1].create(DISK, capacity_bytes=2 * MIB, format=kind)
    assert (await nodes[0].inspect(DISK)).capacity_bytes == MIB


async def test_one_of_many_that_create_at_once_wins(
    nodes: tuple[VolumeDriver, VolumeDriver],
) -> None:
    tries = [node.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW) for node in nodes * 4]
    results = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(isinstance(result, ConflictError) for result in results) == len(results) - 1
    assert len(await nodes[0].list_volumes()) == 1


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "x" * 128, "a\n", "a\0b", "-x"])
async def test_a_name_that_leaves_the_pool_is_refused(pool: VolumeDriver, name: str) -> None:
    volume = VolumeName(name)
    with pytest.raises(InvalidRequest) as raised:
        await pool.create(volume, capacity_bytes=MIB, format=DiskFormat.RAW)
    assert "volume" in raised.value.fields
    for call in (pool.inspect, pool.delete, pool.verify):
        with pytest.raises(InvalidRequest):
            await call(volume)
    with pytest.raises(InvalidRequest):
        await pool.open(volume, t(1), read_only=False)
    with pytest.raises(InvalidRequest):
        await pool.fence(volume, t(1))


@pytest.mark.parametrize("capacity_bytes", [0, -512, 1000])
async def test_a_capacity_is_whole_sectors(pool: VolumeDriver, capacity_bytes: int) -> None:
    with pytest.raises(InvalidRequest):
        await pool.create(DISK, capacity_bytes=capacity_bytes, format=DiskFormat.RAW)
    assert list(await pool.list_volumes()) == []


async def test_what_is_not_there_is_not_found(pool: VolumeDriver) -> None:
    for call in (pool.inspect, pool.delete, pool.verify):
        with pytest.raises(NotFoundError):
            await call(DISK)
    with pytest.raises(NotFoundError):
        await pool.open(DISK, t(1), read_only=False)
    with pytest.raises(NotFoundError):
        await pool.fence(DISK, t(1))
    await pool.close(DISK, t(1))


async def test_delete_removes_the_volume_and_its_token(pool: VolumeDriver) -> None:
    await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    await pool.fence(DISK, t(7))
    await pool.delete(DISK)
    assert list(await pool.list_volumes()) == []
    await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    assert await pool.verify(DISK) is None


async def test_open_and_close_are_idempotent(nodes: tuple[VolumeDriver, VolumeDriver]) -> None:
    await nodes[0].create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    first = await nodes[0].open(DISK, t(1), read_only=False)
    assert isinstance(first, FileSource)
    assert (first.format, first.read_only) == (DiskFormat.RAW, False)
    assert await nodes[0].open(DISK, t(1), read_only=False) == first
    assert (await nodes[1].open(DISK, t(2), read_only=True)).read_only
    for _ in range(2):
        await nodes[0].close(DISK, t(1))
        await nodes[1].close(DISK, t(2))
    await nodes[0].delete(DISK)


async def test_a_fence_only_grows(nodes: tuple[VolumeDriver, VolumeDriver]) -> None:
    source, destination = nodes
    await source.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    assert await source.verify(DISK) is None
    await source.fence(DISK, t(3))
    await destination.fence(DISK, t(4))
    await destination.fence(DISK, t(4))
    assert await source.verify(DISK) == 4
    with pytest.raises(FenceError):
        await source.fence(DISK, t(3))
    assert await destination.verify(DISK) == 4
    with pytest.raises(FenceError):
        await source.open(DISK, t(3), read_only=False)
    await destination.open(DISK, t(4), read_only=False)
    with pytest.raises(FenceError):
        await source.fence(DISK, t(0))


async def test_the_newest_of_many_fences_stands(nodes: tuple[VolumeDriver, VolumeDriver]) -> None:
    await nodes[0].create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    fences = [node.fence(DISK, t(n)) for n in (3, 9, 1, 7) for node in nodes]
    results = await asyncio.gather(*fences, return_exceptions=True)
    assert all(result is None or isinstance(result, FenceError) for result in results)
    assert await nodes[1].verify(DISK) == 9


async def test_an_image_that_is_missing_or_too_large_is_refused(
    pool: VolumeDriver, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 4096)
    for bad, capacity_bytes in ((tmp_path / "none", MIB), (image, 2048)):
        with pytest.raises(InvalidRequest):
            await pool.create(DISK, capacity_bytes=capacity_bytes, format=DiskFormat.RAW, image=bad)
    assert list(await pool.list_volumes()) == []


@needs_qemu_img
@pytest.mark.parametrize("format", BOTH)
async def test_a_volume_only_grows(
    nodes: tuple[VolumeDriver, VolumeDriver], format: DiskFormat
) -> None:
    await nodes[0].create(DISK, capacity_bytes=2 * MIB, format=format)
    for wrong in (0, MIB, 2 * MIB + 1):
        with pytest.raises(InvalidRequest) as raised:
            await nodes[1].resize(DISK, wrong)
        assert "capacity_bytes" in raised.value.fields
    for capacity_bytes in (2 * MIB, 8 * MIB):
        grown = await nodes[1].resize(DISK, capacity_bytes)
        assert grown == await nodes[0].inspect(DISK)
        assert (grown.capacity_bytes, grown.format) == (capacity_bytes, format)
    with pytest.raises(NotFoundError):
        await nodes[0].resize(VolumeName("none"), 8 * MIB)


@needs_qemu_img
@pytest.mark.parametrize("format", BOTH)
async def test_a_clone_is_a_volume_of_its_own(
    nodes: tuple[VolumeDriver, VolumeDriver], format: DiskFormat
) -> None:
    copy = VolumeName("copy")
    await nodes[0].create(DISK, capacity_bytes=2 * MIB, format=format)
    await nodes[0].fence(DISK, t(5))
    made = await nodes[1].clone(DISK, copy)
    assert (made.name, made.capacity_bytes, made.format) == (copy, 2 * MIB, format)
    assert made.backing is None
    assert await nodes[0].verify(copy) is None
    with pytest.raises(ConflictError):
        await nodes[0].clone(DISK, copy)
    with pytest.raises(NotFoundError):
        await nodes[0].clone(VolumeName("none"), VolumeName("other"))
    for wrong in ("../x", ""):
        with pytest.raises(InvalidRequest):
            await nodes[0].clone(DISK, VolumeName(wrong))
    await nodes[0].delete(DISK)
    assert await nodes[0].inspect(copy) == made


async def test_health_and_fencing_are_told(pool: VolumeDriver) -> None:
    health = await pool.health()
    assert health.reachable
    assert health.reason is None
    if health.capacity_bytes is not None and health.free_bytes is not None:
        assert 0 <= health.free_bytes <= health.capacity_bytes
    assert pool.fencing.method
    assert pool.fences_remote_writers is pool.fencing.remote_writers


# --- simulated -------------------------------------------------------------------------------


async def test_the_simulation_records_writes_under_old_tokens() -> None:
    for enforces in (True, False):
        shared = SharedVolumes(enforces=enforces)
        source = SimulatedPool(POOL, shared, NodeName("a"))
        destination = SimulatedPool(POOL, shared, NodeName("b"))
        await source.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
        await source.fence(DISK, t(1))
        source.write(DISK, t(1))
        await destination.fence(DISK, t(2))
        destination.write(DISK, t(2))
        assert source.fences_remote_writers is enforces
        if enforces:
            with pytest.raises(StorageError):
                source.write(DISK, t(1))
        else:
            source.write(DISK, t(1))
        assert len(shared.stale_writes()) == (0 if enforces else 1)
        assert shared.writers(DISK) == {1: 1 if enforces else 2, 2: 1}


async def test_simulated_faults() -> None:
    faults = PoolFaults()
    pool = SimulatedPool(POOL, faults=faults, timeout_s=0.05)
    await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    faults.full = True
    with pytest.raises(StorageError, match="full"):
        await pool.create(VolumeName("b"), capacity_bytes=MIB, format=DiskFormat.RAW)
    faults.stalled = True
    with pytest.raises(StorageError, match="no answer"):
        await pool.inspect(DISK)
    with pytest.raises(FenceError, match="unconfirmed"):
        await pool.fence(DISK, t(1))
    with pytest.raises(StorageError):
        pool.write(DISK, t(1))
    faults.lost = True
    with pytest.raises(StorageError, match="lost"):
        await pool.list_volumes()
    faults.lost = faults.stalled = False
    await pool.fence(DISK, t(1))
