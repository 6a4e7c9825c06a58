"""Guests on volumes of real storage servers: they move, and they outlive the server."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from deploy import lab
from deploy.guest.build import build_guest, default_cache_directory
from deploy.guest.disk_check import check_disk
from deploy.lab import processes, storage
from deploy.lab.plan import LabPlan
from migrator import hold_points
from migrator.model import DomainState, MigrationState, OnTimeout, VolumeInfo
from node_agent.cli.errors import ApiProblem, Unreachable
from node_agent.resources import Domain, Pool, VolumeCreate, VolumeList
from storage.nbd.protocol import PORT as NBD_PORT
from tests.chaos import cells, faults, judge
from tests.chaos.faults import FAULTS
from tests.integration.cluster.client import in_namespace
from tests.integration.cluster.world import MIB, Cluster, Guest, Load, describe, eventually

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

SECOND = "hasty"
SECOND_PORT = 12_000
IMAGE_MIB = 256
"""It takes some tenths of a second to copy."""
CUTS_MAX = 10
"""A fast machine may have copied it before its agent is killed; hardly that often."""
HEAL_S = 60.0
"""A bound against hanging: clients of a server that came back try at growing gaps."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes and a witness, and the storage servers."""
    folder: Path = tmp_path_factory.mktemp("holds")
    name = f"s{os.getpid()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(hold_points.VARIABLE, str(folder))
        try:
            lab.up(name, nodes=3, node_memory_bytes=1024**3, storage_kinds=["nfs", "nbd"])
            yield Cluster(lab.load(name).plan, build_guest(default_cache_directory()), folder)
        finally:
            lab.down(name)


_STORAGE_PHASES: Final = ("deactivate", "fence", "activate")
_ROUNDING_S: Final = 1e-5
"""Of a difference of two wall-clock times as doubles, and of two processes' clocks in step."""


def disk_of(plan: LabPlan, kind: str, volume: str) -> Path:
    """Where the server keeps a volume's bytes."""
    if kind == "default":
        return plan.volumes_path / f"{volume}.raw"
    folder = plan.folder / "storage" / kind
    if kind == "nfs":
        return folder / "export" / volume / "disk.raw"
    return folder / "volumes" / f"{volume}.raw"


def start_second_server(plan: LabPlan) -> None:
    """Another NBD server beside the lab's, which `storage.kill(plan, SECOND)` ends."""
    folder = plan.folder / "storage" / SECOND
    (folder / "volumes").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "storage.nbd", "--folder", f"{folder}/volumes"]
    command += ["--address", plan.storage_address, "--port", str(SECOND_PORT)]
    command += ["--first-export-port", str(SECOND_PORT + 1)]
    process = processes.spawn_in(plan.namespace("storage"), command, folder / "nbd.log")

    def serves() -> bool:
        assert processes.alive(process), processes.tail(folder / "nbd.log")
        address = (plan.storage_address, SECOND_PORT)
        try:
            in_namespace(
                plan.namespace("storage"), lambda: socket.create_connection(address, 1.0)
            ).close()
        except OSError:
            return False
        return True

    eventually("the second server serves", serves)


def wait_records(guest: Guest, more: int = 20) -> None:
    """Until the guest has written so many more records to its disk."""
    before = guest.status().disk_records_written
    eventually(
        "the guest writes to its disk",
        lambda: guest.status().disk_records_written >= before + more,
        HEAL_S,
    )


