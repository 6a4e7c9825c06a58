"""An engine that ends takes what it feeds with it: the reason that is told is the engine's."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest

from migrator.engine.client import EngineProcess
from migrator.model import MigrationState, Role
from migrator.ports import DomainEventKind
from tests.unit.migration_world import WEB, check_back_home, held_in_precopy, migration_world


@pytest.mark.parametrize("kind", [DomainEventKind.MIGRATION_FAILED, DomainEventKind.EXITED])
async def test_a_hypervisor_that_fails_because_its_engine_has_ended_is_not_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: DomainEventKind
) -> None:
    """What QEMU is to load ends, and it says so sooner than the kernel tells of the engine."""
    async with migration_world(tmp_path, monkeypatch) as world:
        began, _ = await held_in_precopy(world)
        world.script.engine(Role.DESTINATION).die_slowly()
        world.b.node.host.emit(WEB, kind, "failed")
        ended = await check_back_home(world, began, MigrationState.FAILED)
        assert ended.error is not None
        assert ended.error.endswith("the destination's engine: it was killed by signal 9")


async def test_an_engine_has_hung_up_from_its_end_until_that_is_told(tmp_path: Path) -> None:
    told: list[int] = []
    engine = await EngineProcess.spawn(
        log_path=tmp_path / "engines.log", on_message=lambda _: None, on_exit=told.append
    )
    assert not engine.hung_up
    pidfd = os.pidfd_open(engine.pid)
    ended = select.poll()
    ended.register(pidfd, select.POLLIN)
    engine.kill()
    ended.poll()  # Nothing else may run before the next line.
    os.close(pidfd)
    assert engine.hung_up and not told
    await engine.end_told()
    assert told == [-signal.SIGKILL]
    assert not engine.hung_up
