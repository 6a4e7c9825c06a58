"""Pages are on their way to a node that has yet to find out whether it can take the domain."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from migrator.model import MigrationState
from node_agent.migrations.checks import Inspection
from node_agent.migrations.site import NodeSite
from tests.unit.migration_world import check_back_home, held_in_first_pass, migration_world

TOLD = "its memory is taken"


async def test_a_node_that_refuses_after_pages_went_there_says_why_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another guest may have come since it was asked."""
    async with migration_world(tmp_path, monkeypatch) as world:
        check, go_on = world.b.manager._check, asyncio.Event()
        ask = check.reasons
        asked = 0

        async def reasons(inspection: Inspection) -> Sequence[str]:
            nonlocal asked
            asked += 1
            if asked == 1:
                return await ask(inspection)
            await go_on.wait()
            return [TOLD]

        monkeypatch.setattr(check, "reasons", reasons)
        began, live = await held_in_first_pass(world)
        assert world.b.node.host.memory_ahead.keys() == {live.domain}
        go_on.set()
        ended = await check_back_home(world, began, MigrationState.FAILED)
        assert ended.error == f"the destination refused: {TOLD}"
        assert world.b.node.host.memory_ahead == {}
        assert any(phase.name == "precopy" for phase in live.timeline)


async def test_a_start_that_cant_be_prepared_keeps_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its volumes can't be opened, say: then nothing was started that could end with it."""
    async with migration_world(tmp_path, monkeypatch) as world:
        seen: list[set[str]] = []

        async def unfit(_: NodeSite, __: object) -> None:
            seen.append(set(world.b.node.host.memory_ahead))
            raise OSError("no descriptor is left")

        monkeypatch.setattr(NodeSite, "_refuse_unless_fit", unfit)
        began = await world.migrate()
        ended = await check_back_home(world, began, MigrationState.FAILED)
        assert ended.error is not None and "no descriptor is left" in ended.error
        assert seen and world.b.node.host.memory_ahead == {}
