"""Engines that wait come after everybody else at the cores, until they are taken."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar, cast

import pytest

from migrator import cores, shortage
from migrator.cores import WAITING, group_niceness
from migrator.engine.client import EngineProcess
from migrator.engine.spares import SPARES, EngineSpares
from migrator.engine_driver import EngineDriver, EngineSettings
from migrator.engine_messages import FromEngine
from migrator.ports import HypervisorDriver
from tests.unit.session_pair import SessionPair

T = TypeVar("T")
OWN = os.getpriority(os.PRIO_PROCESS, 0)


async def niceness(pid: int) -> set[int | None]:
    """Of all its threads, and of the group that its session is."""

    def look() -> set[int | None]:
        threads = [int(each.name) for each in Path(f"/proc/{pid}/task").iterdir()]
        found: set[int | None] = {group_niceness(pid)} - {None}
        return found | {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}

    return await asyncio.to_thread(look)


@asynccontextmanager
async def spares_in(folder: Path) -> AsyncIterator[EngineSpares]:
    spares = EngineSpares(folder / "engines.log")
    try:
        yield spares
    finally:
        await spares.close()
        assert spares.waiting == ()


async def quiet(spares: EngineSpares) -> int:
    """How many wait when none is being started any more."""
    async with asyncio.timeout(30.0):
        while spares._task or spares._later:  # noqa: ASYNC110 - it says nothing
            await asyncio.sleep(0.01)
    return len(spares.waiting)


async def test_a_spare_starts_after_everybody_else_and_works_as_others_do(tmp_path: Path) -> None:
    async with spares_in(tmp_path) as spares:
        spares.refill()
        assert await quiet(spares) == SPARES
        for pid in spares.waiting:
            assert await niceness(pid) == {WAITING}
        waiting = spares.waiting[0]
        taken = await spares.take()
        assert taken is not None
        assert taken.pid == waiting
        assert await niceness(taken.pid) == {OWN}
        async with asyncio.timeout(30.0):  # It has its imports before it.
            while await asyncio.to_thread(shortage.adjustment_of, taken.pid) != shortage.NEXT:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await taken.stop(2.0)


async def test_beside_a_lone_migration_none_is_started_beside_several_one_is(
    tmp_path: Path,
) -> None:
    async with spares_in(tmp_path) as spares:
        spares.refill()
        await quiet(spares)
        first = await spares.take()
        assert await quiet(spares) == SPARES - 1
        second = await spares.take()
        assert await quiet(spares) == 1
        spares.refill()
        assert await quiet(spares) == SPARES
        assert first is not None
        assert second is not None
        pids = {first.pid, second.pid, *spares.waiting}
        assert len(pids) == 2 + SPARES
        await asyncio.gather(first.stop(2.0), second.stop(2.0))


async def test_none_is_started_while_a_guest_recovers_from_its_move(tmp_path: Path) -> None:
    async with spares_in(tmp_path) as spares:
        spares.refill_later()
        await asyncio.sleep(0)
        assert spares._task is None
        spares.refill()
        assert await quiet(spares) == SPARES
        spares.refill_later()


async def test_one_that_was_killed_is_replaced(tmp_path: Path) -> None:
    """The kernel takes engines first where memory runs out."""
    async with spares_in(tmp_path) as spares:
        spares.refill()
        await quiet(spares)
        killed, other = spares._waiting
        killed.kill()
        async with asyncio.timeout(30.0):
            while killed.running:  # noqa: ASYNC110 - nobody hears of a spare's end
                await asyncio.sleep(0.01)
        spares.refill()
        assert await quiet(spares) == SPARES
        assert killed.pid not in spares.waiting and other.pid in spares.waiting


async def test_more_are_wanted_while_one_starts(tmp_path: Path) -> None:
    async with spares_in(tmp_path) as spares:
        assert await spares.take() is None
        assert spares._task is not None
        spares.refill()
        assert await quiet(spares) == SPARES


async def test_one_that_has_died_is_nobody_s_engine(tmp_path: Path) -> None:
    async with spares_in(tmp_path) as spares:
        assert await spares.take() is None
        assert await quiet(spares) == 1
        spares.refill()
        await quiet(spares)
        dead, alive = spares._waiting
        dead.kill()
        async with asyncio.timeout(30.0):
            while dead.running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        taken = await spares.take()
        assert taken is alive
        await taken.stop(2.0)


async def test_one_that_dies_as_it_is_taken_tells_its_taker(tmp_path: Path) -> None:
    """Nobody else listened to it; who has it would wait for its answers."""
    async with spares_in(tmp_path) as spares:
        spares.refill()
        await quiet(spares)
        taken = await spares.take()
        assert taken is not None
        taken.kill()
        ended = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(30.0):
            await asyncio.wait([taken._watch])
            taken.attach(lambda message: None, ended.set_result)
            assert await ended == -signal.SIGKILL


async def test_why_none_can_be_started_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In post-copy one is tried for every five seconds, as long as that lasts."""
    spares = EngineSpares(tmp_path / "no-such-folder" / "engines.log")
    for _ in range(3):
        assert await spares.take() is None
        await asyncio.wait([spares._task or asyncio.create_task(asyncio.sleep(0))])
    (told,) = caplog.messages
    assert "no engine could be started ahead" in told
    await spares.close()


class _Waiting:
    """In the place of an engine that was started ahead."""

    pid = 1
    running = True

    def __init__(self) -> None:
        self.ended = False

    def attach(
        self, on_message: Callable[[FromEngine], None], on_exit: Callable[[int], None]
    ) -> None:
        return

    def kill(self) -> None:
        self.ended = True

    async def stop(self, timeout_s: float) -> bool:
        self.ended = True
        return True


async def test_whenever_its_taker_is_ended_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once(work: Callable[..., T], *arguments: object) -> T:
        await asyncio.sleep(0)
        return work(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    monkeypatch.setattr(cores, "set_niceness", lambda pid, niceness: True)
    for steps in range(8):
        spares = EngineSpares(tmp_path / "engines.log")
        spares._closed = True  # No others are started.
        engine = _Waiting()
        spares._waiting.append(cast(EngineProcess, engine))
        driver = EngineDriver(
            SessionPair().source,
            settings=EngineSettings(run_directory=tmp_path, spares=spares, bind_address=""),
            hypervisor=cast(HypervisorDriver, None),
            device_channel=tmp_path / "device",
            feed=lambda event: None,
        )
        driver.warm_up()
        for _ in range(steps):
            await asyncio.sleep(0)
        await driver.close()
        assert engine.ended or spares.waiting, f"after {steps} steps"
