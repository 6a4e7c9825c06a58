"""What every storage driver keeps to: a suite that a driver's tests inherit.

    class TestContract(VolumeContract): ...    with a fixture `nodes`, the pool as a and b see it
    class TestFences(FenceContract): ...       where the storage itself refuses a fenced writer

The pool is empty at the start of each test.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest

from migrator.errors import ConflictError, FenceError, InvalidRequest, NotFoundError
from migrator.model import DiskFormat, FencingToken, NodeName, PoolName, PoolOwner, VolumeName
from migrator.ports import VolumeDriver
from tests.contract.writers import Writer

POOL = PoolName("default")
DISK = VolumeName("web-1.disk_0")
MIB = 1024**2
BOTH = list(DiskFormat)
Nodes = tuple[VolumeDriver, VolumeDriver]
STALE_S = 0.7
"""How long a fenced writer gets; one that waits for its server isn't acknowledged either."""
needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")


def t(number: int) -> FencingToken:
    return FencingToken(number)


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, timeout=30)


def image_with_holes(folder: Path) -> Path:
    """50 MiB, with a few words at its begin and after 40 MiB."""
    image = folder / "image"
    with image.open("wb") as file:
        file.write(b"begin")
        file.seek(40 * MIB)
        file.write(b"end" * 30_000)
        file.truncate(50 * MIB)
    return image


