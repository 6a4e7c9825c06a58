"""`ferry` against a real API on a unix socket, with simulated nodes behind it."""

from __future__ import annotations

import asyncio
import http.client
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from migrator.model import DomainName, MigrationState, PassKind, PassReport
from node_agent.cli import client as cli_client
from node_agent.cli import completion, main, progress
from node_agent.cli.errors import CliError, ExitCode
from node_agent.cli.migrations import compression_of
from node_agent.cli.output import parse_size, size
from node_agent.cli.spec import load_spec, parse_disk, parse_nic
from node_agent.resources import NodeList
from tests.unit.agent_world import MAC, World
from tests.unit.ferry_command import Ferry, define

pytestmark = pytest.mark.allow_blocking("the CLI is synchronous; it runs in a thread")


async def test_a_domains_life(ferry: Ferry, tmp_path: Path) -> None:
    assert "runs on a" in (await define(ferry, "--start")).out
    assert "paused" in (await ferry("domain", "pause", "web")).out
    assert "running" in (await ferry("domain", "resume", "web")).out
    await ferry("domain", "reset", "web")
    listed = (await ferry("domain", "ls")).out
    assert "web" in listed
    assert "64.0 MiB" in listed
    shown = (await ferry("domain", "show", "web")).out
    assert MAC in shown
    assert "default/root" in shown
    refused = await ferry("domain", "rm", "web", code=ExitCode.REFUSED)
    assert refused.err.count("\n") == 1
    await ferry("domain", "stop", "web")
    await ferry("domain", "start", "web", "--node", "b")
    await ferry("domain", "stop", "web")
    await ferry("domain", "rm", "web")
    await ferry("domain", "show", "web", code=ExitCode.NOT_FOUND)


async def test_json_alone_is_on_stdout(ferry: Ferry) -> None:
    domain = json.loads((await define(ferry, "--json")).out)
    assert domain["spec"]["nics"][0]["mac"] == MAC
    for command in (["domain", "ls"], ["node", "ls"], ["pool", "ls"], ["migration", "ls"]):
        assert isinstance(json.loads((await ferry("--json", *command)).out), list)
    problem = await ferry("domain", "show", "nobody", "--json", code=ExitCode.NOT_FOUND)
    assert not problem.out
    assert json.loads(problem.err.splitlines()[1])["code"] == "not-found"
    assert (await ferry("node", "ls")).out.count("ready") == 2


async def test_a_definition_from_a_file_and_options_win(ferry: Ferry, tmp_path: Path) -> None:
    toml = tmp_path / "web.toml"
    toml.write_text('name = "web"\nmemory = "1G"\nvcpus = 2\n[[disks]]\nvolume = "root"\n')
    made = await ferry("domain", "define", "-f", str(toml), "--memory", "64M", "--json")
    spec = json.loads(made.out)["spec"]
    assert (spec["memory_bytes"], spec["vcpus"]) == (64 * 1024**2, 2)
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"name": "x", "memory_bytes": 1}')
    result = await ferry("domain", "define", "-f", str(wrong), code=ExitCode.USAGE)
    assert "memory_bytes must be a whole number from 16777216" in result.err
    wrong.write_text("{")
    await ferry("domain", "define", "-f", str(wrong), code=ExitCode.USAGE)
    await ferry("domain", "define", "-f", str(tmp_path / "none"), code=ExitCode.USAGE)
    await ferry("domain", "define", code=ExitCode.USAGE)
    assert "--memory is missing" in (await ferry("domain", "define", "x", code=ExitCode.USAGE)).err


async def test_pools(ferry: Ferry) -> None:
    assert "simulated" in (await ferry("pool", "ls")).out
    assert "every node" in (await ferry("pool", "add", "fast", "simulated")).out
    shown = (await ferry("pool", "show", "fast")).out
    assert "fence:" in shown and "takeover from a dead node:" in shown
    await ferry("pool", "add", "fast", "simulated", code=ExitCode.REFUSED)
    await ferry("pool", "add", "slow", "floppy", code=ExitCode.USAGE)
    wrong = await ferry("pool", "add", "slow", "nfs", "sever=x", code=ExitCode.USAGE)
    assert "server=" in wrong.err
    assert "reconnect_delay_s" in (await ferry("pool", "drivers")).out
    await ferry("pool", "rm", "fast")
    await ferry("pool", "rm", "fast", code=ExitCode.NOT_FOUND)


