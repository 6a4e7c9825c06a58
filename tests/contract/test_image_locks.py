"""A directory pool's volume that a hypervisor of this host has open: what its locks tell."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.errors import ConflictError, FenceError
from storage.directory import DirectoryPool, driver
from storage.directory.locks import image_in_use, image_written
from tests.contract.volume_contract import DISK, MIB, POOL, t


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