class VolumeContract:
    """See the module."""

    formats: ClassVar[frozenset[DiskFormat]] = frozenset(BOTH)
    """Those that the driver has; it refuses the others by name."""
    tells_owner: ClassVar[bool] = True
    """Whether the storage has a place where it can say whose pool it is."""

    @pytest.fixture
    def pool(self, nodes: Nodes) -> VolumeDriver:
        return nodes[0]

    async def made(self, pool: VolumeDriver, format: DiskFormat, capacity_bytes: int) -> bool:
        """Whether DISK was made; False: the driver has no such format, and says so."""
        if format in self.formats:
            await pool.create(DISK, capacity_bytes=capacity_bytes, format=format)
            return True
        with pytest.raises(InvalidRequest) as raised:
            await pool.create(DISK, capacity_bytes=capacity_bytes, format=format)
        assert "format" in raised.value.fields
        assert list(await pool.list_volumes()) == []
        return False

    @needs_qemu_img
    @pytest.mark.parametrize("format", BOTH)
    async def test_a_created_volume_is_there_on_every_node(
        self, nodes: Nodes, format: DiskFormat
    ) -> None:
        if not await self.made(nodes[0], format, 64 * MIB):
            return
        created = await nodes[0].inspect(DISK)
        assert (created.pool, created.name, created.format) == (POOL, DISK, format)
        assert created.capacity_bytes == 64 * MIB
        assert created.allocated_bytes < MIB, "sparse"
        for node in nodes:
            assert await node.inspect(DISK) == created
            assert list(await node.list_volumes()) == [created]

    async def test_a_name_is_taken_once(self, nodes: Nodes) -> None:
        await nodes[0].create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
        for kind in self.formats:
            with pytest.raises(ConflictError):
                await nodes[1].create(DISK, capacity_bytes=2 * MIB, format=kind)
        assert (await nodes[0].inspect(DISK)).capacity_bytes == MIB

    async def test_one_of_many_that_create_at_once_wins(self, nodes: Nodes) -> None:
        tries = [node.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW) for node in nodes * 4]
        results = await asyncio.gather(*tries, return_exceptions=True)
        assert sum(isinstance(result, ConflictError) for result in results) == len(results) - 1
        assert len(await nodes[0].list_volumes()) == 1

    @pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "x" * 128, "a\n", "a\0b", "-x"])
    async def test_a_name_that_leaves_the_pool_is_refused(
        self, pool: VolumeDriver, name: str
    ) -> None:
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
    async def test_a_capacity_is_whole_sectors(
        self, pool: VolumeDriver, capacity_bytes: int
    ) -> None:
        with pytest.raises(InvalidRequest):
            await pool.create(DISK, capacity_bytes=capacity_bytes, format=DiskFormat.RAW)
        assert list(await pool.list_volumes()) == []

    async def test_what_is_not_there_is_not_found(self, pool: VolumeDriver) -> None:
        for call in (pool.inspect, pool.delete, pool.verify):
            with pytest.raises(NotFoundError):
                await call(DISK)
        with pytest.raises(NotFoundError):
            await pool.open(DISK, t(1), read_only=False)
        with pytest.raises(NotFoundError):
            await pool.fence(DISK, t(1))
        await pool.close(DISK, t(1))

    async def test_delete_removes_the_volume_and_its_token(self, pool: VolumeDriver) -> None:
        await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
        await pool.fence(DISK, t(7))
        await pool.delete(DISK)
        assert list(await pool.list_volumes()) == []
        await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
        assert await pool.verify(DISK) is None

    async def test_open_and_close_are_idempotent(self, nodes: Nodes) -> None:
        await nodes[0].create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
        first = await nodes[0].open(DISK, t(1), read_only=False)
        assert (first.format, first.read_only) == (DiskFormat.RAW, False)
        assert await nodes[0].open(DISK, t(1), read_only=False) == first
        assert (await nodes[1].open(DISK, t(2), read_only=True)).read_only
        for _ in range(2):
            await nodes[0].close(DISK, t(1))
            await nodes[1].close(DISK, t(2))
        await nodes[0].delete(DISK)

    async def test_what_a_removed_node_had_open_keeps_nobody_from_deleting_it(
        self, nodes: Nodes
    ) -> None:
        """A fence shuts out writers, and nobody but the node itself closed what it reads."""
        await self.made(nodes[0], DiskFormat.RAW, MIB)
        await nodes[1].open(DISK, t(5), read_only=True)
        await nodes[0].evict(DISK, [NodeName("a")])
        await nodes[0].evict(DISK, [NodeName("a")])
        await nodes[0].delete(DISK)

    async def test_a_fence_only_grows(self, nodes: Nodes) -> None:
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

    async def test_the_newest_of_many_fences_stands(self, nodes: Nodes) -> None:
        await nodes[0].create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
        fences = [node.fence(DISK, t(n)) for n in (3, 9, 1, 7) for node in nodes]
        results = await asyncio.gather(*fences, return_exceptions=True)
        assert all(result is None or isinstance(result, FenceError) for result in results)
        assert await nodes[1].verify(DISK) == 9

    async def test_an_image_that_is_missing_or_too_large_is_refused(
        self, pool: VolumeDriver, tmp_path: Path
    ) -> None:
        image = tmp_path / "image"
        image.write_bytes(b"x" * 4096)
        for bad, capacity_bytes in ((tmp_path / "none", MIB), (image, 2048)):
            with pytest.raises(InvalidRequest):
                await pool.create(
                    DISK, capacity_bytes=capacity_bytes, format=DiskFormat.RAW, image=bad
                )
        assert list(await pool.list_volumes()) == []

    @needs_qemu_img
    @pytest.mark.parametrize("format", BOTH)
    async def test_a_volume_only_grows(self, nodes: Nodes, format: DiskFormat) -> None:
        if not await self.made(nodes[0], format, 2 * MIB):
            return
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
    async def test_a_clone_is_a_volume_of_its_own(self, nodes: Nodes, format: DiskFormat) -> None:
        copy = VolumeName("copy")
        if not await self.made(nodes[0], format, 2 * MIB):
            return
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

    async def test_both_nodes_see_one_storage(self, nodes: Nodes) -> None:
        """By its mark, by the device's name, and by what either has opened, where those tell."""
        a, b = nodes
        await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
        assert await a.mark() == await b.mark()
        assert await a.identity(DISK) == await b.identity(DISK)
        await a.open(DISK, t(1), read_only=False)
        shown = await a.shows_opened(DISK, NodeName("b"), t(2))
        assert shown in (False, None)
        await b.open(DISK, t(2), read_only=False)
        for node in nodes:
            await node.reach(DISK)
        assert await a.shows_opened(DISK, NodeName("b"), t(2)) is (None if shown is None else True)
        assert await a.shows_opened(DISK, NodeName("b"), t(3)) is shown
        await b.close(DISK, t(2))
        await a.close(DISK, t(1))

    async def test_a_pool_is_one_clusters_until_it_is_taken_over(self, nodes: Nodes) -> None:
        """Of two clusters that come at once one has it, and both see which."""
        a, b = nodes
        made = await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
        mark = await a.mark()  # As an older release left it.
        one, other = PoolOwner(identity="1", node="a"), PoolOwner(identity="2", name="x", node="b")
        assert (await a.owner(), await b.owner()) == (None, None)
        if not self.tells_owner:
            assert await a.owner(one) is None
            return
        claims = [node.owner(claimant) for node in nodes * 2 for claimant in (one, other)]
        first, *rest = await asyncio.gather(*claims)
        assert first in (one, other) and set(rest) == {first}
        loser = other if first == one else one
        for wrong in (None, "3", loser.identity):
            assert await b.owner(loser, instead_of=wrong) == first
        renamed = PoolOwner(identity=first.identity, name="renamed", node="c")
        assert await a.owner(renamed, instead_of=first.identity) == first
        assert await b.owner(loser, instead_of=first.identity) == loser
        assert (await a.owner(), await a.owner(renamed)) == (loser, loser)
        assert await b.mark() == mark
        assert list(await a.list_volumes()) == [made]

    async def test_health_and_fencing_are_told(self, pool: VolumeDriver) -> None:
        health = await pool.health()
        assert health.reachable
        assert health.reason is None
        if health.capacity_bytes is not None and health.free_bytes is not None:
            assert 0 <= health.free_bytes <= health.capacity_bytes
        assert pool.fencing.method
        assert pool.fences_remote_writers is pool.fencing.remote_writers


