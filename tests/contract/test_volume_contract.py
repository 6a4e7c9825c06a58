"""What every storage driver keeps to, and what the simulated one records."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrator.errors import FenceError, StorageError
from migrator.model import DiskFormat, NodeName, VolumeName
from migrator.ports import VolumeDriver
from storage.directory import DirectoryPool
from storage.drivers import DRIVERS
from storage.settings import BY_DRIVER
from storage.simulated import PoolFaults, SharedVolumes, SimulatedPool
from tests.contract.volume_contract import DISK, MIB, POOL, VolumeContract, t


@pytest.fixture(params=["simulated", "directory"])
def nodes(request: pytest.FixtureRequest, folder: Path) -> tuple[VolumeDriver, VolumeDriver]:
    """The same pool as two nodes see it."""
    if request.param == "directory":
        return DirectoryPool(POOL, folder), DirectoryPool(POOL, folder)
    shared = SharedVolumes()
    first, second = (SimulatedPool(POOL, shared, NodeName(name)) for name in "ab")
    return first, second


class TestContract(VolumeContract):
    """What every driver keeps to."""


def test_every_driver_has_settings_and_a_suite() -> None:
    suites = {"simulated", "directory", "nbd", "nfs", "iscsi", "block"}
    assert set(DRIVERS) == set(BY_DRIVER) == suites


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
