"""Nodes whose clocks are wrong, and set in the midst: real agents and engines, mutual TLS, a guest.

The kernel's clock is everybody's here. So the agents of n1 and n2 are started with a clock of their
own preloaded (`wall_clock.c`).
"""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import lab
from deploy.guest.build import build_guest, default_cache_directory
from migrator.model import Migration, MigrationMode, MigrationState
from node_agent.cli.errors import ApiProblem
from node_agent.events import EventKind
from node_agent.resources import MigrationChange, Node
from tests.integration.cluster.world import (
    UNHEARD_UDP_PER_S,
    Cluster,
    Load,
    describe,
    eventually,
)

pytestmark = pytest.mark.lab

LOAD = Load(dirty_pages_per_s=500, udp_per_s=UNHEARD_UDP_PER_S)
DAY_S = 86_400
YEAR_S = 365 * DAY_S
SANE_MS = 30_000.0
SOURCE = Path(__file__).with_name("wall_clock.c")


class WallClock:
    """The clock of one node's agent; `set` steps it."""

    def __init__(self, shim: Path, path: Path) -> None:
        self.shim = shim
        self.path = path
        path.write_bytes(struct.pack("q", 0))
        with path.open("r+b") as opened:
            self._mapped = mmap.mmap(opened.fileno(), 8)

    def set(self, ahead_s: int) -> None:
        self._mapped[:8] = struct.pack("q", ahead_s)

    def restart_agent(self, cluster: str, *, kill: bool) -> None:
        """With this clock."""
        node = self.path.name
        lab.stop_agent(cluster, node, kill=kill)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("LD_PRELOAD", str(self.shim))
            environment.setenv("FERRY_TEST_CLOCK", str(self.path))
            lab.start_agent(cluster, node)


@pytest.fixture(scope="module")
def clocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WallClock]:
    folder = tmp_path_factory.mktemp("clocks")
    shim = folder / "wall_clock.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(shim), str(SOURCE)]
    subprocess.run(command, check=True, timeout=60)
    return {name: WallClock(shim, folder / name) for name in ("n1", "n2")}


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, clocks: dict[str, WallClock]
) -> Iterator[Cluster]:
    name = f"k{os.getpid()}"
    try:
        lab.up(name, nodes=2, node_memory_bytes=1024**3, tls=True)
        for clock in clocks.values():
            clock.restart_agent(name, kill=False)
        image = build_guest(default_cache_directory())
        yield Cluster(lab.load(name).plan, image, tmp_path_factory.mktemp("holds"))
    finally:
        lab.down(name)


@pytest.fixture(autouse=True)
def right_again(clocks: dict[str, WallClock]) -> Iterator[None]:
    yield
    for clock in clocks.values():
        clock.set(0)


def told(cluster: Cluster, kind: EventKind, node: str) -> bool:
    return any(event.kind == kind and event.data["node"] == node for event in cluster.events())


def offset_s(cluster: Cluster) -> float | None:
    """Of n2's clock, as n1 sees it."""
    return cluster.api("n1").get("/v1/nodes/n2", Node).clock_offset_s


def test_a_node_whose_clock_is_a_year_off_is_told_and_nothing_moves_until_it_is_set(
    cluster: Cluster, clocks: dict[str, WallClock]
) -> None:
    certificate = cluster.plan.node("n2").state_path / "tls" / "certificate.pem"
    before = certificate.read_bytes()
    with cluster.guest("web", load=Load(udp_per_s=UNHEARD_UDP_PER_S)) as guest:
        clocks["n2"].set(YEAR_S)
        eventually("n2 tells it", lambda: told(cluster, EventKind.CLOCK_DIFFERS, "n2"))
        eventually("n1 sees it", lambda: abs((offset_s(cluster) or 0.0) - YEAR_S) < 5.0)
        # Connections that are open stay; with a fresh agent nobody trusts the other.
        clocks["n1"].restart_agent(cluster.name, kill=True)
        with pytest.raises(ApiProblem, match="n2"):
            cluster.migrate("web", "n2")
        guest.verify()
        assert certificate.read_bytes() == before, "nobody signs for it"
        clocks["n2"].set(0)
        eventually("they agree", lambda: told(cluster, EventKind.CLOCK_AGREES, "n2"))
        migration = cluster.move("web", "n2")
        assert migration.state is MigrationState.COMPLETED, describe(migration)
        guest.verify()


@pytest.mark.parametrize(("node", "step_s"), [("n1", DAY_S), ("n1", -DAY_S), ("n2", -DAY_S)])
def test_a_clock_that_is_set_in_the_midst_of_a_migration_changes_nothing(
    cluster: Cluster, clocks: dict[str, WallClock], node: str, step_s: int
) -> None:
    with cluster.guest("web", load=LOAD) as guest:
        began = cluster.migrate(
            "web", "n2", mode=MigrationMode.PRECOPY, bandwidth_bytes_per_s=8 * 1024**2
        )
        cluster.in_state(began.id, MigrationState.PRECOPY)
        clocks[node].set(step_s)
        ended = cluster.ended(began.id)
        assert ended.state is MigrationState.COMPLETED, describe(ended)
        assert ended.blackout_ms is not None and 0.0 <= ended.blackout_ms < SANE_MS
        assert ended.total_s is not None and 0.0 <= ended.total_s < 60.0
        assert all(0.0 <= phase.seconds < 60.0 for phase in ended.timeline), describe(ended)
        guest.verify()


def test_post_copy_waits_for_a_certificate_that_has_ended_and_says_so(
    cluster: Cluster, clocks: dict[str, WallClock]
) -> None:
    """n2 takes n1's for one of the past, just when n1's engine has to connect once more."""
    with cluster.guest("late", load=LOAD) as guest:
        began = cluster.migrate(
            "late", "n2", mode=MigrationMode.POSTCOPY, bandwidth_bytes_per_s=4 * 1024**2
        )
        cluster.in_state(began.id, MigrationState.POSTCOPY)
        clocks["n2"].set(40 * DAY_S)
        cluster.kill(cluster.engines("n1")[0])

        def says_why() -> bool:
            error = cluster.migration(began.id).error or ""
            return "the guest waits for pages that don't come" in error and "certificate" in error

        eventually("it says why the guest waits", says_why)
        assert guest.copies() == ["n1", "n2"]
        eventually(
            "so do the events",
            lambda: any("waits for pages" in event.message for event in cluster.events()),
        )
        clocks["n2"].set(0)
        uncapped = MigrationChange(bandwidth_bytes_per_s=None)
        cluster.api().patch(f"/v1/migrations/{began.id}", Migration, uncapped)
        ended = cluster.ended(began.id)
        assert (ended.state, ended.error) == (MigrationState.COMPLETED, None), describe(ended)
        guest.verify()
