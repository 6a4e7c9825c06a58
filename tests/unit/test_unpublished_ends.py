"""Migrations whose end the store didn't take, or whose beginning it took unheard: all are ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from migrator.errors import HypervisorError, StoreError, WrongStateError
from migrator.model import DomainName, Migration, MigrationProgress, MigrationState
from migrator.session.source import SourceSession
from node_agent.events import ClusterEvent, EventKind
from node_agent.hooks import service as hooks_service
from node_agent.hooks.model import HookPoint
from node_agent.hooks.service import HookService
from node_agent.migrations import publisher as publisher_module
from node_agent.migrations import unpublished
from node_agent.migrations.outline import MigrationOutline
from node_agent.migrations.publisher import Publisher
from node_agent.resources import MIGRATIONS
from tests.unit.migration_world import (
    WEB,
    MigrationWorld,
    check_back_home,
    end_first_pass,
    eventually,
    held_in_precopy,
    migration_world,
)
from tests.unit.test_hooks import NotedHooks, hook_of

_S = MigrationState


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpublished, "AGAIN_S", 0.02)


def looks(monkeypatch: pytest.MonkeyPatch, failing: int = 0) -> Callable[[], int]:
    """Says how often the store was looked through; the first ones fail."""
    count, read = 0, Publisher.read_outlines

    async def counted(publisher: Publisher) -> Sequence[MigrationOutline]:
        nonlocal count
        count += 1
        if count <= failing:
            raise StoreError("no member of etcd answered")
        return await read(publisher)

    monkeypatch.setattr(Publisher, "read_outlines", counted)
    return lambda: count


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> NotedHooks:
    """What the hook of the migrations was called for, once there is one."""
    hooks = NotedHooks()
    monkeypatch.setattr(hooks_service, "DRIVERS", hooks.drivers)
    return hooks


async def add_hook(world: MigrationWorld) -> None:
    await HookService(world.a.node.typed, world.a.node.events).add(hook_of())


async def told(world: MigrationWorld, id: str, kind: EventKind) -> list[ClusterEvent]:
    """Once all are written."""
    await world.until(lambda: not world.a.node.events._waiting)
    events = await world.a.node.events.read()
    return [each for each in events if each.migration == id and each.kind == kind]


async def published(world: MigrationWorld, id: str) -> Migration:
    publisher = world.b.manager._publisher

    async def is_ended() -> bool:
        return (await publisher.read(id)).ended

    await eventually(is_ended)
    return await publisher.read(id)


async def test_an_end_that_the_store_does_not_take_is_published_when_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: NotedHooks
) -> None:
    """Whole, with one event, and its hooks once. Its agent knows of it until then."""
    monkeypatch.setattr(publisher_module, "_TRIES", 1)
    async with migration_world(tmp_path, monkeypatch) as world:
        await add_hook(world)
        began, _ = await held_in_precopy(world)
        world.a.node.store.faults.unavailable = True
        await world.a.manager.cancel(began.id, "user alice")
        await world.until(lambda: world.a.node.domains.locks.migration_of(WEB) is None)
        assert not (await world.b.manager._publisher.read(began.id)).ended
        assert (await world.a.manager.get(began.id)).state is _S.CANCELLED
        with pytest.raises(WrongStateError, match="was cancelled already"):
            await world.a.manager.cancel(began.id)
        world.a.node.store.faults.unavailable = False
        ended = await published(world, began.id)
        assert (ended.state, ended.cancelled_by) == (_S.CANCELLED, "user alice")
        assert "cancelling" in {phase.name for phase in ended.timeline}
        await world.until(lambda: HookPoint.ON_FAILURE in noted.points)
        assert world.a.manager._ends.get(began.id) is None
        await world.until(lambda: not world.a.manager._asides.tasks)
        assert noted.points.count(HookPoint.ON_FAILURE) == 1
        assert len(await told(world, began.id, EventKind.MIGRATION_CANCELLED)) == 1


async def test_what_the_network_noted_before_the_end_was_published_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "_TRIES", 1)
    async with migration_world(tmp_path, monkeypatch) as world:
        write, end_late, going_on = Publisher.write, Publisher.end_late, asyncio.Event()

        async def away(publisher: Publisher, migration: Migration) -> None:
            if migration.ended:
                raise StoreError("no member of etcd answered")
            await write(publisher, migration)

        async def held(publisher: Publisher, session: SourceSession) -> None:
            await going_on.wait()
            await end_late(publisher, session)

        monkeypatch.setattr(Publisher, "write", away)
        monkeypatch.setattr(Publisher, "end_late", held)
        began = await world.migrate()
        publisher, ends = world.a.manager._publisher, world.a.manager._ends

        async def is_noted() -> bool:
            return (await publisher.read(began.id)).cutover is not None

        await eventually(is_noted)
        assert ends.get(began.id) is not None
        going_on.set()
        await world.until(lambda: ends.get(began.id) is None)
        ended = await published(world, began.id)
        assert ended.state is _S.COMPLETED
        assert ended.cutover is not None


async def test_an_earlier_agent_s_ends_are_published_though_the_store_is_away_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        ended = await world.ended(await world.migrate())
        moving = MigrationProgress(state=_S.PRECOPY)
        left = msgspec.structs.replace(
            ended, state=_S.PRECOPY, progress=moving, ended_at_s=None, total_s=None
        )
        await world.a.node.typed.put(f"{MIGRATIONS}{ended.id}", left)
        looked = looks(monkeypatch, failing=2)
        await world.a.crash()
        await world.a.restart(world.b)
        now = await published(world, ended.id)
        assert (now.state, now.ended_at_s) == (_S.COMPLETED, ended.ended_at_s)
        assert looked() >= 3


async def test_an_end_is_told_though_the_answer_to_its_write_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: NotedHooks
) -> None:
    """It is published by then, and looks like one that nothing is left to do for."""
    async with migration_world(tmp_path, monkeypatch) as world:
        await add_hook(world)
        ended = await world.ended(await world.migrate())
        left = msgspec.structs.replace(ended, id="left", state=_S.CREATED, ended_at_s=None)
        await world.a.node.typed.put(f"{MIGRATIONS}left", left)
        write, tries = Publisher.write, 0

        async def unheard(publisher: Publisher, migration: Migration) -> None:
            nonlocal tries
            await write(publisher, migration)
            tries += 1
            if tries == 1:
                raise StoreError("whether it was written isn't known")

        monkeypatch.setattr(Publisher, "write", unheard)
        world.a.manager._ends.look_again("m-none")
        await world.until(lambda: HookPoint.ON_FAILURE in noted.points)
        assert (await published(world, "left")).state is _S.FAILED
        assert len(await told(world, "left", EventKind.MIGRATION_FAILED)) == 1


async def test_a_beginning_that_was_written_though_it_failed_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: NotedHooks
) -> None:
    """No hook of it was run; at its end one could put back what another migration has taken out."""
    async with migration_world(tmp_path, monkeypatch) as world:
        await add_hook(world)
        write = Publisher.write

        async def unheard(publisher: Publisher, migration: Migration) -> None:
            await write(publisher, migration)
            raise StoreError("whether it was written isn't known")

        with monkeypatch.context() as patched:
            patched.setattr(Publisher, "write", unheard)
            with pytest.raises(StoreError):
                await world.migrate()
        (found,) = await world.b.manager._publisher.read_all()
        ended = await published(world, found.id)
        assert ended.state is _S.FAILED
        assert ended.error is not None and ended.error.startswith("it never began")
        await world.until(lambda: not world.a.manager._asides.tasks)
        assert HookPoint.ON_FAILURE not in noted.points
        assert world.running() == ["a"]
        assert (await world.ended(await world.migrate())).state is _S.COMPLETED


async def test_what_is_alive_here_is_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one that is under way, nor one that is published and is about to begin."""
    async with migration_world(tmp_path, monkeypatch) as world:
        looked, write = looks(monkeypatch), Publisher.write
        written, going_on = list[str](), asyncio.Event()

        async def slow(publisher: Publisher, migration: Migration) -> None:
            await write(publisher, migration)
            if not written:
                written.append(migration.id)
                await going_on.wait()

        async def look() -> None:
            wanted = looked() + 1
            world.a.manager._ends.look_again("m-none")
            await world.until(lambda: looked() >= wanted)

        async def look_well() -> None:
            """The first may have begun before, and when the third begins the second is done."""
            for _ in range(3):
                await look()

        monkeypatch.setattr(Publisher, "write", slow)
        beginning = asyncio.create_task(held_in_precopy(world))
        await world.until(lambda: bool(written))
        await look_well()
        going_on.set()
        began, live = await beginning
        await look_well()
        assert live.state is _S.PRECOPY
        assert not (await world.b.manager._publisher.read(began.id)).ended
        end_first_pass(world)
        assert (await world.ended(began)).state is _S.COMPLETED
        assert not await told(world, began.id, EventKind.MIGRATION_FAILED)


async def test_a_guest_that_stays_has_its_frames_back_before_its_end_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was never paused: nothing else tells that it stays. The store may be away long."""
    async with migration_world(tmp_path, monkeypatch) as world:
        began, _ = await held_in_precopy(world)
        node = world.a.node

        async def refused(domain: DomainName, _: Path) -> None:
            assert domain in node.fabric.diverted
            node.store.faults.unavailable = True
            raise HypervisorError("it isn't a good time")

        monkeypatch.setattr(node.hypervisor, "begin_switchover", refused)
        end_first_pass(world)
        await world.until(lambda: node.store.faults.unavailable and not node.fabric.diverted)
        assert node.domains.locks.migration_of(WEB) == began.id, "that is told, or given up"
        assert not (await world.b.manager._publisher.read(began.id)).ended
        node.store.faults.unavailable = False
        await check_back_home(world, began, _S.FAILED)
