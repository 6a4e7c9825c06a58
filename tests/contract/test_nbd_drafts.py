"""What is left on an NBD server of agents, provisioners and nodes that died: nothing for good."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.errors import ConflictError
from migrator.model import DiskFormat, FencingToken, NodeName, VolumeName
from storage.nbd import NbdPool
from storage.nbd import protocol as p
from storage.nbd.volumes import ABANDONED_AFTER_S
from storage.settings import NbdSettings
from tests.contract.storage_servers import ADDRESS, NbdServer, in_new_namespace, listens
from tests.contract.volume_contract import DISK, MIB

pytestmark = [
    pytest.mark.lab,
    pytest.mark.allow_blocking("the servers are driven by plain pipes"),
]
OTHER = VolumeName("other")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NbdServer]:
    with in_new_namespace(), NbdServer(tmp_path) as running:
        yield running


def pool_of(server: NbdServer, node: str = "a") -> NbdPool:
    settings = NbdSettings(name="default", provisioner=f"{ADDRESS}:{server.port}")
    return NbdPool(settings, NodeName(node))


async def drafted(pool: NbdPool) -> p.Answer:
    """As an agent begins to fill a volume; then it dies."""
    return await pool._ask(p.Create(volume=DISK, capacity_bytes=MIB, draft=True))


async def test_a_killed_provisioner_s_drafts_keep_no_port(server: NbdServer) -> None:
    """The next one gave their port to each volume that was to be opened: none ever was."""
    pool = pool_of(server)
    left = await drafted(pool)
    assert left.export is not None and left.draft is not None
    server.provisioner.kill()
    server.provisioner.start()
    assert not listens(left.export.port)
    names = await asyncio.to_thread(os.listdir, server.folder)
    assert not [name for name in names if left.draft in name]
    await pool.create(OTHER, capacity_bytes=MIB, format=DiskFormat.RAW)
    opened = await pool.open(OTHER, FencingToken(1), read_only=False)
    assert opened.port == left.export.port  # type: ignore[union-attr]


async def test_a_port_that_somebody_else_has_is_left_to_him(server: NbdServer) -> None:
    pool = pool_of(server)
    await pool.create(OTHER, capacity_bytes=MIB, format=DiskFormat.RAW)
    first = server.port + 1000
    with socket.create_server((ADDRESS, first)):
        opened = await pool.open(OTHER, FencingToken(1), read_only=False)
    assert opened.port == first + 1  # type: ignore[union-attr]


async def test_a_dead_agent_s_draft_goes_after_a_day(server: NbdServer) -> None:
    pool = pool_of(server)
    left, fresh = await drafted(pool), await drafted(pool)
    assert left.export is not None and left.draft is not None and fresh.draft is not None
    path = server.folder / left.draft
    changed_s = (await asyncio.to_thread(path.stat)).st_mtime - ABANDONED_AFTER_S - 60
    os.utime(path, (changed_s, changed_s))
    new = await drafted(pool)
    assert not await asyncio.to_thread(path.exists)
    assert new.export is not None and new.export.port == left.export.port, "it was free by then"
    assert await asyncio.to_thread((server.folder / fresh.draft).exists)


async def test_what_a_removed_node_reads_keeps_no_volume(server: NbdServer) -> None:
    """Nobody closed it any more: the volume could never be deleted."""
    gone, pool = pool_of(server, "gone"), pool_of(server)
    await pool.create(OTHER, capacity_bytes=MIB, format=DiskFormat.RAW)
    opened = await gone.open(OTHER, FencingToken(7), read_only=True)
    kept = await pool.open(OTHER, FencingToken(3), read_only=True)
    with pytest.raises(ConflictError, match="node gone has volume other open"):
        await pool.delete(OTHER)
    writer = await gone.open(OTHER, FencingToken(7), read_only=False)
    await pool.evict(OTHER, [NodeName("a"), NodeName("b")])
    assert listens(writer.port), "writers are the fence's"  # type: ignore[union-attr]
    assert not listens(opened.port)  # type: ignore[union-attr]
    await gone.close(OTHER, FencingToken(7))
    assert listens(kept.port)  # type: ignore[union-attr]
    with pytest.raises(ConflictError, match="node a has volume other open"):
        await pool.delete(OTHER)
    await pool.close(OTHER, FencingToken(3))
    await pool.delete(OTHER)
