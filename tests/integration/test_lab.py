"""Labs for real: side by side, made twice, repaired, killed half-way, shaped, and gone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import lab
from deploy.lab import namespaces, network, processes, registry
from migrator.errors import ConflictError, FerryError, InvalidRequest, NotFoundError
from netfabric.macvtap.network import NODES

pytestmark = pytest.mark.lab

STUB = (sys.executable, "-S", str(Path(__file__).with_name("stub_agent.py")))
SILENT = (sys.executable, "-S", "-c", "import time; time.sleep(600)")
"""In the place of an agent that doesn't answer yet: an `up` waits for it."""
COMMAND_TIMEOUT_S = 60.0
UP_SCRIPT = f"from deploy import lab; lab.up({{!r}}, nodes=2, agent_command={STUB!r})"
UP_COMMAND = f"""
from deploy.lab import cli, lab
lab.AGENT_COMMAND = {SILENT!r}
cli.app(["up", "--nodes", "2", "--name", {{!r}}])
"""
TRANSFER_BYTES = 4 * 1024 * 1024

SERVER = """
import socket, sys
with socket.create_server((sys.argv[1], 5001)) as server:
    server.settimeout(20)
    print("listening", flush=True)
    connection, _ = server.accept()
    with connection:
        connection.settimeout(20)
        while connection.recv(65536):
            pass
        connection.sendall(b"all")
"""
CLIENT = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 5001), timeout=20) as connection:
    began = time.monotonic()
    connection.sendall(bytes(int(sys.argv[2])))
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(3) == b"all"
    print(time.monotonic() - began)
"""


@pytest.fixture
def name() -> Iterator[str]:
    """A lab's name that nobody else uses; whatever is up under it is taken down."""
    chosen = f"t{os.getpid()}-{random.randrange(10**6)}"
    yield chosen
    for suffix in ("", "b"):
        lab.down(chosen + suffix)


def traces(name: str) -> list[str]:
    """What of the lab is left on the machine."""
    left = namespaces.lab_namespaces(name)
    left += [item.name for item in registry.registered() if item.name == name]
    left += [str(path) for path in [lab.labs_root() / name] if path.exists()]
    mark = f"/{name}/"
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            left += [item for item in processes.command_of(int(entry.name)) if mark in item]
    return left


def agent_pids(name: str) -> dict[str, int | None]:
    return {node.name: node.agent_pid for node in lab.status(name).nodes}


def test_up_is_a_working_cluster_and_down_leaves_nothing(name: str) -> None:
    lab.up(name, nodes=2, agent_command=STUB)
    status = lab.status(name)
    assert status.state == "ready"
    assert [node.agent for node in status.nodes] == ["ready", "ready"]
    plan = lab.load(name).plan
    for where in ("client", "storage", "n1"):
        ping = lab.run_in(name, where, ["ping", "-c1", "-W5", plan.node("n2").mgmt_address], 20)
        assert ping.returncode == 0, ping.stdout
    assert network.missing_interfaces(plan) == []
    assert lab.down(name)
    assert traces(name) == []
    assert not lab.down(name)
    with pytest.raises(NotFoundError, match="ferry lab up"):
        lab.status(name)


def test_up_twice_changes_nothing(name: str) -> None:
    lab.up(name, nodes=2, agent_command=STUB)
    before = agent_pids(name)
    steps: list[str] = []
    lab.up(name, report=steps.append)
    assert agent_pids(name) == before
    assert steps == ["agent n1 answers", "agent n2 answers"]


def test_up_repairs_what_is_missing(name: str) -> None:
    lab.up(name, nodes=2, agent_command=STUB)
    before = agent_pids(name)
    assert lab.kill_agent(name, "n1")
    assert not lab.kill_agent(name, "n1")
    plan = lab.load(name).plan
    lab.run_in(name, "switch", ["ip", "link", "del", "m-n2"], COMMAND_TIMEOUT_S)
    namespaces.remove_namespace(plan.namespace("storage"))
    status = lab.status(name)
    assert status.state == "damaged"
    assert {item.rpartition("/")[2] for item in status.missing} >= {
        plan.namespace("storage"),
        "m-n2",
        "mgmt0",
    }
    lab.up(name)
    after = agent_pids(name)
    assert lab.status(name).state == "ready"
    assert after["n1"] not in (None, before["n1"])
    assert after["n2"] == before["n2"]
    ping = lab.run_in(name, "n2", ["ping", "-c1", "-W5", plan.storage_address], 20)
    assert ping.returncode == 0, ping.stdout


