"""`ferry cluster`, `user` and `context`, as they are typed, against a real cluster of one."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from node_agent.cli import context_file, new_config
from node_agent.cli.client import Access, ApiClient
from node_agent.cli.errors import CliError, ExitCode
from node_agent.cli.trust import parse_duration
from node_agent.config import load_config
from node_agent.trust.files import TrustFolder
from tests.unit.ferry_command import Ferry, ferry_command
from tests.unit.trust_world import TrustWorld, trust_world

pytestmark = pytest.mark.allow_blocking("the CLI is synchronous; it runs in a thread")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[TrustWorld]:
    async with trust_world(tmp_path) as opened:
        yield opened


@pytest.fixture
def ferry(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Ferry:
    """`ferry`, as a user without a local agent runs it."""
    monkeypatch.setenv("FERRY_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FERRY_LAB_ROOT", str(tmp_path / "labs"))
    for name in ("FERRY_API", "FERRY_LAB", "FERRY_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    return ferry_command(capfd)


async def test_users_and_contexts(world: TrustWorld, ferry: Ferry, tmp_path: Path) -> None:
    local = ["--api", f"unix:{tmp_path / 'api.sock'}"]
    for wrong in (("--ttl", "9x"), ("--ttl", "9999999d"), ("--label", "x" * 101)):
        await ferry("user", "add", "bob", *wrong, *local, code=ExitCode.USAGE)  # And no bob.
    made = await ferry("user", "add", "bob", "--role", "operator", "--label", "laptop", *local)
    token = made.out.strip()  # Alone: a script takes it as it is.
    assert "ferry context add c1 --server" in made.err
    fingerprint = world.one.identity.fingerprint
    add = ["context", "add", "prod", "--server", world.server, "--token", token]
    refused = await ferry(*add, code=ExitCode.USAGE)
    assert "--ca FILE or --fingerprint HEX" in refused.err
    no_port = [*add, "--server", "127.0.0.1", "--fingerprint", "ab" * 32]
    assert '"127.0.0.1" is not HOST:PORT' in (await ferry(*no_port, code=ExitCode.USAGE)).err
    refused = await ferry(*add, "--fingerprint", "ab" * 32, code=ExitCode.REFUSED)
    assert "of another cluster" in refused.err
    await ferry(*add, "--fingerprint", "xyz", code=ExitCode.USAGE)
    # n1's certificate names n1 and 127.0.0.1.
    added = await ferry(*add, "--fingerprint", fingerprint)
    assert f"context prod: bob (operator) at {world.server}" in added.out
    authority = world.one.folder.files.authority_path
    add[2] = "again"
    await ferry(*add, "--ca", authority, "--server-name", "n1")
    wrong_name = await ferry(*add, "--ca", authority, "--server-name", "n9", code=None)
    assert wrong_name.code == ExitCode.UNREACHABLE
    assert "certificate is not accepted" in wrong_name.err
    listed = json.loads((await ferry("context", "ls", "--json")).out)
    assert [(each["name"], each["current"]) for each in listed] == [
        ("prod", True),
        ("again", False),
    ]
    assert token not in (await ferry("context", "ls")).out
    path = context_file.file_path()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "ready" in (await ferry("node", "ls")).out
    forbidden = await ferry("user", "ls", code=ExitCode.NOT_PERMITTED)
    assert "the role admin is needed; user bob has the role operator" in forbidden.err
    token_id = token.split("-")[1]
    assert "laptop" in (await ferry("user", "ls", *local)).out
    await ferry("user", "token", "bob", "--rm", token_id, *local)
    gone = await ferry("node", "ls", "--context", "prod", code=ExitCode.NOT_PERMITTED)
    assert "the token is wrong, or was removed" in gone.err
    path.chmod(0o644)
    assert "chmod 600" in (await ferry("node", "ls", code=ExitCode.FAILED)).err
    path.chmod(0o600)
    await ferry("context", "use", "nowhere", code=ExitCode.NOT_FOUND)
    await ferry("context", "use", "again")
    await ferry("context", "rm", "again")
    assert context_file.read_contexts().current is None
    changed = await ferry("user", "role", "bob", "viewer", *local)
    assert changed.out == "user bob has the role viewer\n"
    await ferry("user", "role", "bob", "king", *local, code=ExitCode.USAGE)
    await ferry("user", "role", "eve", "viewer", *local, code=ExitCode.NOT_FOUND)
    await ferry("user", "rm", "bob", *local)
    await ferry("user", "rm", "bob", *local, code=ExitCode.NOT_FOUND)


async def test_a_damaged_authority_is_named(ferry: Ferry, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    await asyncio.to_thread(broken.write_text, "nonsense")
    add = ["context", "add", "c", "--server", "127.0.0.1:1", "--token", "t", "--ca"]
    refused = await ferry(*add, str(broken), code=ExitCode.USAGE)
    assert "the authority of context c is not a certificate" in refused.err
    await ferry(*add, str(tmp_path / "none.pem"), code=ExitCode.USAGE)


def test_a_token_never_goes_in_clear_text() -> None:
    with pytest.raises(CliError, match="never sent in clear text"):
        ApiClient("http://127.0.0.1:1", Access(token="t"))


async def test_a_node_joins_with_one_command(
    world: TrustWorld, ferry: Ferry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_config, "STATE_DIRECTORY", str(tmp_path / "joined"))
    local = ["--api", f"unix:{tmp_path / 'api.sock'}"]
    made = await ferry("cluster", "token", "--ttl", "5m", "--json", *local)
    token = json.loads(made.out)["token"]
    config = tmp_path / "etc" / "agent.toml"
    await asyncio.to_thread((tmp_path / "cluster.sqlite").touch)
    own = ["--config", str(config), "--name", "n7", "--listen", "127.0.0.7"]
    command = ["cluster", "join", token, "--address", world.server, *own]
    joined = await ferry(*command)
    assert "node n7 joined the cluster c1, with n1" in joined.out
    loaded = load_config(config)
    assert loaded.peer.listen == "127.0.0.7:7781"
    assert [line for line in config.read_text().splitlines()[2:] if line] == [
        "[node]",
        'name = "n7"',
        f'state_directory = "{tmp_path / "joined"}"',
        "[api]",
        'listen = "127.0.0.7:7780"',
        'socket = "/run/ferry/api.sock"',
        "[peer]",
        'listen = "127.0.0.7:7781"',
        "[migration]",
        'address = "127.0.0.7"',
        "[store]",
        'driver = "sqlite"',
        f'path = "{tmp_path / "cluster.sqlite"}"',
    ]
    assert loaded.store == world.one.config.store  # As the cluster says.
    assert TrustFolder(tmp_path / "joined").load("n7").cluster == "c1"
    again = await ferry(*command, code=ExitCode.REFUSED)
    assert "--again" in again.err
    used = await ferry(*command, "--again", code=ExitCode.NOT_PERMITTED)
    assert "was used already, by n7" in used.err
    shown = await ferry("cluster", "show", *local)
    assert "n7" in shown.out and world.one.identity.fingerprint in shown.out


async def test_what_can_not_be_joined_says_why(
    world: TrustWorld, ferry: Ferry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_config, "STATE_DIRECTORY", str(tmp_path / "not-joined"))
    config = ["--config", str(tmp_path / "c.toml"), "--name", "n7", "--listen", "127.0.0.7"]
    wrong = await ferry("cluster", "join", "nonsense", *config, code=ExitCode.USAGE)
    assert "not a join token" in wrong.err
    local = ["--api", f"unix:{tmp_path / 'api.sock'}"]
    token = json.loads((await ferry("cluster", "token", "--json", *local)).out)["token"]
    there = ["--address", "127.0.0.1:1"]
    silent = await ferry("cluster", "join", token, *there, *config, code=ExitCode.UNREACHABLE)
    assert "can't be reached" in silent.err
    there = ["--address", "127.0.0.1"]
    await ferry("cluster", "join", token, *there, *config, code=ExitCode.USAGE)
    await ferry("cluster", "token", "--ttl", "soon", *local, code=ExitCode.USAGE)
    long = await ferry("cluster", "token", "--ttl", "30d", *local, code=ExitCode.USAGE)
    assert "a join token holds from 1s to 7d" in long.err
    made = await ferry("cluster", "token", *local)
    assert made.out.strip() == made.out.split()[0]  # Nothing but the token.
    assert "ferry cluster join TOKEN" in made.err
    assert not (tmp_path / "c.toml").exists()


async def test_a_cluster_is_founded_with_one_command(
    ferry: Ferry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_config, "STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setattr(new_config, "API_SOCKET", str(tmp_path / "nobody.sock"))
    config = tmp_path / "agent.toml"
    founded = await ferry(
        "cluster", "init", "--cluster", "prod", "--config", str(config), "--listen", "192.0.2.1"
    )
    assert "founded the cluster prod" in founded.out
    assert "a cluster of agents on this one host" in founded.out
    name = load_config(config).node.name
    assert TrustFolder(tmp_path / "state").load(name).cluster == "prod"
    again = await ferry("cluster", "init", "--config", str(config), code=ExitCode.REFUSED)
    assert "belongs to the cluster prod already" in again.err
    before = TrustFolder(tmp_path / "state").load(name).fingerprint
    anew = await ferry("cluster", "init", "--replace", "--config", str(config))
    assert "founded the cluster prod anew; users, domains and pools stay" in anew.out
    assert TrustFolder(tmp_path / "state").load(name).fingerprint not in (before, "")
    assert [path.name[:4] for path in (tmp_path / "state").glob("tls.*")] == ["tls."]
    monkeypatch.setattr(new_config, "STATE_DIRECTORY", str(tmp_path / "second"))
    members = ["--etcd", "192.0.2.1:2379", "--etcd", "192.0.2.2:2379"]
    second = ["cluster", "init", "--config", str(tmp_path / "b.toml"), "--listen", "192.0.2.1"]
    assert "one host" not in (await ferry(*second, *members)).out
    store = load_config(tmp_path / "b.toml").store
    assert (store.driver, store.endpoints) == ("etcd", ("192.0.2.1:2379", "192.0.2.2:2379"))


@pytest.mark.parametrize("wrong", ["192.0.2.1:7780", "n7.example.org", "[::1]:7780", ""])
async def test_an_address_to_listen_at_has_no_port(
    wrong: str, ferry: Ferry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_config, "STATE_DIRECTORY", str(tmp_path / "state"))
    config = tmp_path / "agent.toml"
    own = ["--config", str(config), "--name", "n7", f"--listen={wrong}"]
    refused = await ferry("cluster", "init", *own, code=ExitCode.USAGE)
    assert f'--listen is "{wrong}"; must be an IP address' in refused.err
    assert not config.exists() and not (tmp_path / "state").exists()


def test_durations() -> None:
    assert [parse_duration(text) for text in ("90", "90s", "15m", "1.5h", "2d")] == [
        90,
        90,
        900,
        5400,
        172_800,
    ]
