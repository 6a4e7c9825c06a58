"""`ferry domain dirty-rate`, and predictions as the CLI shows them."""

from __future__ import annotations

import json

import msgspec
import pytest

from migrator.model import MigrationState, PassKind, PassReport, Phase
from node_agent.cli.errors import ExitCode
from tests.unit.agent_world import World
from tests.unit.ferry_command import Ferry, define

pytestmark = pytest.mark.allow_blocking("the CLI is synchronous; it runs in a thread")


async def test_a_dirty_rate_and_a_prediction(ferry: Ferry, world: World) -> None:
    await define(ferry, "--start")
    rate = (await ferry("domain", "dirty-rate", "web", "--seconds", "0.5")).out
    assert "2000 pages/s, 7.8 MiB/s" in rate
    assert "8.0 MiB in 0.5 s" in rate
    assert "100.0 MiB, 25% of it zeros; the rest packs to 50%" in rate
    parsed = json.loads((await ferry("domain", "dirty-rate", "web", "--json")).out)
    assert parsed["memory_in_use_bytes"] == 100 * 1024**2
    await ferry("domain", "dirty-rate", "web", "--seconds", "100", code=ExitCode.USAGE)
    dry = (await ferry("migrate", "web", "--dry-run", "--sample-seconds", "2")).out
    for part in ("converges:", "yes: ", "measured now (1.0 MB in 10 ms)", "sampled over 2.0 s"):
        assert part in dry
    world.a.migrations.unpredictable = "it is being sampled"
    dry = (await ferry("migrate", "web", "--dry-run")).out
    assert "can't be predicted: it is being sampled" in dry
    await ferry("domain", "dirty-rate", "web", code=ExitCode.REFUSED)


async def test_a_prediction_is_shown_beside_the_outcome(ferry: Ferry, world: World) -> None:
    await define(ferry, "--start")
    begun = json.loads((await ferry("migrate", "web", "--no-wait", "--json")).out)
    assert "PREDICTED" not in (await ferry("migration", "show", begun["id"])).out
    migration = world.migrations[begun["id"]]
    world.a.migrations.known[migration.id] = msgspec.structs.replace(
        migration, prediction=await world.a.migrations.predict("web", migration.request, 1.0)
    )
    assert "precopy" in (await ferry("migration", "show", begun["id"])).out
    world.a.migrations.end(begun["id"], MigrationState.COMPLETED)
    lines = (await ferry("migration", "show", begun["id"])).out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("FIGURE"))
    assert lines[at].split() == ["FIGURE", "PREDICTED", "OUTCOME"]
    assert lines[at + 1].split() == ["converges", "yes", "yes"]
    assert lines[at + 5].split()[-2:] == ["7.5", "ms"]


@pytest.mark.parametrize(
    ("state", "noted", "mode", "said"),
    [
        (MigrationState.FAILED, (), "hybrid", "-"),  # A hook, or the agent's end: nobody knows.
        (MigrationState.FAILED, ("decision: switch_over",), "hybrid", "yes"),
        (MigrationState.FAILED, ("decision: give_up",), "precopy", "no"),
        (MigrationState.COMPLETED, ("decision: iterate", "post-copy"), "hybrid", "no"),
        (MigrationState.COMPLETED, ("post-copy",), "postcopy", "yes"),
        (MigrationState.COMPLETED, (), "precopy", "yes"),
    ],
)
async def test_whether_it_converged_is_told_by_what_was_decided(
    ferry: Ferry,
    world: World,
    state: MigrationState,
    noted: tuple[str, ...],
    mode: str,
    said: str,
) -> None:
    await define(ferry, "--start")
    begun = json.loads((await ferry("migrate", "web", "--no-wait", "--json", "--mode", mode)).out)
    migration = world.migrations[begun["id"]]
    world.a.migrations.known[migration.id] = msgspec.structs.replace(
        migration,
        prediction=await world.a.migrations.predict("web", migration.request, 1.0),
        timeline=tuple(Phase(name=name, started_at_s=1.0, seconds=0.0) for name in noted),
    )
    world.a.migrations.end(begun["id"], state)
    lines = (await ferry("migration", "show", begun["id"])).out.splitlines()
    after = "cancel" if mode == "precopy" else "post-copy"
    assert f"600 s, then {after}" in "\n".join(lines)
    line = next(each for each in lines if each.startswith("converges "))
    assert line.split()[-1] == said


async def test_what_was_sent_is_one_figure_also_after_a_post_copy(
    ferry: Ferry, world: World
) -> None:
    """The iterations know nothing of the pages that the guest asked for when it had moved."""
    await define(ferry, "--start")
    begun = json.loads((await ferry("migrate", "web", "--no-wait", "--json")).out)
    migration = world.migrations[begun["id"]]
    first = PassReport(
        number=1, kind=PassKind.FIRST, seconds=1.0, pages=768, bytes_sent=3 * 1024**2
    )
    told = PassReport(number=2, kind=PassKind.MISSING, seconds=0.0, pages=512, bytes_sent=0)
    world.a.migrations.known[migration.id] = msgspec.structs.replace(
        migration,
        prediction=await world.a.migrations.predict("web", migration.request, 1.0),
        progress=msgspec.structs.replace(migration.progress, bytes_sent=5 * 1024**2),
        iterations=(first, told),
    )
    world.a.migrations.end(begun["id"], MigrationState.COMPLETED)
    lines = (await ferry("migration", "show", begun["id"])).out.splitlines()
    shown = [line.split() for line in lines if line.startswith("sent")]
    assert " ".join(shown[0]) == "sent: 5.0 MiB, 2.0 MiB of it in post-copy"
    assert shown[1][-2:] == ["5.0", "MiB"]