def test_a_lab_grows_but_does_not_shrink(name: str) -> None:
    lab.up(name, nodes=1, agent_command=STUB)
    lab.up(name, nodes=2)
    status = lab.status(name)
    assert [node.name for node in status.nodes] == ["n1", "n2"]
    assert status.state == "ready"
    assert 'name = "n2"' in lab.load(name).plan.node("n1").config_path.read_text()
    with pytest.raises(ConflictError, match="can't shrink"):
        lab.up(name, nodes=1)
    assert lab.status(name).state == "ready"


def test_two_labs_side_by_side(name: str) -> None:
    other = name + "b"
    lab.up(name, nodes=2, agent_command=STUB)
    lab.up(other, nodes=2, agent_command=STUB)
    first, second = lab.load(name).plan, lab.load(other).plan
    assert first.index != second.index
    ping = lab.run_in(name, "n1", ["ping", "-c1", "-W5", first.node("n2").mgmt_address], 20)
    assert ping.returncode == 0, ping.stdout
    assert {name, other} <= set(lab.list_labs())
    lab.down(name)
    assert traces(name) == []
    assert lab.status(other).state == "ready"


def test_the_same_name_in_another_folder_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.up(name, nodes=1, agent_command=STUB)
    before = agent_pids(name)
    with monkeypatch.context() as patch:
        patch.setenv("FERRY_LAB_ROOT", "/tmp/elsewhere")
        with pytest.raises(ConflictError, match="exists already"):
            lab.up(name, nodes=1, agent_command=STUB)
        assert agent_pids(name) == before
        assert lab.down(name)
    assert traces(name) == []


def test_a_failing_up_removes_what_it_made(name: str) -> None:
    broken = (sys.executable, "-S", "-c", "import sys; sys.exit('no such luck')")
    with pytest.raises(FerryError, match="no such luck"):
        lab.up(name, nodes=2, agent_command=broken)
    assert traces(name) == []
    with pytest.raises(InvalidRequest):
        lab.up(name, nodes=1000, agent_command=STUB)
    assert traces(name) == []


def test_a_failing_repair_keeps_what_was_there(name: str) -> None:
    lab.up(name, nodes=1, agent_command=STUB)
    before = agent_pids(name)
    broken = (sys.executable, "-S", "-c", "import sys; sys.exit('no such luck')")
    with pytest.raises(FerryError, match="no such luck"):
        lab.up(name, link_mbit=50, nodes=2, agent_command=broken)
    plan = lab.load(name).plan
    assert plan.node_count == 1
    assert namespaces.lab_namespaces(name) == sorted(plan.namespaces)
    lab.up(name, agent_command=STUB)
    assert lab.status(name).state == "ready"
    assert before.keys() == agent_pids(name).keys()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_an_interrupted_up_removes_what_it_made(
    name: str, count: int, stop: signal.Signals
) -> None:
    """SIGTERM, too, by way of the command, and also while processes are being started."""
    with subprocess.Popen([sys.executable, "-c", UP_COMMAND.format(name)]) as child:
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        while len(namespaces.lab_namespaces(name)) < count and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        child.send_signal(stop)
        assert child.wait(COMMAND_TIMEOUT_S) != 0
    assert traces(name) == []


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.55, 0.7, 0.8, 0.9, 0.97])
def test_a_killed_up_is_cleaned_by_down(name: str, fraction: float, up_seconds: float) -> None:
    with subprocess.Popen([sys.executable, "-c", UP_SCRIPT.format(name)]) as child:
        time.sleep(up_seconds * fraction)
        child.kill()
        child.wait(COMMAND_TIMEOUT_S)
    lab.down(name)
    assert traces(name) == []


def test_a_killed_up_is_repaired_by_up(name: str) -> None:
    with subprocess.Popen([sys.executable, "-c", UP_SCRIPT.format(name)]) as child:
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        while len(namespaces.lab_namespaces(name)) < 4 and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        child.kill()
        child.wait(COMMAND_TIMEOUT_S)
    lab.up(name, nodes=2, agent_command=STUB)
    assert lab.status(name).state == "ready"


@pytest.fixture(scope="module")
def up_seconds() -> float:
    """How long a process needs to bring a lab up here, by trying once."""
    chosen = f"t{os.getpid()}-timing"
    began = time.monotonic()
    try:
        subprocess.run(
            [sys.executable, "-c", UP_SCRIPT.format(chosen)], check=True, timeout=COMMAND_TIMEOUT_S
        )
        return time.monotonic() - began
    finally:
        lab.down(chosen)


def test_down_ends_everything_that_runs_in_the_lab(name: str) -> None:
    lab.up(name, nodes=1, agent_command=STUB)
    daemon = "import os, time; os.fork() or (os.setsid(), time.sleep(600))"
    vector = lab.command_in(name, "client", [sys.executable, "-S", "-c", daemon])
    subprocess.run(vector, check=True, timeout=COMMAND_TIMEOUT_S)
    client = lab.load(name).plan.namespace("client")
    stray = processes.processes_in([client])[client]
    assert len(stray) == 1
    lab.down(name)
    assert not processes.alive(stray[0])


