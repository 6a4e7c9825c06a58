"""`ferry demo` as a user runs it: to its end, interrupted, and where a lab is already there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy import lab
from deploy.demo import story
from deploy.lab.namespaces import lab_namespaces

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

WHOLE_TIMEOUT_S = 240.0
STEP_TIMEOUT_S = 90.0


@pytest.fixture
def name() -> Iterator[str]:
    """A lab's name that nobody else uses; whatever is up under it is taken down."""
    chosen = f"d{os.getpid()}-{random.randrange(10**6)}"
    yield chosen
    lab.down(chosen)


@contextmanager
def demo(name: str, folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A running demo; killed at the end if it still runs."""
    command = [sys.executable, "-m", "node_agent.cli.main", "demo", "--lab", name, *options]
    with subprocess.Popen(
        [*command, "--plot", str(folder / "demo.png")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_lab(name: str, process: subprocess.Popen[str]) -> None:
    """Until this demo has marked the lab as its own; an older mark doesn't count."""
    began_s, deadline_s = time.time(), time.monotonic() + STEP_TIMEOUT_S
    marker = lab.labs_root() / name / story.MARKER
    while not marker.exists() or marker.stat().st_mtime < began_s:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_the_guest_moves_around_and_nobody_is_hurt(name: str, tmp_path: Path) -> None:
    with demo(name, tmp_path, "--json", "--rounds", "1", "--nodes", "2") as process:
        stdout, stderr = process.communicate(timeout=WHOLE_TIMEOUT_S)
    assert process.returncode == 0, stderr
    result = json.loads(stdout.splitlines()[-1])
    moves = [(each["source"], each["destination"]) for each in result["migrations"]]
    assert moves == [("n1", "n2"), ("n2", "n1")]
    for each in result["migrations"]:
        assert each["iterations"] >= 2
        assert each["bytes_sent"] > 50_000_000
        assert 0 < each["blackout_ms"] <= each["client_longest_gap_ms"] < 5000
        assert each["packets_lost"] >= 0
    assert result["tcp_connection_survived"] is True
    assert result["http_errors"] == result["guest_corruptions"] == 0
    assert Path(result["plot"]).read_bytes().startswith(b"\x89PNG")
    drain = result["drain"]
    assert (drain["domains"], drain["client_errors"]) == (3, 0)
    assert drain["planned_s"] > 0 and drain["actual_s"] > 0 and drain["worst_blackout_ms"] > 0
    assert "HAProxy" in stderr and "longest gap" in stderr
    assert name not in lab.list_labs()


def test_an_interrupt_takes_everything_down(name: str, tmp_path: Path) -> None:
    with demo(name, tmp_path) as process:
        wait_for_lab(name, process)
        time.sleep(random.uniform(0, 6))  # anywhere from the network to the first migration
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=STEP_TIMEOUT_S)
    assert process.returncode == 130, stderr
    assert lab_namespaces(name) == []
    assert name not in lab.list_labs()


def test_a_killed_demo_is_cleaned_up_by_the_next_and_a_users_lab_is_not(
    name: str, tmp_path: Path
) -> None:
    with demo(name, tmp_path) as first:
        wait_for_lab(name, first)
        with demo(name, tmp_path) as second:
            _, stderr = second.communicate(timeout=STEP_TIMEOUT_S)
            assert second.returncode == 1
            assert "another `ferry demo`" in stderr
        first.kill()
    with demo(name, tmp_path) as third:
        wait_for_lab(name, third)
        third.send_signal(signal.SIGTERM)
        stdout, _ = third.communicate(timeout=STEP_TIMEOUT_S)
        assert "was killed" in stdout
    assert name not in lab.list_labs()
    (lab.labs_root() / name).mkdir()
    (lab.labs_root() / name / "lab.json").write_text("{}")
    with demo(name, tmp_path) as fourth:
        _, stderr = fourth.communicate(timeout=STEP_TIMEOUT_S)
    assert fourth.returncode == 1
    assert f"ferry lab down --lab {name}" in stderr
