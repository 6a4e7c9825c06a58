"""What `ferry` says of a node that there isn't: one exit code, whichever command names it."""

from __future__ import annotations

import json

import pytest

from migrator.model import NodeName
from node_agent.cli.errors import ExitCode
from node_agent.migrations.checks import node_reasons
from tests.unit.agent_world import World
from tests.unit.ferry_command import Ferry, define

pytestmark = pytest.mark.allow_blocking("the CLI is synchronous; it runs in a thread")

PAUSED = "domain web is paused, it must be running"


@pytest.mark.parametrize(
    "command",
    [
        ("node", "show"),
        ("domain", "start", "web", "--node"),
        ("domain", "takeover", "web", "--to"),
        ("hook", "test", "note", "--node"),
        ("migrate", "web", "--to"),
    ],
)
async def test_every_command_has_the_same_code(
    ferry: Ferry, world: World, command: tuple[str, ...]
) -> None:
    """Also where the domain's state is against it, too: no other state mends a wrong name."""
    await define(ferry, "--start")
    await ferry("hook", "add", "note", "--command", "/bin/true", "--point", "on-failure")
    await nowhere(world)
    said = await ferry(*command, "nosuch", code=ExitCode.NOT_FOUND)
    assert "there is no node nosuch; known: a, b" in said.err


async def nowhere(world: World) -> None:
    """What a source has against a migration of a paused domain to `nosuch`."""
    here, there = NodeName("a"), NodeName("nosuch")
    unknown = node_reasons(here, there, await world.a.registry.read())
    world.a.migrations.reasons = [PAUSED, *unknown]


async def test_a_migration_tells_its_other_reasons_all_the_same(ferry: Ferry, world: World) -> None:
    await define(ferry, "--start")
    await nowhere(world)
    to = ("migrate", "web", "--to", "nosuch", "--json")
    refused = await ferry(*to, code=ExitCode.NOT_FOUND)
    problem = json.loads(refused.err.splitlines()[-1])
    assert (problem["code"], problem["status"]) == ("no-such-node", 404)
    dry = json.loads((await ferry(*to, "--dry-run", code=ExitCode.NOT_FOUND)).out)
    assert problem["reasons"] == dry["refused"] == world.a.migrations.reasons
    assert not dry["destination_known"]


async def test_a_node_that_there_is_refuses_as_before(ferry: Ferry, world: World) -> None:
    await define(ferry, "--start")
    world.a.migrations.reasons = [PAUSED]
    for more in ((), ("--dry-run",)):
        await ferry("migrate", "web", "--to", "b", *more, code=ExitCode.REFUSED)
