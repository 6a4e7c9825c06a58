"""One cell of the table: a migration is held at a step, something fails, and the rest is judged."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.guest.disk_check import check_disk, describe
from deploy.lab.plan import LabPlan
from migrator.model import DomainState
from node_agent.cli.errors import ApiProblem, Unreachable
from node_agent.resources import Domain, StartRequest
from tests.chaos import judge
from tests.chaos.faults import Absent, Fault, Stage, ended_for_certain
from tests.integration.cluster.world import Cluster, Guest, Load, eventually
from tests.integration.cluster.world import describe as describe_migration

READY_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Step:
    """A moment of a migration: `role` waits before it does `command`."""

    name: str
    role: str
    command: str


STEPS: Final = (
    Step("setup", "destination", "Prepared"),
    Step("switchover", "source", "ContinueSwitchover"),
    Step("commit", "source", "Commit"),
    Step("record", "destination", "SwapRecord"),
    Step("fence", "destination", "Fence"),
    Step("resume", "destination", "ResumeGuest"),
    Step("clean-up", "source", "DestroyGuest"),
)
"""In the order of a migration. From `commit` on nobody runs until the record has passed."""
RUNS_AT_DESTINATION: Final = frozenset({"clean-up"})
DRIVERS: Final = ("directory", "nfs", "iscsi", "nbd")


@dataclass(frozen=True, slots=True)
class Cell:
    driver: str
    step: Step
    fault: Fault

    @property
    def name(self) -> str:
        return f"{self.driver} / {self.step.name} / {self.fault.name}"


@dataclass(frozen=True, slots=True)
class Result:
    cell: Cell
    verdict: judge.Verdict | None
    """None: the cell doesn't exist (`remark` says why)."""
    remark: str = ""

    @property
    def restarted(self) -> bool:
        """Ferry started the guest again, which it does a few times only."""
        return self.verdict is not None and self.verdict.outcome == "restarted"


def pool_of(driver: str) -> str:
    return "default" if driver == "directory" else driver


def image_of(plan: LabPlan, driver: str, volume: str) -> Path:
    """The volume's bytes, where the storage keeps them."""
    folders = {
        "directory": plan.volumes_path / f"{volume}.raw",
        "nfs": plan.folder / "storage/nfs/export" / volume / "disk.raw",
        "iscsi": plan.folder / "storage/iscsi/volumes" / f"{volume}.raw",
    }
    if driver in folders:
        return folders[driver]
    found = sorted((plan.folder / "storage" / driver).rglob(f"{volume}*"))
    return next(path for path in found if path.is_file() and path.stat().st_size >= 1024**2)


def load(driver: str) -> Load:
    return Load(dirty_pages_per_s=500, memory_mib=16, disk=True, udp=False, pool=pool_of(driver))


def run_cell(cluster: Cluster, guest: Guest, cell: Cell) -> Result:
    """The guest runs before and after, unless the verdict says otherwise."""
    storage = None if cell.driver == "directory" else cell.driver
    stage = Stage(cluster, guest, guest.node, guest.other_node(), storage)
    was = judge.before(stage)
    with ExitStack() as stack:
        stack.enter_context(ended_for_certain(cluster))
        point = stack.enter_context(cluster.held(cell.step.role, cell.step.command))
        migration = cluster.migrate(guest.name, stage.destination, via=judge.WITNESS)
        point.wait_reached()
        try:
            ongoing = cell.fault.begin(stage)
        except Absent as absent:
            point.release()
            cluster.ended(migration.id, judge.WITNESS)
            return Result(cell, None, str(absent))
        point.release()
        ongoing.wait()
        over_s = time.monotonic()
        runs_on = "destination" if cell.step.name in RUNS_AT_DESTINATION else "source"
        verdict = judge.judge(stage, migration.id, was, over_s, lost=cell.fault.may_lose == runs_on)
    return Result(cell, verdict, _remark(cluster, migration.id))


def _remark(cluster: Cluster, migration: str) -> str:
    try:
        found = cluster.migration(migration, judge.WITNESS)
    except (ApiProblem, Unreachable) as error:
        return str(error)
    return describe_migration(found)


def revive(cluster: Cluster, guest: Guest, node: str) -> None:
    """Have the guest run again after a cell that it didn't outlive. Not a part of the judgement."""
    cluster.restart_missing_agents()
    api = cluster.api(judge.WITNESS)

    def settled() -> bool:
        domain = cluster.domain(guest.name, judge.WITNESS)
        return domain.migration is None and domain.state in (
            DomainState.STOPPED,
            DomainState.RUNNING,
        )

    eventually(f"{guest.name} is stopped or runs", settled, READY_S)
    if cluster.domain(guest.name, judge.WITNESS).state is DomainState.STOPPED:
        api.post(f"/v1/domains/{guest.name}/start", Domain, StartRequest(node=node))
    eventually(f"{guest.name} answers", lambda: judge.answers(guest), READY_S)


def check_at_storage(cluster: Cluster, guest: Guest, driver: str, acknowledged: int) -> str:
    """Stop the guest and read its disk where the storage keeps it. "" or what is wrong."""
    guest.stop()
    report = check_disk(image_of(cluster.plan, driver, guest.name))
    if not report.intact:
        return describe(report)
    if report.last_sequence < acknowledged:
        return f"records {report.last_sequence + 1} to {acknowledged} were acknowledged, and lost"
    return ""