def test_the_command_line_looks_into_a_lab(name: str) -> None:
    lab.up(name, nodes=1, agent_command=STUB)
    address = lab.load(name).plan.node("n1").mgmt_address

    def ferry_lab(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deploy.lab.cli", *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )

    shown = ferry_lab("exec", "--name", name, "n1", "--", "ip", "-4", "address", "show", "mgmt0")
    assert address in shown.stdout
    assert ferry_lab("exec", "--name", name, "client", "false").returncode == 1
    assert ferry_lab("exec", "--name", name, "n1", "--").returncode == 2
    nobody = ferry_lab("exec", "--name", name, "n7", "--", "true")
    assert (nobody.returncode, "it has n1, client" in nobody.stderr) == (3, True)
    nowhere = ferry_lab("status", "--lab", "nowhere")
    assert (nowhere.returncode, name in nowhere.stderr) == (3, True)
    assert lab.load(name).nodes[0].api in ferry_lab("status", "--lab", name).stdout
    ferry_lab("agent", "--name", name, "n1", "kill")
    damaged = ferry_lab("status", "--name", name, "--json")
    assert damaged.returncode == 1
    assert json.loads(damaged.stdout)["nodes"][0]["agent"] == "stopped"
    assert name in ferry_lab("ls").stdout.splitlines()


def test_an_agent_is_stopped_killed_and_restarted(name: str) -> None:
    lab.up(name, nodes=1, agent_command=STUB)
    first = agent_pids(name)["n1"]
    second = lab.restart_agent(name, "n1")
    assert second.pid != first
    assert lab.stop_agent(name, "n1")
    assert agent_pids(name)["n1"] is None
    third = lab.start_agent(name, "n1")
    assert lab.start_agent(name, "n1") == third
    assert lab.kill_agent(name, "n1")
    assert not processes.alive(third)


def test_a_process_that_waits_for_the_lock_is_told(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "LOCK_TIMEOUT_S", 0.2)
    with registry.lab_lock(name), pytest.raises(ConflictError, match="too long"):
        lab.up(name, nodes=1, agent_command=STUB)
    assert traces(name) == []


def transfer_seconds(name: str, sender: str, receiver: str) -> float:
    address = lab.load(name).plan.node(receiver).mgmt_address
    serve = lab.command_in(name, receiver, [sys.executable, "-S", "-c", SERVER, address])
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "listening\n"
            done = lab.run_in(
                name,
                sender,
                [sys.executable, "-S", "-c", CLIENT, address, str(TRANSFER_BYTES)],
                COMMAND_TIMEOUT_S,
            )
            assert done.returncode == 0, done.stderr
            return float(done.stdout)
        finally:
            server.kill()


def test_macvtaps_nodes_go_with_the_lab_whose_guests_they_are(name: str) -> None:
    """They are in /dev, where every namespace's are. A lab with guests may be taken down."""
    lab.up(name, nodes=2, agent_command=STUB)
    (namespace,) = [each for each in namespaces.lab_namespaces(name) if each.endswith("-n2")]
    key = namespaces.namespace_key(namespace)
    assert key is not None
    left, others = NODES / f"ferry-macvtap-{key[1]}-7", NODES / f"ferry-macvtap-{key[1]}0-7"
    try:
        for node in (left, others):
            node.touch(exist_ok=False)
        assert lab.down(name)
        assert (left.exists(), others.exists()) == (False, True)
    finally:
        for node in (left, others):
            node.unlink(missing_ok=True)


def test_links_are_shaped_in_both_directions_and_freed_again(name: str) -> None:
    """4 MiB take 0.34 s at 100 Mbit/s and 1.7 s at 20; asserted as ratios, not as speeds."""
    lab.up(name, nodes=2, link_mbit=20, agent_command=STUB)
    slow = [transfer_seconds(name, "n1", "n2"), transfer_seconds(name, "n2", "n1")]
    # Other work only ever slows one: the quickest counts.
    lab.up(name, link_mbit=100)
    fast = min(transfer_seconds(name, "n1", "n2") for _ in range(4))
    lab.up(name, link_mbit=0)
    free = min(transfer_seconds(name, "n1", "n2") for _ in range(4))
    ideal = TRANSFER_BYTES * 8 / 20e6
    assert all(seconds > 0.8 * ideal for seconds in slow), slow
    assert fast > 0.8 * ideal / 5, fast
    assert min(slow) / fast > 2.5, (slow, fast)
    assert fast / free > 2, (fast, free)
