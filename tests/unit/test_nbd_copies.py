"""A provisioner's clones: nobody waits for the copy, and nothing is copied that is written to.

And that a folder has one provisioner alone, which knows what it exports.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from migrator.errors import ConflictError, StorageError
from migrator.model import NodeName, VolumeName
from storage.copying import CopyCancelled, copy_image
from storage.nbd import NbdPool
from storage.nbd import protocol as p
from storage.nbd.exports import Export, Serving
from storage.nbd.provisioner import Provisioner
from storage.nbd.volumes import VolumeFolder
from storage.settings import NbdSettings

MIB = 1024**2
CLONE = p.Clone(volume="disk", new="copy")
PATIENCE_S = 20.0


class NoExport:
    """In the place of a qemu-nbd."""

    def __init__(self, *_: object, name: str, port: int, **__: object) -> None:
        self.name, self.port = name, port

    async def ensure(self) -> None: ...

    async def end(self) -> None: ...

    def let_go(self) -> None: ...


class SlowCopies:
    """Copies that go on once they are told to."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.listens = True
        """Whether they look if they were given up."""

    def copy(self, source: int, destination: int, given_up: threading.Event) -> None:
        self.begun.set()
        while not self.go_on.wait(0.01):
            if self.listens and given_up.is_set():
                raise CopyCancelled
        copy_image(source, destination, threading.Event())

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, PATIENCE_S)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowCopies]:
    slow = SlowCopies()
    monkeypatch.setattr("storage.copying.copy_image", slow.copy)
    yield slow
    slow.go_on.set()


@pytest.fixture
async def provisioner(
    copies: SlowCopies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Provisioner]:
    monkeypatch.setattr("storage.nbd.provisioner.Export", NoExport)
    made = Provisioner(
        VolumeFolder(tmp_path), Serving(address="127.0.0.1"), None, range(20_000, 20_010)
    )
    await made.open()
    await made.perform(p.Create(volume="disk", capacity_bytes=MIB))
    yield made
    await made.close()


def opening(node: str, token: int, *, read_only: bool = False) -> p.Open:
    return p.Open(volume="disk", node=node, token=token, read_only=read_only)


def volumes(folder: Path) -> list[str]:
    """Those that are there, and drafts."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".raw", ".draft"))


async def test_nobody_waits_for_a_copy(
    provisioner: Provisioner, copies: SlowCopies, tmp_path: Path
) -> None:
    cloning = asyncio.create_task(provisioner.perform(CLONE))
    await copies.wait()
    async with asyncio.timeout(PATIENCE_S / 2):
        for request in (
            p.Inspect(volume="disk"),
            p.Verify(volume="disk"),
            opening("n1", 3, read_only=True),
            p.Close(volume="disk", node="n1", token=3),
        ):
            await provisioner.perform(request)
    assert not cloning.done()
    copies.go_on.set()
    assert [each.name for each in (await cloning).volumes] == ["copy"]
    assert volumes(tmp_path) == ["copy.raw", "disk.raw"]


@pytest.mark.parametrize("listens", [True, False])
async def test_who_opens_a_volume_to_write_to_it_ends_its_copy(
    provisioner: Provisioner, copies: SlowCopies, tmp_path: Path, *, listens: bool
) -> None:
    """At once, or when it is through; also where it is closed again by then."""
    copies.listens = listens
    cloning = asyncio.create_task(provisioner.perform(CLONE))
    await copies.wait()
    async with asyncio.timeout(PATIENCE_S / 2):
        await provisioner.perform(opening("n1", 8))
        await provisioner.perform(p.Fence(volume="disk", node="n1", token=8))
        await provisioner.perform(p.Close(volume="disk", node="n1", token=8))
        if not listens:
            copies.go_on.set()
        with pytest.raises(
            ConflictError, match=r"not cloned: node n1 opened it for writing meanwhile \(token 8\)"
        ):
            await cloning
    assert volumes(tmp_path) == ["disk.raw"]
    copies.go_on.set()
    assert (await provisioner.perform(CLONE)).volumes


async def test_what_a_node_has_for_writing_is_not_cloned(
    provisioner: Provisioner, copies: SlowCopies, tmp_path: Path
) -> None:
    """Nor what a fence gives to one again."""
    copies.go_on.set()
    for node, token in (("n1", 1), ("n2", 2)):
        await provisioner.perform(opening(node, token))
        await provisioner.perform(p.Fence(volume="disk", node=node, token=token))
        with pytest.raises(ConflictError, match=f"node {node} has volume disk open"):
            await provisioner.perform(CLONE)
    await provisioner.perform(p.Close(volume="disk", node="n2", token=2))
    copies.go_on.clear()
    cloning = asyncio.create_task(provisioner.perform(CLONE))
    await copies.wait()
    await provisioner.perform(p.Fence(volume="disk", node="n1", token=3))
    with pytest.raises(ConflictError, match="node n1 has it for writing"):
        await cloning
    assert volumes(tmp_path) == ["disk.raw"]


async def test_a_copy_that_nobody_waits_for_any_more_is_none(
    provisioner: Provisioner, copies: SlowCopies, tmp_path: Path
) -> None:
    """Else there would be a volume in the end that its user was told isn't there."""
    server = await asyncio.start_server(provisioner.serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        pool = NbdPool(NbdSettings(name="p", provisioner=f"127.0.0.1:{port}"), NodeName("n1"))
        cloning = asyncio.create_task(pool.clone(VolumeName("disk"), VolumeName("copy")))
        await copies.wait()
        cloning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cloning
        async with asyncio.timeout(PATIENCE_S):
            while volumes(tmp_path) != ["disk.raw"]:  # noqa: ASYNC110 - It has no event.
                await asyncio.sleep(0.01)


async def test_a_folder_has_one_provisioner(tmp_path: Path) -> None:
    """A fence at one wouldn't end what the other exports."""
    held = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(held, fcntl.LOCK_EX)
    command = [sys.executable, "-m", "storage.nbd", "--folder", str(tmp_path)]
    process = await asyncio.create_subprocess_exec(
        *command, "--address", "127.0.0.1", stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            _, said = await process.communicate()
    finally:
        os.close(held)
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 1
    assert b"can't serve: another provisioner serves" in said


async def test_an_export_that_cant_be_looked_at_isnt_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a fence was confirmed, and its writer went on: with a thousand exports, for one."""
    pid_file = tmp_path / "export.pid"
    process = await asyncio.create_subprocess_exec("sleep", "60")
    pid_file.write_text(f"{process.pid}\n")
    export = Export(
        Serving(address="127.0.0.1"),
        name="export",
        port=1,
        disk=tmp_path / "disk",
        read_only=False,
        pid_file=pid_file,
        on_death=lambda _: None,
    )

    def too_many(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", too_many)
        with pytest.raises(StorageError, match="Too many open files"):
            await export.end()
    assert pid_file.exists()
    await export.end()
    assert not pid_file.exists() and process.returncode is None, "it is another program's number"
    process.kill()
    await process.wait()
