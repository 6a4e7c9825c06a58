"""The lab's etcd: three real members, each in a namespace of its own, as on three small hosts.

A member is found by its data folder in its argument vector and started where it isn't there, with
what it has on its disk. `ferry lab etcd etcd2 kill` is how one dies.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Final

from deploy.lab import processes
from deploy.lab.plan import ETCD_CLIENT_PORT, ETCD_PEER_PORT, EtcdMemberPlan, LabPlan
from deploy.lab.processes import Process
from migrator.errors import FerryError, RefusedError

READY_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.02
_SERVES: Final = "serving client traffic"
"""What etcd 3.4 and 3.5 log when clients may come."""


def check_installed() -> None:
    """RefusedError if there is no etcd on this machine."""
    if shutil.which("etcd") is None:
        message = "etcd is not installed: apt-get install etcd-server"
        raise RefusedError(message, [message])


def ensure_members(plan: LabPlan, report: Callable[[str], None]) -> None:
    """Start the members that don't run; returns when they serve. FerryError with a log's end."""
    started = []
    for member in plan.etcd_members:
        if find_member(member) is None:
            started.append((member, start_member(plan, member)))
            report(f"etcd member {member.name} started")
    for member, process in started:
        wait_serving(member, process)


def find_member(member: EtcdMemberPlan) -> Process | None:
    """Its process; None if it doesn't run."""
    running = processes.processes_in([member.namespace])[member.namespace]
    return processes.find_by_argument(running, str(member.folder / "data"))


def start_member(plan: LabPlan, member: EtcdMemberPlan) -> Process:
    """Start it, detached from the caller."""
    member.folder.mkdir(parents=True, exist_ok=True)
    member.log_path.unlink(missing_ok=True)
    clients = f"http://{member.address}:{ETCD_CLIENT_PORT}"
    peers = f"http://{member.address}:{ETCD_PEER_PORT}"
    everybody = ",".join(
        f"{each.name}=http://{each.address}:{ETCD_PEER_PORT}" for each in plan.etcd_members
    )
    command = [
        *("etcd", "--name", member.name, "--data-dir", str(member.folder / "data")),
        *("--listen-client-urls", clients, "--advertise-client-urls", clients),
        *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers),
        *("--initial-cluster", everybody, "--initial-cluster-token", plan.name),
        *("--logger", "zap"),
    ]
    return processes.spawn_in(member.namespace, command, member.log_path)


def majority_runs(plan: LabPlan) -> bool:
    """Whether so many of the members run that they can serve."""
    running = [member for member in plan.etcd_members if find_member(member) is not None]
    return 2 * len(running) > len(plan.etcd_members)


def wait_serving(member: EtcdMemberPlan, process: Process) -> None:
    """Until it serves clients: a majority of the members runs. FerryError with its log's end."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while _SERVES not in member.log_path.read_text(errors="replace"):
        if not processes.alive(process) or time.monotonic() > deadline_s:
            raise FerryError(
                f"etcd member {member.name} doesn't serve; the end of {member.log_path}:\n"
                f"{processes.tail(member.log_path)}"
            )
        time.sleep(_POLL_S)
