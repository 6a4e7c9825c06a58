"""The NBD driver with a real provisioner and real exports: the contract, fences, crashes, TLS."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from migrator.errors import ConflictError, FenceError, InvalidRequest, NotFoundError, StorageError
from migrator.model import DiskFormat, NbdSource, NodeName, PoolOwner, VolumeName
from storage.marks import MARK, OWNER
from storage.nbd import NbdPool
from storage.nbd.mending import RESTART_PAUSE_S
from storage.nbd.protocol import PORT, TO_NODE, Answer, Failure, signed
from storage.settings import NbdSettings
from tests.contract.storage_servers import ADDRESS, NbdServer, in_new_namespace
from tests.contract.volume_contract import (
    DISK,
    MIB,
    FenceContract,
    VolumeContract,
    image_with_holes,
    t,
)
from tests.contract.writers import Writer

pytestmark = [
    pytest.mark.lab,
    pytest.mark.allow_blocking("qemu-io and the servers are driven by plain pipes"),
]
RAW = DiskFormat.RAW
Pools = tuple[NbdPool, NbdPool]


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    with in_new_namespace():
        yield


@pytest.fixture(scope="module")
def server(network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NbdServer]:
    with NbdServer(tmp_path_factory.mktemp("nbd")) as running:
        yield running


@pytest.fixture
def secured(network: None, tmp_path: Path) -> Iterator[NbdServer]:
    """One that has a key."""
    (tmp_path / "keys.psk").write_text(f"other:00\nferry:{os.urandom(32).hex()}\n")
    with NbdServer(tmp_path, tls_directory=tmp_path, port=12_000) as running:
        yield running


def pool_of(server: NbdServer, node: str) -> NbdPool:
    tls = None if server.tls_directory is None else str(server.tls_directory)
    settings = NbdSettings(
        name="default",
        provisioner=f"{ADDRESS}:{server.port}",
        tls_directory=tls,
        reconnect_delay_s=20,
    )
    return NbdPool(settings, NodeName(node))


@pytest.fixture
async def nodes(server: NbdServer) -> AsyncIterator[Pools]:
    """The pool as two nodes see it; emptied afterwards."""
    made = pool_of(server, "a"), pool_of(server, "b")
    yield made
    for volume in await made[0].list_volumes():
        for node in made:
            await node.close(VolumeName(volume.name), t(1 << 40))
        await made[0].delete(VolumeName(volume.name))
    for name in (MARK, OWNER):
        (server.folder / name).unlink(missing_ok=True)
    assert os.listdir(server.folder) == []  # noqa: PTH208 - Names are what it is about.


class TestContract(VolumeContract):
    """What every driver keeps to."""

    formats = frozenset({RAW})


class TestFences(FenceContract):
    """The server of an export that was fenced is gone."""


async def test_exports_outlive_the_provisioner_and_come_back_after_a_crash_of_the_host(
    nodes: Pools, server: NbdServer
) -> None:
    a, b = nodes
    await a.create(DISK, capacity_bytes=MIB, format=RAW)
    first = await asyncio.to_thread(Writer, await a.open(DISK, t(1), read_only=False), 0xA1)
    await a.fence(DISK, t(1))
    second = await asyncio.to_thread(Writer, await b.open(DISK, t(2), read_only=False), 0xB2)
    await b.fence(DISK, t(2))
    server.provisioner.kill()
    assert second.write()
    with pytest.raises(FenceError, match="unconfirmed"):
        await b.fence(DISK, t(2))
    health = await a.health()
    assert not health.reachable and ADDRESS in (health.reason or "")
    server.kill_exports()
    server.provisioner.start()
    assert second.write(within_s=30), "the client came back to the same port"
    assert not first.write(within_s=1.5), "what was fenced stays ended"
    assert await a.verify(DISK) == 2
    for writer in (first, second):
        writer.end()


async def test_two_servers_are_told_apart(nodes: Pools, secured: NbdServer) -> None:
    a, b = nodes
    elsewhere = pool_of(secured, "b")
    mark = await a.mark()
    assert mark is not None and await b.mark() == mark
    assert await elsewhere.mark() not in (None, mark)
    for pool in (a, elsewhere):
        await pool.create(DISK, capacity_bytes=MIB, format=RAW)
    await a.open(DISK, t(1), read_only=False)
    await elsewhere.open(DISK, t(2), read_only=False)
    assert await a.shows_opened(DISK, NodeName("b"), t(2)) is False
    await b.open(DISK, t(2), read_only=False)
    assert await a.shows_opened(DISK, NodeName("b"), t(2)) is True


async def test_an_export_that_dies_is_begun_again(nodes: Pools, server: NbdServer) -> None:
    a, _ = nodes
    await a.create(DISK, capacity_bytes=MIB, format=RAW)
    writer = await asyncio.to_thread(Writer, await a.open(DISK, t(1), read_only=False), 0xA1)
    server.kill_exports()
    assert writer.write(within_s=30)
    writer.end()


async def test_an_export_that_can_not_be_begun_is_told_and_tried_again(
    nodes: Pools, server: NbdServer
) -> None:
    """After a crash of the host, say, when something else is faster at its port."""
    a, b = nodes
    await a.create(DISK, capacity_bytes=MIB, format=RAW)
    opened = await a.open(DISK, t(1), read_only=False)
    assert isinstance(opened, NbdSource)
    writer = await asyncio.to_thread(Writer, opened, 0xA1)
    await a.reach(DISK)
    server.provisioner.kill()
    server.kill_exports()
    with socket.create_server((ADDRESS, opened.port)):
        server.provisioner.start()
        with pytest.raises(StorageError, match=r"export of volume .* to node a is down.*in use"):
            await a.reach(DISK)
        await b.reach(DISK)
        assert await a.verify(DISK) is None, "the provisioner itself is well"
        await asyncio.sleep(1.5 * RESTART_PAUSE_S)  # The next try fails, too.
    assert writer.write(within_s=30)
    await a.reach(DISK)
    writer.end()


async def test_what_is_open_is_not_deleted(nodes: Pools) -> None:
    a, b = nodes
    await a.create(DISK, capacity_bytes=MIB, format=RAW)
    await b.open(DISK, t(3), read_only=False)
    with pytest.raises(ConflictError, match="node b has"):
        await a.delete(DISK)
    with pytest.raises(ConflictError, match="node b has"):
        await a.resize(DISK, 2 * MIB)
    await a.open(DISK, t(4), read_only=False)
    await a.fence(DISK, t(4))
    await a.close(DISK, t(4))
    await a.delete(DISK)
    with pytest.raises(NotFoundError):
        await a.inspect(DISK)


async def test_an_image_is_copied_over_the_wire(
    nodes: Pools, server: NbdServer, tmp_path: Path
) -> None:
    image = image_with_holes(tmp_path)
    made = await nodes[0].create(DISK, capacity_bytes=60 * MIB, format=RAW, image=image)
    assert (made.capacity_bytes, made.allocated_bytes < 2 * MIB) == (60 * MIB, True)
    copied = (server.folder / f"{DISK}.raw").read_bytes()
    assert copied == image.read_bytes() + bytes(10 * MIB)
    broken = NbdPool(
        NbdSettings(name="default", provisioner=f"{ADDRESS}:{PORT}"),
        NodeName("a"),
        qemu_img="false",
    )
    with pytest.raises(StorageError, match="status 1"):
        await broken.create(VolumeName("x"), capacity_bytes=60 * MIB, format=RAW, image=image)
    assert [each.name for each in await nodes[0].list_volumes()] == [DISK]
    assert list(server.folder.glob("*.draft")) == []


async def test_with_a_key_everything_is_encrypted_and_signed(
    secured: NbdServer, tmp_path: Path
) -> None:
    pool = pool_of(secured, "a")
    image = tmp_path / "image"
    image.write_bytes(b"x" * MIB)
    await pool.create(DISK, capacity_bytes=MIB, format=RAW, image=image)
    opened = await pool.open(DISK, t(1), read_only=False)
    assert isinstance(opened, NbdSource) and opened.tls is not None
    await pool.fence(DISK, t(1))
    writer = await asyncio.to_thread(Writer, opened, 0xA1)
    assert writer.reads(ord("x"))
    assert writer.write()
    writer.end()
    keyless = NbdPool(NbdSettings(name="p", provisioner=f"{ADDRESS}:{secured.port}"), NodeName("b"))
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "keys.psk").write_text("ferry:00ff\n")
    other = NbdPool(
        NbdSettings(name="p", provisioner=f"{ADDRESS}:{secured.port}", tls_directory=str(wrong)),
        NodeName("b"),
    )
    for stranger in (keyless, other):
        with pytest.raises(StorageError, match="signed"):
            await stranger.list_volumes()
    assert await pool.verify(DISK) == 1
    (wrong / "keys.psk").write_text("nobody:00ff\n")
    with pytest.raises(StorageError, match="no key of ferry"):
        await other.list_volumes()


async def test_a_hook_answers_the_same_requests(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    answer = {
        "volumes": [
            {"pool": "", "name": "v", "format": "raw", "capacity_bytes": 512, "allocated_bytes": 0}
        ]
    }
    hook = tmp_path / "hook"
    hook.write_text(
        f"#!{sys.executable}\nimport sys\nopen({str(asked)!r}, 'w').write(sys.stdin.read())\n"
        f"print({json.dumps(answer)!r})\n"
    )
    hook.chmod(hook.stat().st_mode | stat.S_IXUSR)
    pool = NbdPool(NbdSettings(name="h", hook=str(hook)), NodeName("a"))
    assert [(each.pool, each.name) for each in await pool.list_volumes()] == [("h", "v")]
    assert json.loads(asked.read_text()) == {"op": "list"}
    hook.write_text('#!/bin/sh\nexec echo \'{"failure": {"code": "conflict", "message": "m"}}\'\n')
    with pytest.raises(ConflictError, match="pool h: m"):
        await pool.delete(DISK)
    hook.write_text("#!/bin/sh\necho out of paper >&2; exit 3\n")
    with pytest.raises(StorageError, match="out of paper"):
        await pool.delete(DISK)


async def test_who_cant_say_whose_a_pool_is_is_no_obstacle(tmp_path: Path, network: None) -> None:
    """An older provisioner, or a hook; one that can't be asked at all is."""
    claimant = PoolOwner(identity="1")
    hook = tmp_path / "hook"
    hook.write_text('#!/bin/sh\nexec echo \'{"failure": {"code": "storage", "message": "?"}}\'\n')
    hook.chmod(hook.stat().st_mode | stat.S_IXUSR)
    pool = NbdPool(NbdSettings(name="h", hook=str(hook)), NodeName("a"))
    assert await pool.owner(claimant) is None

    async def older(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"nonce": "1"}\n')
        await reader.readline()
        failure = Failure(code="storage", message="not a request: Invalid value 'owner'")
        writer.write(signed(Answer(failure=failure), TO_NODE, "1", None))
        writer.close()

    server = await asyncio.start_server(older, ADDRESS, 4712)
    pool = NbdPool(NbdSettings(name="p", provisioner=f"{ADDRESS}:4712"), NodeName("a"))
    async with server:
        assert await pool.owner(claimant) is None
    with pytest.raises(StorageError, match="can't be asked"):
        await pool.owner(claimant)


