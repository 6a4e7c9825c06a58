"""A console shows what its own domain printed, not what a deleted one of that name did."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrator.errors import PeerError
from migrator.model import DomainName, FencingToken
from node_agent.consoles import Consoles
from tests.unit.agent_world import SimulatedNode, World, open_world, spec_of

WEB = DomainName("web")
pytestmark = pytest.mark.allow_blocking("files of a test, for a moment")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as opened:
        for node in (opened.a, opened.b):
            node.domains._consoles = Consoles(node.hypervisor, node.records)
        yield opened


def prints(node: SimulatedNode, text: bytes) -> None:
    path = node.hypervisor.console_log(WEB)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(text)


async def shown(world: World) -> bytes:
    return (await world.a.cluster.console(WEB, offset=None, limit_bytes=1000))[1].data


async def test_a_new_domain_of_a_deleted_ones_name_begins_with_an_empty_console(
    world: World,
) -> None:
    await world.a.domains.define(spec_of())
    await world.a.domains.start(WEB)
    prints(world.a, b"the old one's secret\n")
    await world.a.domains.stop(WEB)
    await world.a.domains.start(WEB)
    prints(world.a, b"again\n")
    assert await shown(world) == b"the old one's secret\nagain\n"
    await world.a.domains.stop(WEB)
    await world.a.domains.delete(WEB)
    await world.a.domains.define(spec_of())
    assert await shown(world) == b""
    await world.a.domains.start(WEB)
    prints(world.a, b"new\n")
    assert await shown(world) == b"new\n"


async def test_so_it_does_where_it_arrives_by_migration(world: World) -> None:
    await world.b.domains.define(spec_of())
    await world.b.domains.start(WEB)
    prints(world.b, b"old\n")
    await world.b.domains.stop(WEB)
    await world.b.domains.delete(WEB)
    await world.a.domains.define(spec_of())
    _, undo = await world.b.domains.build_launch(spec_of(), FencingToken(7))
    await undo()
    assert (await world.b.domains.console(WEB)).data == b""


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        (True, r"domain web runs on a: .* If a stays away: `ferry domain takeover web --to NODE`"),
        (False, "the console of domain web is on a, where it ran last: "),
    ],
)
async def test_that_of_a_node_that_is_away_is_told_to_be_there(
    world: World, runs: bool, told: str
) -> None:
    await world.a.domains.define(spec_of())
    await world.a.domains.start(WEB)
    if not runs:
        await world.a.domains.stop(WEB)
    await world.a.hub.close()
    with pytest.raises(PeerError, match=told):
        await world.b.cluster.console(WEB, offset=None, limit_bytes=1000)


@pytest.mark.parametrize(("before_s", "left"), [(3600.0, b""), (-1.0, b"text\n")])
async def test_a_text_from_before_texts_had_names_is_told_by_its_age(
    world: World, before_s: float, left: bytes
) -> None:
    await world.a.domains.define(spec_of())
    prints(world.a, b"text\n")
    defined_at_s = (await world.a.records.get(WEB)).defined_at_s
    os.utime(world.a.hypervisor.console_log(WEB), times=(0.0, defined_at_s - before_s))
    await world.a.domains.start(WEB)
    assert await shown(world) == left


async def test_a_console_of_which_nothing_is_known_starts_all_the_same(world: World) -> None:
    await world.a.domains.define(spec_of())
    path = world.a.hypervisor.console_log(WEB)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.whose").mkdir()
    await world.a.domains.start(WEB)
    prints(world.a, b"text\n")
    assert await shown(world) == b"text\n"
