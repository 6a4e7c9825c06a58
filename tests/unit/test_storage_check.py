"""The storage of both ends right before the pause: it answers, and it is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrator.errors import RefusedError
from migrator.model import (
    DiskFormat,
    Migration,
    MigrationRequest,
    MigrationState,
    VolumeName,
)
from node_agent.migrations import storage_check
from storage.simulated import SharedVolumes
from tests.unit.migration_world import (
    WEB,
    MigrationWorld,
    check_back_home,
    end_first_pass,
    held_in_precopy,
    migration_world,
)

_S = MigrationState


def quick(monkeypatch: pytest.MonkeyPatch, wait_s: float) -> None:
    monkeypatch.setattr(storage_check, "AGAIN_S", 0.02)
    monkeypatch.setattr(storage_check, "WAIT_S", wait_s)


@pytest.mark.parametrize("node", ["a", "b"])
async def test_a_guest_isnt_paused_while_the_storage_of_either_end_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    """Nobody could fence it at the destination, nor drain its disks at the source."""
    quick(monkeypatch, 60.0)
    async with migration_world(tmp_path, monkeypatch) as world:
        began, live = await held_in_precopy(world)
        faults = (world.a if node == "a" else world.b).node.pool.faults
        faults.lost = True
        end_first_pass(world)
        asked = 0
        reach = world.a.node.pool.reach

        async def counted(volume: VolumeName) -> None:
            nonlocal asked
            asked += 1
            await reach(volume)

        monkeypatch.setattr(world.a.node.pool, "reach", counted)
        await world.until(lambda: asked > 3)
        assert live.state is _S.PRECOPY
        assert world.running() == ["a"]
        faults.lost = False
        assert (await world.ended(began)).state is _S.COMPLETED
        assert world.running() == ["b"]


@pytest.mark.parametrize("node", ["a", "b"])
async def test_storage_that_stays_away_ends_the_migration_and_the_guest_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    quick(monkeypatch, 0.1)
    async with migration_world(tmp_path, monkeypatch) as world:
        began, _ = await held_in_precopy(world)
        (world.a if node == "a" else world.b).node.pool.faults.lost = True
        end_first_pass(world)
        ended = await check_back_home(world, began, _S.FAILED)
        assert ended.error is not None
        assert f"node {node}: the storage of volume default/root can't be used now" in ended.error


async def other_storage(world: MigrationWorld, capacity_bytes: int) -> None:
    """What `default` leads node b to from now on: it has a volume of the same name."""
    world.b.node.pool.shared = SharedVolumes()
    await world.b.node.pool.create(
        VolumeName("root"), capacity_bytes=capacity_bytes, format=DiskFormat.RAW
    )


async def test_a_pool_that_leads_the_nodes_to_different_storage_is_noticed_before_the_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the destination has opened doesn't show at the source's storage."""
    quick(monkeypatch, 0.1)
    async with migration_world(tmp_path, monkeypatch) as world:
        await other_storage(world, 1024**2)
        began: Migration = await world.migrate()
        ended = await check_back_home(world, began, _S.FAILED)
        assert "volume default/root isn't the one that b has opened" in (ended.error or "")


async def test_a_volume_of_another_size_is_another_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        await other_storage(world, 2 * 1024**2)
        with pytest.raises(RefusedError, match="2097152 bytes here and 1048576 at the source"):
            await world.migrate()
        assert world.running() == ["a"]


async def test_another_device_of_the_same_name_is_a_reason_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        names: dict[str, str | None] = {"a": "wwid naa.5", "b": "wwid naa.6"}
        for node in (world.a.node, world.b.node):

            async def identity(volume: VolumeName, name: str = node.name) -> str | None:
                return names[name]

            monkeypatch.setattr(node.pool, "identity", identity)
        request = MigrationRequest(destination="b")
        assert await world.a.manager.check(WEB, request) == [
            "node b: its volume default/root is another device than the source's: wwid naa.6, "
            "there wwid naa.5"
        ]
        for same_or_none in ("wwid naa.5", None):
            names["b"] = same_or_none
            assert await world.a.manager.check(WEB, request) == []