def test_a_pool_has_one_way_to_its_provisioner() -> None:
    for settings in (
        NbdSettings(name="p"),
        NbdSettings(name="p", provisioner="h:1", hook="/bin/x"),
        NbdSettings(name="p", provisioner="h:99999"),
    ):
        with pytest.raises(InvalidRequest):
            NbdPool(settings, NodeName("a"))


async def test_a_provisioner_that_says_nothing_holds_nobody_up(
    network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.nbd.driver.CALL_TIMEOUT_S", 0.2)
    monkeypatch.setattr("storage.nbd.driver.HEALTH_TIMEOUT_S", 0.2)
    with socket.create_server((ADDRESS, 4711)):
        pool = NbdPool(NbdSettings(name="p", provisioner=f"{ADDRESS}:4711"), NodeName("a"))
        begun_s = time.monotonic()
        health = await pool.health()
        assert not health.reachable and "didn't answer" in (health.reason or "")
        assert time.monotonic() - begun_s < 10


async def test_a_size_that_no_file_can_have_changes_nothing(nodes: Pools) -> None:
    with pytest.raises(StorageError):
        await nodes[0].create(DISK, capacity_bytes=1 << 62, format=RAW)
    assert list(await nodes[0].list_volumes()) == []
    await nodes[0].create(DISK, capacity_bytes=MIB, format=RAW)
    with pytest.raises(StorageError):
        await nodes[0].resize(DISK, 1 << 62)
    assert (await nodes[0].inspect(DISK)).capacity_bytes == MIB


async def test_what_is_no_request_is_refused(server: NbdServer) -> None:
    for line in (b"hello\n", b'{"body": "{}", "mac": ""}\n', b'{"body": "7"}\n', b"\n"):
        reader, writer = await asyncio.open_connection(ADDRESS, server.port)
        await reader.readline()
        writer.write(line)
        answer = await reader.readline()
        writer.close()
        assert b"failure" in answer, line
