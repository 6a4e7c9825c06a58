"""What `ferry` says when a node is silent, and which exit codes tell it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from migrator.engine.process import reason_of
from migrator.errors import EngineError, UnauthenticatedError
from migrator.model import MigrationState, NodeState, Phase
from node_agent.api.problems import problem_of
from node_agent.cli import __main__ as entry
from node_agent.cli import domains, main, progress
from node_agent.cli.client import ApiClient
from node_agent.cli.cluster import shown_event
from node_agent.cli.drain import _stands
from node_agent.cli.errors import ApiProblem, ExitCode, Unreachable
from node_agent.events import ClusterEvent
from node_agent.migrations.endings import too_late
from node_agent.resources import Node
from tests.unit.agent_world import World
from tests.unit.ferry_command import Ferry, define

pytestmark = pytest.mark.allow_blocking("the CLI is synchronous; it runs in a thread")


async def test_an_owner_that_cant_be_asked_has_the_code_of_silence(
    ferry: Ferry, world: World
) -> None:
    await define(ferry, "--start")
    await ferry("domain", "stop", "web")
    await ferry("domain", "start", "web", "--node", "b")
    await world.b.hub.close()
    said = await ferry("domain", "pause", "web", "--json", code=ExitCode.UNREACHABLE)
    assert json.loads(said.err.splitlines()[-1])["code"] == "peer-unreachable"


async def test_a_kept_definition_can_be_defined_again(ferry: Ferry, tmp_path: Path) -> None:
    await define(ferry, "--vcpus", "2")
    (kept,) = json.loads((await ferry("domain", "ls", "--json")).out)
    file = tmp_path / "web.json"
    file.write_text(json.dumps(kept["spec"]))
    await ferry("domain", "rm", "web")
    await ferry("domain", "define", "-f", str(file))
    (again,) = json.loads((await ferry("domain", "ls", "--json")).out)
    assert again["spec"] == kept["spec"]


async def test_a_migration_tells_which_node_is_silent_and_what_caps_it(
    ferry: Ferry, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await define(ferry, "--start")
    started = await ferry("migrate", "web", "--bandwidth", "15M", "--no-wait", "--json")
    begun = json.loads(started.out)["id"]
    shown = (await ferry("migration", "show", begun)).out
    assert "15.0 MiB/s at most" in shown
    assert "to go:" in shown
    assert "silent" not in shown
    monkeypatch.setattr("node_agent.cli.migrations.silences", lambda client: {"b": 7.2})
    assert "precopy (b has been silent for 7 s)" in (await ferry("migration", "show", begun)).out
    assert f"migration {begun}: b has been silent" in (await ferry("migration", "ls")).out
    listed = await ferry("migration", "ls", "--json")
    assert json.loads(listed.out)[0]["id"] == begun
    assert "b has been silent" in listed.err
    world.a.migrations.end(begun, MigrationState.FAILED, "it was")
    ended = (await ferry("migration", "show", begun)).out
    assert "silent" not in ended
    assert "web (running on a now)" in ended


async def test_watching_says_why_nothing_moves(
    ferry: Ferry, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await define(ferry, "--start")
    seen = 0

    def wait(_: float) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            world.a.migrations.end("m-1", MigrationState.FAILED, "it was silent")

    monkeypatch.setattr(progress, "_pause", wait)
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    monkeypatch.setattr(progress, "silences", lambda client: {"a": 12.0, "b": 7.2})
    out = (await ferry("migrate", "web", code=ExitCode.MIGRATION_FAILED)).out.splitlines()
    assert "silent" not in out[0], "it has only begun"
    assert "a, which knows how it goes, has been silent for 12 s; b has been silent" in out[1]


async def test_watching_says_that_no_agent_answers(
    ferry: Ferry, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await define(ferry, "--start")
    moments = iter(range(0, 1000, 2))
    clock = SimpleNamespace(monotonic=lambda: float(next(moments)))
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "_pause", lambda _: None)
    monkeypatch.setattr(progress, "silences", lambda client: {})
    asked = ApiClient.get

    def get(self: ApiClient, path: str, kind: type[object]) -> object:
        if path.startswith("/v1/migrations/"):
            raise Unreachable("nobody is there")
        return asked(self, path, kind)

    monkeypatch.setattr(ApiClient, "get", get)
    result = await ferry("migrate", "web", code=ExitCode.UNREACHABLE)
    assert "no agent has answered for" in result.out
    assert "whether migration m-1 goes on is unknown" in result.err


async def test_watching_with_a_token_that_ends_says_that_the_migration_doesnt(
    ferry: Ferry, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await define(ferry, "--start")
    monkeypatch.setattr(progress, "_pause", lambda _: None)
    asked = ApiClient.get

    def get(self: ApiClient, path: str, kind: type[object]) -> object:
        if path.startswith("/v1/migrations/"):
            raise ApiProblem(problem_of(UnauthenticatedError("token 1 has expired"), path))
        return asked(self, path, kind)

    monkeypatch.setattr(ApiClient, "get", get)
    said = (await ferry("migrate", "web", "--json", code=ExitCode.NOT_PERMITTED)).err
    told = json.loads(said.splitlines()[-1])
    assert told["detail"] == "token 1 has expired; migration m-1 goes on unseen"
    assert told["code"] == UnauthenticatedError.code


@pytest.mark.parametrize(("last", "told"), [("channel broken", True), ("channel restored", False)])
async def test_a_broken_channel_is_told_until_it_is_restored(
    ferry: Ferry, world: World, last: str, told: bool
) -> None:
    await define(ferry, "--start")
    await ferry("migrate", "web", "--no-wait")
    phases = [
        Phase(name=name, started_at_s=0.0, seconds=0.0, detail="it took nothing")
        for name in ("channel broken", "channel restored", last)
    ]
    migration = msgspec.structs.replace(world.migrations["m-1"], timeline=tuple(phases))
    assert ("channel broken: it took nothing" in progress.describe(migration)) is told


async def test_what_a_guest_in_post_copy_waits_for_is_told_in_the_place_of_a_guess(
    ferry: Ferry, world: World
) -> None:
    await define(ferry, "--start")
    await ferry("migrate", "web", "--no-wait")
    migration = world.migrations["m-1"]
    there = msgspec.structs.replace(
        migration,
        state=MigrationState.POSTCOPY,
        progress=msgspec.structs.replace(migration.progress, eta_s=20.0),
        error="the guest waits for pages that don't come: silence",
    )
    assert progress.describe(there).endswith("waits for pages that don't come: silence")
    assert "left" not in progress.describe(there)
    assert str(too_late(there, "cancel")).endswith(
        "(the guest waits for pages that don't come: silence)"
    )
    there = msgspec.structs.replace(there, error=None)
    assert progress.describe(there).endswith("~20 s left")


async def test_no_old_rate_is_told_of_what_is_not_heard(ferry: Ferry, world: World) -> None:
    await define(ferry, "--start")
    await ferry("migrate", "web", "--no-wait")
    migration = world.migrations["m-1"]
    rates = msgspec.structs.replace(
        migration.progress, throughput_bytes_per_s=5e6, dirty_rate_bytes_per_s=1e6, eta_s=20.0
    )
    goes_on = msgspec.structs.replace(migration, progress=rates)
    assert "4.8 MiB/s, dirtied 976.6 KiB/s" in progress.describe(goes_on)
    silent = progress.describe(goes_on, heard=False)  # Its node, that is.
    assert "/s" not in silent and "left" not in silent
    rates = msgspec.structs.replace(rates, throughput_bytes_per_s=0.0, eta_s=None, unheard_s=12.3)
    stopped = msgspec.structs.replace(migration, progress=rates)
    assert "0 B/s" in progress.describe(stopped)
    assert progress.describe(stopped).endswith("its engine hasn't been heard for 12 s")
    there = msgspec.structs.replace(stopped, state=MigrationState.POSTCOPY, destination="b")
    assert "an engine, of a or b, hasn't been heard for 12 s" in progress.describe(there)
    world.migrations["m-1"] = stopped
    shown = (await ferry("migration", "show", "m-1")).out
    assert "0 B/s (its engine hasn't been heard for 12 s)" in shown


async def test_a_blackout_that_is_over_is_told_as_it_was(ferry: Ferry, world: World) -> None:
    """In post-copy; what was predicted of it, and of a guest that has left, is of no interest."""
    await define(ferry, "--start")
    await ferry("migrate", "web", "--no-wait")
    migration = world.migrations["m-1"]
    rates = msgspec.structs.replace(
        migration.progress, predicted_blackout_ms=8.0, dirty_rate_bytes_per_s=0.0
    )
    before = msgspec.structs.replace(migration, progress=rates, blackout_ms=None)
    assert "dirtied 0 B/s, blackout ~8 ms" in progress.describe(before)
    after = progress.describe(msgspec.structs.replace(before, blackout_ms=17.14))
    assert "blackout 17.1 ms" in after
    assert "~8 ms" not in after
    assert "dirtied" not in after


def test_an_engine_says_in_words_that_its_guest_is_gone() -> None:
    assert reason_of(ProcessLookupError(3, "No such process")).endswith("memory is gone")
    assert reason_of(EngineError("the link is gone")) == "the link is gone"
    assert reason_of(KeyError("x")) == "KeyError: 'x'"
    assert reason_of(RuntimeError("can't start new thread")).startswith("no process or thread is")


async def test_to_cancel_and_only_to_look_contradict_each_other(ferry: Ferry) -> None:
    said = await ferry("drain", "a", "--cancel", "--dry-run", code=ExitCode.USAGE)
    assert "one of them" in said.err


async def test_a_silent_node_is_said_to_be_cordoned(ferry: Ferry) -> None:
    listed = msgspec.json.decode((await ferry("node", "ls", "--json")).out, type=list[Node])
    silent = msgspec.structs.replace(listed[0], state=NodeState.UNREACHABLE)
    assert _stands(silent, NodeState.CORDONED) == "cordoned, and unreachable"
    assert _stands(silent, NodeState.READY) == "open, and unreachable"
    drained = msgspec.structs.replace(silent, state=NodeState.DRAINED)
    assert _stands(drained, NodeState.CORDONED) == "drained"


def test_an_event_names_what_to_look_at() -> None:
    event = ClusterEvent(
        at_s=0.0, kind="migration-failed", node="n1", message="it failed", migration="abc"
    )
    assert shown_event(event).endswith("it failed (migration abc)")
    named = msgspec.structs.replace(event, message="migration abc failed")
    assert shown_event(named).endswith("migration abc failed")
    drain = msgspec.structs.replace(event, migration=None, data={"drain": "d1"})
    assert shown_event(drain).endswith("it failed (drain d1)")
    assert shown_event(msgspec.structs.replace(event, migration=None)).endswith("it failed")


def test_a_stop_says_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "api.sock"
    monkeypatch.setattr(domains, "PATIENCE_S", 0.01)
    monkeypatch.setattr(domains, "END_S", 1.0)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        arguments = ["--api", f"unix:{path}", "domain", "stop", "web", "--timeout", "0.2"]
        assert main.run(arguments) == ExitCode.UNREACHABLE
    told = capfd.readouterr().err
    assert "has not answered" not in told
    first, second, last = told.splitlines()
    assert first.startswith("ferry: domain web hasn't powered itself off yet; it is given")
    assert "was to be ended by force" in second
    assert "doesn't answer in time" in last


def test_a_stop_tells_its_times() -> None:
    patient = domains.stop_progress("web", 30.0)
    assert [after_s for after_s, _ in patient] == [10.0, 40.0]
    assert "it is given 20 s more, then it is ended by force" in patient[0][1]
    assert "waiting 80 s more" in patient[1][1]
    assert [after_s for after_s, _ in domains.stop_progress("web", 0.0)] == [10.0]


def test_an_output_that_nobody_reads_is_no_failure_and_one_that_cant_be_written_is() -> None:
    """`ferry ... | head`, and a full disk. In neither a traceback."""
    command = [sys.executable, "-m", "node_agent.cli.main", "pool", "drivers"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as unread, Path("/dev/full").open("wb") as full:
        broken = subprocess.run(command, stdout=unread, stderr=subprocess.PIPE, check=False)
        refused = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (broken.returncode, broken.stderr) == (ExitCode.OK, b"")
    why = b"ferry: the output can't be written: No space left on device\n"
    assert (refused.returncode, refused.stderr) == (ExitCode.FAILED, why)


async def test_a_migration_that_nobody_reads_of_any_more_goes_on(
    ferry: Ferry, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ferry migrate web | head -1`: "done" would be said of what isn't."""

    def break_pipe(*_: object) -> None:
        raise BrokenPipeError

    await define(ferry, "--start")
    monkeypatch.setattr(progress._LineWatcher, "saw", break_pipe)
    await ferry("migrate", "web", code=ExitCode.INTERRUPTED)
    assert next(iter(world.migrations.values())).state is MigrationState.PRECOPY