class FenceContract:
    """A second, stale writer: what it writes after the fence never reaches the volume."""

    @staticmethod
    async def writer(node: VolumeDriver, token: int, mark: int) -> Writer:
        source = await node.open(DISK, t(token), read_only=False)
        return await asyncio.to_thread(Writer, source, mark)

    async def test_the_one_that_the_fence_names_writes_and_nobody_else(self, nodes: Nodes) -> None:
        """A handoff, and the give-back after it."""
        a, b = nodes
        await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
        first = await self.writer(a, 1, 0xA1)
        await a.fence(DISK, t(1))
        assert first.write()
        second = await self.writer(b, 2, 0xB2)
        await b.fence(DISK, t(2))
        assert second.reads(0xA1)
        assert second.write()
        assert not first.write(within_s=STALE_S)
        assert not first.write(MIB // 2, within_s=STALE_S)
        assert second.reads(0xB2)
        assert second.reads(0, MIB // 2)
        await b.fence(DISK, t(2))
        assert second.write(), "repeating a fence changes nothing"
        first.end()
        await a.fence(DISK, t(3))
        third = await self.writer(a, 3, 0xA3)
        assert third.write()
        assert not second.write(within_s=STALE_S)
        second.end()
        assert third.reads(0xA3)
        third.end()

    async def test_a_rollback_leaves_the_writing_to_what_was_open_before(
        self, nodes: Nodes
    ) -> None:
        """Also a second one, and after the agent was restarted (which `nodes` may show)."""
        a, b = nodes
        await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
        source = await self.writer(a, 1, 0xA1)
        await a.fence(DISK, t(1))
        for token in (2, 3):
            destination = await self.writer(b, token, 0xB0 + token)
            await a.fence(DISK, t(token))
            assert source.write()
            assert not destination.write(within_s=STALE_S)
            destination.end()
            await b.close(DISK, t(token))
            assert source.reads(0xA1)
        assert await b.verify(DISK) == 3
        with pytest.raises(FenceError):
            await b.fence(DISK, t(2))
        assert source.write()
        source.end()

    async def test_a_destination_that_won_but_never_ran_gives_back(self, nodes: Nodes) -> None:
        a, b = nodes
        await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
        source = await self.writer(a, 1, 0xA1)
        await a.fence(DISK, t(1))
        destination = await self.writer(b, 2, 0xB2)
        await b.fence(DISK, t(2))
        await a.fence(DISK, t(3))
        assert source.write()
        assert not destination.write(within_s=STALE_S)
        destination.end()
        assert source.reads(0xA1)
        source.end()

    async def test_any_node_completes_a_fence(self, nodes: Nodes) -> None:
        """One that repeats another's fence leaves the writing where it is."""
        a, b = nodes
        await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
        source = await self.writer(a, 1, 0xA1)
        await a.fence(DISK, t(1))
        destination = await self.writer(b, 2, 0xB2)
        await b.fence(DISK, t(2))
        await a.fence(DISK, t(2))
        assert destination.write()
        assert not source.write(within_s=STALE_S)
        for writer in (source, destination):
            writer.end()

    async def test_a_node_that_has_nothing_open_shuts_everybody_out(self, nodes: Nodes) -> None:
        """As before a takeover: nobody writes until the new owner has opened it."""
        a, b = nodes
        await a.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
        source = await self.writer(a, 1, 0xA1)
        await a.fence(DISK, t(1))
        await b.fence(DISK, t(2))
        assert not source.write(within_s=STALE_S)
        source.end()
        owner = await self.writer(b, 2, 0xB2)
        await b.fence(DISK, t(2))
        assert owner.write()
        owner.end()
