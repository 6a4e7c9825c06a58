"""A storage that hangs, or that copies for long, costs the agent nothing else than that storage."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator.errors import ConflictError, StorageError
from migrator.model import DiskFormat, NodeName, PoolHealth, PoolName, VolumeName
from migrator.own_threads import THREADS_MAX, in_own_thread
from storage import bounded as bounded_module
from storage.bounded import GIVEN_UP_MAX, bounded
from storage.directory import DirectoryPool, driver
from storage.iscsi import IscsiPool, portals
from storage.iscsi.provisioner import HookProvisioner, Lun
from storage.iscsi.tgt import TgtFolder, VolumeState
from storage.iscsi.tgt_control import TgtControl
from storage.nfs.connection import Connection, Server

MORE_THAN_A_LOOP_HAS = 40
"""asyncio's own threads are 32 at most."""


class Hung(threading.Event):
    """What hanging calls wait for; and how many do.

    A call that has no thread yet when it is given up never hangs, so a test that counts on hanging
    ones waits for them to have begun, and for no time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._begun = threading.Semaphore(0)

    def hang(self, *_: object) -> None:
        """As a call."""
        self._begun.release()
        self.wait()

    async def given_up(self, calls: Iterable[Coroutine[Any, Any, object]]) -> None:
        """Begin them all, and cancel them once each hangs."""
        tasks = [asyncio.create_task(each) for each in calls]
        for _ in tasks:
            assert await asyncio.to_thread(self._begun.acquire, timeout=10)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(each) for each in ended} == {asyncio.CancelledError}


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hung]:
    monkeypatch.setattr(bounded_module, "GIVE_UP_WAIT_S", 0.01)
    event = Hung()
    yield event
    event.set()


async def eventually_works(where: str) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                assert await bounded(lambda: 7, where) == 7
            except StorageError:
                await asyncio.sleep(0.01)
            else:
                return


async def test_calls_that_hang_take_no_thread_of_anybody_else(hung: Hung) -> None:
    calls = (bounded(hung.wait, "pool 1", timeout_s=0.1) for _ in range(MORE_THAN_A_LOOP_HAS))
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(each) for each in ended} == {StorageError}
    async with asyncio.timeout(5):
        assert await asyncio.to_thread(lambda: "the heartbeat") == "the heartbeat"
        assert await bounded(lambda: 7, "pool good") == 7


async def test_nobody_waits_behind_calls_that_hang(hung: Hung) -> None:
    await hung.given_up(bounded(hung.hang, "pool 2") for _ in range(GIVEN_UP_MAX))
    async with asyncio.timeout(5):
        with pytest.raises(StorageError, match=f"hangs; {GIVEN_UP_MAX} calls wait for it"):
            await bounded(lambda: 7, "pool 2")
    hung.set()
    await eventually_works("pool 2")


async def test_a_call_that_was_given_up_in_the_queue_never_begins(hung: Hung) -> None:
    begun: list[str] = []
    holding = [in_own_thread("pool full", hung.wait) for _ in range(THREADS_MAX)]
    with pytest.raises(StorageError, match="no answer in 0 s"):
        await bounded(lambda: begun.append("late"), "pool full", timeout_s=0.05)
    hung.set()
    await asyncio.wait(holding)
    await eventually_works("pool full")
    assert not begun


async def test_long_copies_hold_nothing_else_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hung: Hung
) -> None:
    image, folder = tmp_path / "image", tmp_path / "pool"
    image.write_bytes(bytes(512))
    folder.mkdir()
    begun = threading.Event()

    def copy_slowly(source: Path, destination: Path, cancelled: threading.Event) -> None:
        begun.set()
        hung.wait()

    monkeypatch.setattr(driver, "copy_file", copy_slowly)
    pool = DirectoryPool(PoolName("p"), folder)

    async def create(number: int) -> None:
        name = VolumeName(f"v{number}")
        await pool.create(name, capacity_bytes=512, format=DiskFormat.RAW, image=image)

    creating = [asyncio.create_task(create(number)) for number in range(MORE_THAN_A_LOOP_HAS)]
    try:
        async with asyncio.timeout(5):
            assert await asyncio.to_thread(begun.wait, 5)
            await asyncio.sleep(0.2)  # The others, too.
            assert await asyncio.to_thread(lambda: "the heartbeat") == "the heartbeat"
            assert await pool.list_volumes() == []
    finally:
        hung.set()
    await asyncio.gather(*creating)
    assert len(await pool.list_volumes()) == MORE_THAN_A_LOOP_HAS


async def test_what_a_failed_copy_left_is_waited_for_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hung: Hung
) -> None:
    def refuse(*_: object) -> None:
        raise ConflictError("taken")

    monkeypatch.setattr(driver, "_remove", lambda _: hung.wait())
    pool = DirectoryPool(PoolName("p"), tmp_path)
    monkeypatch.setattr(pool._folder, "publish", refuse)
    async with asyncio.timeout(5):
        with pytest.raises(ConflictError, match="taken"):
            await pool.create(VolumeName("v"), capacity_bytes=512, format=DiskFormat.RAW)


async def test_one_nfs_server_that_hangs_costs_the_others_nothing(hung: Hung) -> None:
    def connect() -> Any:
        return _Export()

    server = Server("10.0.0.5", "/srv")
    with pytest.raises(StorageError, match="no answer"):
        await Connection("pool 3", server, connect).call(lambda _: hung.wait(), timeout_s=0.01)
    hanging = (Connection("pool 3", server, connect) for _ in range(GIVEN_UP_MAX))
    await hung.given_up(each.call(hung.hang, timeout_s=60) for each in hanging)
    bad, good = (Connection(f"pool {number}", server, connect) for number in (3, 4))
    with pytest.raises(StorageError, match="hangs"):
        await bad.call(lambda _: 7, timeout_s=5)
    assert await good.call(lambda _: 7, timeout_s=5) == 7
    good.close()


class _Export:
    def close(self) -> None: ...


async def test_a_pool_whose_portal_is_away_is_not_well_though_its_hook_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`ferry pool show` and the doctor said that it was, beside guests whose disks waited."""
    provisioner = HookProvisioner(["/etc/ferry/hook"])

    async def answer(operation: str, *_: object, **__: object) -> Any:
        if operation == "health":
            return PoolHealth(reachable=True)
        return Lun(portal=f"127.0.0.1:{port},1", target="iqn.x", lun=1, capacity_bytes=512)

    monkeypatch.setattr(provisioner, "_ask", answer)
    pool = IscsiPool(PoolName("san"), NodeName("a"), provisioner, initiator_prefix="iqn.y")
    assert (await pool.health()).reachable
    with socket.create_server(("127.0.0.1", 0)) as portal:
        port = portal.getsockname()[1]
        await pool._lun(VolumeName("v"))  # It is used here.
        assert (await pool.health()).reachable
    health = await pool.health()
    assert not health.reachable
    assert f"portal 127.0.0.1:{port},1 can't be reached from this node" in (health.reason or "")


@pytest.mark.parametrize(
    ("portal", "address"),
    [
        ("10.0.0.5:3261", ("10.0.0.5", 3261)),
        ("10.0.0.5", ("10.0.0.5", 3260)),
        ("[fd00::5]:3261,1", ("fd00::5", 3261)),
        ("[fd00::5]", ("fd00::5", 3260)),
    ],
)
def test_where_a_portal_is(portal: str, address: tuple[str, int]) -> None:
    assert portals._address_of(portal) == address


def test_a_tgtd_that_has_forgotten_its_targets_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers, and so does its port; only QEMU, and whoever logs in, is refused."""
    control = TgtControl(tmp_path / "socket")
    folder = TgtFolder(tmp_path, control, portal="127.0.0.1:3260", pool="p")
    folder._write(VolumeName("web"), VolumeState(target="iqn.x:web", number=1))
    monkeypatch.setattr(control, "targets", lambda: {"iqn.x:web": 1})
    assert folder.health().reachable
    monkeypatch.setattr(control, "targets", dict)
    health = folder.health()
    assert not health.reachable
    assert "no target of web" in (health.reason or "")
    assert "storage.iscsi.restore" in (health.reason or "")