@pytest.mark.parametrize("began", [True, False])
async def test_interrupted_before_it_watches_it_says_that_it_was_begun(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch, began: bool
) -> None:
    """Ctrl-C between the agent's answer and the first look at it ended without a word."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    await define(ferry, "--start")
    monkeypatch.setattr(ApiClient, "asked_for_change", False)
    where = "node_agent.cli.migrations"
    monkeypatch.setattr(f"{where}.watch_migration" if began else f"{where}.path_of", interrupt)
    result = await ferry("migrate", "web", code=ExitCode.INTERRUPTED)
    assert ("goes on" in result.err) == began


def test_interrupted_while_it_is_still_loading_it_just_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a host without an idle core that takes seconds, and a traceback told of it."""

    def interrupt(name: str, *_: object) -> None:
        assert name == main.__name__
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.__import__", interrupt)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    monkeypatch.undo()
    assert ended.value.code == ExitCode.INTERRUPTED
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("heeds", [True, False])
async def test_a_stop_says_that_it_was_by_force(ferry: Ferry, world: World, heeds: bool) -> None:
    world.a.host.faults.ignores_power_button = not heeds
    await define(ferry, "--start")
    stopped = (await ferry("domain", "stop", "web", "--timeout", "0.01")).out
    assert stopped.strip() == "domain web is stopped" + ("" if heeds else ": it was ended by force")
    assert json.loads((await ferry("domain", "show", "web", "--json")).out)["forced"] is False