async def test_volumes_and_events(ferry: Ferry) -> None:
    await ferry("volume", "create", "data", "--size", "1M")
    assert "data" in (await ferry("volume", "ls")).out
    await ferry("volume", "create", "data", "--size", "1M", code=ExitCode.REFUSED)
    await ferry("volume", "create", "more", "--size", "lots", code=ExitCode.USAGE)
    assert "2.0 MiB" in (await ferry("volume", "resize", "data", "--size", "2M")).out
    assert "shrink" not in (await ferry("volume", "clone", "data", "copy")).out
    await ferry("volume", "resize", "data", "--size", "1M", code=ExitCode.USAGE)
    await ferry("volume", "rm", "copy")
    await ferry("volume", "rm", "data")
    await ferry("volume", "rm", "data", code=ExitCode.NOT_FOUND)
    await define(ferry)
    events = [json.loads(line) for line in (await ferry("events", "--json")).out.splitlines()]
    assert [event["kind"] for event in events] == ["domain-defined"]
    assert "was defined" in (await ferry("events")).out


async def test_the_console(ferry: Ferry, world: World) -> None:
    await define(ferry, "--start")
    path = world.a.hypervisor.console_log(DomainName("web"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"booted\n")
    assert (await ferry("domain", "console", "web")).out == "booted\n"
    as_json = await ferry("domain", "console", "web", "--json")
    assert json.loads(as_json.out) == {"console": "booted\n"}


async def test_wrong_usage_and_silence_have_their_codes(ferry: Ferry) -> None:
    await ferry("nonsense", code=ExitCode.USAGE)
    await ferry("migrate", code=ExitCode.USAGE)
    await ferry("domain", "define", "x", "--nic", "mac=1", code=ExitCode.USAGE)
    assert await asyncio.to_thread(main.run, ["node", "ls", "--api", "unix:/nowhere"]) == 5
    assert await asyncio.to_thread(main.run, ["node", "ls", "--api", "ftp://x"]) == 2
    assert await asyncio.to_thread(main.run, ["node", "ls", "--api"]) == 2
    assert await asyncio.to_thread(main.run, ["node", "ls", "--lab", "no-such-lab"]) == 3


# --- migrations ----------------------------------------------------------------------------------


async def _migrating(world: World) -> str:
    async with asyncio.timeout(30):
        while not world.migrations:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return next(iter(world.migrations))


@pytest.mark.parametrize(
    ("state", "code", "says"),
    [
        (MigrationState.COMPLETED, ExitCode.OK, "runs on b, blackout 7.5 ms"),
        (
            MigrationState.FAILED,
            ExitCode.MIGRATION_FAILED,
            "failed: no memory; web is running on a",
        ),
        (MigrationState.CANCELLED, ExitCode.MIGRATION_CANCELLED, "cancelled; web is running on a"),
    ],
)
async def test_migrate_waits_and_tells_how_it_ended(
    ferry: Ferry, world: World, state: MigrationState, code: int, says: str
) -> None:
    await define(ferry, "--start")
    command = asyncio.create_task(ferry("migrate", "web", "--downtime-limit", "9", code=code))
    found = await _migrating(world)
    assert world.migrations[found].request.downtime_limit_ms == 9
    error = "no memory" if state is MigrationState.FAILED else None
    world.a.migrations.end(found, state, error)
    result = await command
    assert says in result.out
    assert "precopy" in result.out
    assert not result.err


async def test_migrate_can_begin_only_or_ask_only(ferry: Ferry, world: World) -> None:
    await define(ferry, "--start")
    assert "can be migrated to b" in (await ferry("migrate", "web", "--dry-run")).out
    world.a.migrations.reasons = ["memory", "bridge"]
    dry = await ferry("migrate", "web", "--dry-run", code=ExitCode.REFUSED)
    assert "memory" in dry.out
    refused = await ferry("migrate", "web", code=ExitCode.REFUSED)
    assert "bridge" in refused.err
    world.a.migrations.reasons = []
    begun = json.loads((await ferry("migrate", "web", "--no-wait", "--json")).out)
    assert begun["id"] in (await ferry("migration", "ls", "--active")).out
    assert "precopy" in (await ferry("migration", "show", begun["id"])).out
    assert "cancelled" in (await ferry("migration", "cancel", begun["id"])).out
    assert world.migrations[begun["id"]].cancelled_by == "root on a"
    late = await ferry("migration", "cancel", begun["id"], code=ExitCode.REFUSED)
    assert "was cancelled already, at 2" in late.err
    await ferry("migration", "watch", begun["id"], code=ExitCode.MIGRATION_CANCELLED)
    await ferry("migration", "show", "m-99", code=ExitCode.NOT_FOUND)


async def test_a_domain_is_shown_with_why_its_guest_waits(ferry: Ferry, world: World) -> None:
    """It is running, and looks well."""
    await define(ferry, "--start")
    begun = json.loads((await ferry("migrate", "web", "--no-wait", "--json")).out)["id"]
    assert f"{begun}, precopy\n" in (await ferry("domain", "show", "web")).out
    world.migrations[begun] = msgspec.structs.replace(
        world.migrations[begun], state=MigrationState.POSTCOPY, error="the guest waits for pages"
    )
    shown = (await ferry("domain", "show", "web")).out
    assert f"{begun}, postcopy: the guest waits for pages\n" in shown


async def test_interrupted_without_a_terminal_it_detaches(
    ferry: Ferry, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await define(ferry, "--start")

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(progress, "_pause", interrupt)
    result = await ferry("migrate", "web", code=ExitCode.INTERRUPTED)
    assert "goes on" in result.out
    assert next(iter(world.migrations.values())).state is MigrationState.PRECOPY


@pytest.mark.parametrize(("answer", "code"), [("c", 7), ("d", 130), ("", 0)])
async def test_interrupted_on_a_terminal_it_asks(
    ferry: Ferry, world: World, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    await define(ferry, "--start")
    interrupted = False

    def interrupt(_: float) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise KeyboardInterrupt
        world.a.migrations.end("m-1", world.migrations["m-1"].state)
        if not answer:
            world.a.migrations.end("m-1", MigrationState.COMPLETED)

    monkeypatch.setattr(progress, "_pause", interrupt)
    monkeypatch.setattr(progress, "_on_terminal", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    await ferry("migrate", "web", code=code)


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"), [("4096", 4096), ("512M", 512 << 20), ("1.5g", 3 << 29), ("2KiB", 2048)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text, "--size") == count


def test_what_is_no_size_is_named() -> None:
    with pytest.raises(CliError, match="--bandwidth: 10X is not a size") as raised:
        parse_size("10X", "--bandwidth")
    assert raised.value.code is ExitCode.USAGE


def test_sizes_for_people() -> None:
    assert [size(count) for count in (None, 10, 1536, 3 << 30)] == [
        "-",
        "10 B",
        "1.5 KiB",
        "3.0 GiB",
    ]


@pytest.mark.parametrize(
    ("payload_bytes", "compressors", "text"),
    [(100, (), ""), (163, ("zstd-1", "lz4"), "1.63 zstd-1, lz4"), (163, (), "1.63")],
)
def test_what_an_iteration_was_compressed_by(
    payload_bytes: int, compressors: tuple[str, ...], text: str
) -> None:
    one = PassReport(
        number=1,
        kind=PassKind.FIRST,
        seconds=1.0,
        pages=1,
        bytes_sent=100,
        payload_bytes=payload_bytes,
        compressors=compressors,
    )
    assert compression_of(one) == text


def test_disks_and_nics() -> None:
    assert parse_disk("v,pool=fast,ro=true") == {"volume": "v", "pool": "fast", "read_only": True}
    assert parse_disk("volume=v") == {"volume": "v"}
    assert parse_nic(f"bridge=b,mac={MAC},ip=1.2.3.4,ip=fd00::1,mtu=9000") == {
        "bridge": "b",
        "mac": MAC,
        "addresses": ["1.2.3.4", "fd00::1"],
        "mtu_bytes": 9000,
    }
    assert parse_disk("v,ro=off") == {"volume": "v", "read_only": False}
    with pytest.raises(CliError):
        parse_disk("v,size=3")
    with pytest.raises(CliError, match="ro must be true or false, not 'ture'"):
        parse_disk("v,ro=ture")
    with pytest.raises(CliError, match="antispoof must be true or false"):
        parse_nic(f"bridge=b,mac={MAC},antispoof=y")


def test_a_file_that_holds_no_domain(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[]")
    with pytest.raises(CliError):
        load_spec(path)


def test_where_the_agent_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FERRY_API", "unix:/env")
    assert cli_client.find_address("unix:/option", None) == "unix:/option"
    assert cli_client.find_address(None, None) == "unix:/env"
    monkeypatch.delenv("FERRY_API")
    monkeypatch.delenv("FERRY_LAB", raising=False)
    default = tmp_path / "api.sock"
    monkeypatch.setattr(cli_client, "DEFAULT_SOCKET", default)
    monkeypatch.setattr(cli_client, "_labs", list)
    with pytest.raises(CliError, match="`systemctl start ferry-agent`"):
        cli_client.find_address(None, None)
    monkeypatch.setattr(cli_client, "_labs", lambda: ["one", "two"])
    with pytest.raises(CliError, match="several labs"):
        cli_client.find_address(None, None)
    monkeypatch.setattr(cli_client, "_labs", lambda: ["one"])
    monkeypatch.setattr(cli_client, "_lab_address", lambda name: f"unix:/{name}")
    assert cli_client.find_address(None, None) == "unix:/one"
    monkeypatch.setenv("FERRY_LAB", "two")
    assert cli_client.find_address(None, None) == "unix:/two"
    monkeypatch.delenv("FERRY_LAB")
    default.touch()
    assert cli_client.find_address(None, None) == f"unix:{default}"


def test_the_options_before_a_mounted_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FERRY_LAB", "")
    assert main.take_leading(["domain", "ls", "--lab", "x"]) == []
    assert main.take_leading(["--lab"]) == []
    assert os.environ["FERRY_LAB"] == ""
    given = ["--json", "--lab", "two", "lab", "exec", "n1", "--", "x", "--json", "--lab"]
    assert main.take_leading(given) == [*given[3:], "--json"]
    assert os.environ["FERRY_LAB"] == "two"
    assert main.take_leading(["--lab=three", "lab", "status"]) == ["lab", "status"]
    assert os.environ["FERRY_LAB"] == "three"


def test_the_help_is_complete_and_imports_nothing_heavy() -> None:
    """0.2 s on an idle machine; what would make it slow is what it imports."""
    program = (
        "import sys\n"
        "from node_agent.cli.main import run\n"
        "run(['--help'])\n"
        "heavy = {'aiohttp', 'numpy', 'pyroute2', 'grpc', 'qemu', 'zeroconf', 'matplotlib'}\n"
        "print('imported:', sorted(heavy & sys.modules.keys()))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for word in ("Exit codes", "migrate", "events", "agent", "lab", "--api", "drain"):
        assert word in done.stdout
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_a_command_imports_no_other() -> None:
    program = (
        "import sys\n"
        "from node_agent.cli.main import run\n"
        "run(['migrate', '--help'])\n"
        "own = [each for each in sys.modules if each.startswith('node_agent.cli.')]\n"
        "print(sorted({'asyncio', 'pydantic', 'rich', *own} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    imported = done.stdout.splitlines()[-1]
    assert "node_agent.cli.migrations" in imported
    for other in ("asyncio", "pydantic", "node_agent.cli.storage", "node_agent.cli.drain"):
        assert f"'{other}'" not in imported, imported


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == ExitCode.OK
    assert capsys.readouterr().out == f"ferry {importlib.metadata.version('ferry')}\n"


def test_an_agent_that_is_asked_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stopped process still takes connections: the user hears what is waited for, and an end."""
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        monkeypatch.setattr(cli_client, "PATIENCE_S", 0.01)
        client = cli_client.ApiClient(f"unix:{path}")
        with pytest.raises(CliError, match="it doesn't answer in time") as raised:
            client.get("/v1/nodes", NodeList, timeout_s=0.5)
        assert raised.value.code is ExitCode.UNREACHABLE
        assert f"unix:{path} has not answered for" in capfd.readouterr().err


def test_a_request_that_is_interrupted_may_have_been_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        raise KeyboardInterrupt

    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        monkeypatch.setattr(cli_client, "PATIENCE_S", 0.01)
        monkeypatch.setattr(http.client.HTTPConnection, "getresponse", interrupted)
        client = cli_client.ApiClient(f"unix:{path}")
        with pytest.raises(CliError, match="may be done all the same") as raised:
            client.post("/v1/nodes/n1/drain", NodeList)
        assert raised.value.code is ExitCode.INTERRUPTED
        with pytest.raises(KeyboardInterrupt):
            client.get("/v1/nodes", NodeList)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ferry mig", {"migrate", "migration"}),
        ("ferry domain st", {"start", "stop"}),
        ("ferry lab do", {"down"}),
        ("ferry migrate web --to n2 --mo", {"--mode"}),
    ],
)
def test_a_shell_completes_commands_and_options(
    line: str,
    offered: set[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Those of a command that is mounted only when it is called, too."""
    monkeypatch.setenv(completion.VARIABLE, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line.replace(" ", "\n"))
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    assert main.run([]) == ExitCode.OK
    assert set(capsys.readouterr().out.split()) == offered


def test_a_shells_script_asks_with_the_variable_that_is_answered(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert main.run(["completion", shell]) == ExitCode.OK
        assert f"{completion.VARIABLE}=complete_{shell}" in capsys.readouterr().out