@pytest.mark.parametrize("kind", ["nfs", "nbd"])
def test_a_guest_moves_and_outlives_its_server(
    cluster: Cluster, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    load = Load(dirty_pages_per_s=500, disk=True, udp=False, pool=kind)
    with cluster.guest(f"on-{kind}", load=load) as guest:
        for node in ("n2", "n1"):
            move = cluster.move(guest.name, node)
            parts = {phase.name: phase for phase in move.timeline}
            assert parts["fence"].detail.startswith(f"{kind} {kind}/{guest.name} ")
            part, whole = parts["deactivate"], parts["device state"]
            assert whole.started_at_s <= part.started_at_s
            assert 0.0 < part.seconds <= whole.seconds + _ROUNDING_S
            with capsys.disabled():
                took = [f"{name} {1e3 * parts[name].seconds:.1f} ms" for name in _STORAGE_PHASES]
                print(f"\n{kind}: blackout {move.blackout_ms:.1f} ms, {', '.join(took)}", end="")
            wait_records(guest)
        assert storage.kill(cluster.plan, kind)
        assert storage.start(cluster.plan, kind)
        wait_records(guest)
        move = cluster.move(guest.name, "n2")
        assert move.blackout_ms is not None, describe(move)
        status = guest.verify()
        assert status.disk_errors == 0
        guest.stop()
        report = check_disk(disk_of(cluster.plan, kind, guest.name))
        assert report.intact, report.problems
        assert report.last_sequence >= status.disk_last_sequence


def test_a_disk_that_fails_pauses_the_guest_which_goes_on_by_itself(cluster: Cluster) -> None:
    """With a pool that was added to the cluster while it runs, and hardly waits for its server."""
    plan = cluster.plan
    start_second_server(plan)
    settings = {"name": "hasty", "driver": "nbd", "reconnect_delay_s": 1}
    first = {**settings, "provisioner": f"{plan.storage_address}:{NBD_PORT}"}
    with pytest.raises(ApiProblem, match="the place of pool nbd under a second name"):
        cluster.api("n1").post("/v1/pools", Pool, first)
    own = {**settings, "provisioner": f"{plan.storage_address}:{SECOND_PORT}"}
    cluster.api("n1").post("/v1/pools", Pool, own)
    eventually("n2 has the pool, too", lambda: _has_pool(cluster, "n2", "hasty"))
    load = Load(dirty_pages_per_s=0, disk=True, udp=False, pool="hasty")
    with cluster.guest("patient", load=load) as guest:
        assert storage.kill(plan, SECOND)
        failed = eventually(
            "the guest is paused by its disk",
            lambda: _domain_in(cluster, guest.name, DomainState.IO_ERROR),
            HEAL_S,
        )
        assert failed is not None and failed.reason is not None
        assert "disk 0 (hasty/patient) failed: " in failed.reason
        with pytest.raises(ApiProblem, match="patient"):
            cluster.api("n2").delete("/v1/pools/hasty")
        start_second_server(plan)
        eventually(
            "the guest runs again",
            lambda: _domain_in(cluster, guest.name, DomainState.RUNNING),
            HEAL_S,
        )
        wait_records(guest)
        assert guest.verify().disk_errors == 0
    cluster.api("n2").delete("/v1/pools/hasty")
    eventually("n1 has no such pool any more", lambda: not _has_pool(cluster, "n1", "hasty"))
    assert storage.kill(plan, SECOND)


@pytest.mark.parametrize(
    ("role", "step", "reason"),
    [
        ("source", "AskLeave", "node n2: the storage of volume nfs/cut-off-source "),
        ("destination", "Fence", "n2 couldn't run the guest, and gave it back: "),
    ],
)
def test_a_destination_that_stays_cut_off_from_its_storage_doesnt_keep_the_guest(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, role: str, step: str, reason: str
) -> None:
    """It isn't paused for it; and if it was already, the source has it back soon."""
    monkeypatch.setattr(faults, "LINK_DOWN_S", 120.0)  # Until it is ended.
    (fault,) = [each for each in FAULTS if each.name == "cut destination storage"]
    with (
        # A name of its own: a console is kept, and an earlier guest's would say that it is ready.
        cluster.guest(f"cut-off-{role}", load=cells.load("nfs"), removal_s=HEAL_S) as guest,
        faults.ended_for_certain(cluster),
    ):
        with cluster.held(role, step) as point:
            forced = OnTimeout.FORCE  # It converges on a busy machine, too.
            migration = cluster.migrate(guest.name, "n2", via="n3", on_timeout=forced)
            point.wait_reached()
            ongoing = fault.begin(faults.Stage(cluster, guest, "n1", "n2", "nfs"))
            point.release()
            if step == "Fence":
                eventually(
                    "the migration says what it waits for",
                    lambda: "n2 can't run it yet" in (cluster.migration(migration.id).error or ""),
                )
            ended = cluster.ended(migration.id)
        assert (ended.state, guest.node) == (MigrationState.FAILED, "n1"), describe(ended)
        assert ended.error is not None and ended.error.startswith(reason), ended.error
        wait_records(guest)
        eventually("one copy is left", lambda: guest.copies() == ["n1"])
        ongoing.end()
        assert guest.verify().disk_errors == 0
        cluster.move(guest.name, "n2")


def test_a_cell_of_make_chaos(cluster: Cluster) -> None:
    """The destination's agent dies between the record and the fence; `make chaos` has the rest."""
    (step,) = [each for each in cells.STEPS if each.name == "fence"]
    (fault,) = [each for each in FAULTS if each.name == "kill destination agent"]
    with cluster.guest("chaos-nfs", load=cells.load("nfs")) as guest:
        result = cells.run_cell(cluster, guest, cells.Cell("nfs", step, fault))
        verdict = result.verdict
        assert verdict is not None and not verdict.violations, result
        assert verdict.outcome == "destination", result
        assert verdict.heal_s < judge.PROMISE_S, result
        acknowledged = guest.status().disk_last_sequence
        assert not cells.check_at_storage(cluster, guest, "nfs", acknowledged)


@pytest.fixture
def image() -> Iterator[Path]:
    """In memory: on a file system of its own nobody clones its blocks, which takes no time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder, "image")
        path.write_bytes(os.urandom(MIB) * IMAGE_MIB)
        yield path


@pytest.mark.parametrize("pool", ["default", "nfs", "nbd"])
def test_nothing_is_left_of_a_volume_whose_agent_was_killed_while_it_made_it(
    cluster: Cluster, pool: str, image: Path
) -> None:
    """That anybody sees: its name is free at once, on each node."""
    volumes = f"/v1/pools/{pool}/volumes"
    body = VolumeCreate(name="cut", capacity_bytes=IMAGE_MIB * MIB, image=str(image))
    place = disk_of(cluster.plan, pool, "cut").parent
    folder = place.parent if pool == "nfs" else place

    def whole() -> bool:
        with disk_of(cluster.plan, pool, "cut").open("rb") as disk, image.open("rb") as original:
            return disk.read() == original.read()

    def cut() -> bool:
        """Whether its agent was killed in the midst; else the volume is whole, and deleted."""
        agent = cluster.agent("n1")
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(cluster.api("n1").post, volumes, VolumeInfo, body)
            eventually("it is begun", lambda: list(folder.glob(".cut.*")) or asked.done())
            cluster.kill(agent)
            assert isinstance(asked.exception(), (Unreachable, ApiProblem, type(None)))
        made = "cut" in names(cluster, volumes)
        assert made or asked.exception() is not None
        cluster.restart_missing_agents()
        if made:
            assert whole()
            cluster.api("n2").delete(f"{volumes}/cut")
        return not made

    assert any(cut() for _ in range(CUTS_MAX)), "it was made before, each time"
    made = cluster.api("n1").post(volumes, VolumeInfo, body)
    assert made.capacity_bytes == image.stat().st_size
    assert names(cluster, volumes).count("cut") == 1
    assert whole()
    cluster.api("n2").delete(f"{volumes}/cut")
    assert "cut" not in names(cluster, volumes)


def names(cluster: Cluster, volumes: str) -> list[str]:
    """As n2 sees them."""
    return [each.name for each in cluster.api("n2").get(volumes, VolumeList).volumes]


def _domain_in(cluster: Cluster, name: str, state: DomainState) -> Domain | None:
    domain = cluster.domain(name)
    return domain if domain.state is state else None


def _has_pool(cluster: Cluster, node: str, name: str) -> bool:
    try:
        cluster.api(node).get(f"/v1/pools/{name}", Pool)
    except ApiProblem:
        return False
    return True
