"""A lab whose nodes have no common layer 2: a router, and what it is told.

    fy-LAB-n1                          fy-LAB-router                      fy-LAB-client
    guests ─ taps   uplink0 ─────────── g-n1
                    10.76.L.2/31        10.76.L.3       g-client ───────── guest0
    fy-LAB-n2                                           10.75.L.254        10.75.L.250/24
    guests ─ taps   uplink0 ─────────── g-n2
                    10.76.L.4/31        10.76.L.5

Guests have addresses of 10.78.L.0/24 and fd78:L::/64, and each is a host route somewhere: the nodes
tell the router's `python -m netfabric.routes.netlink` where. With `--fabric bgp` or `evpn` FRR does
the telling (`deploy.lab.frr`). With `vxlan` nobody tells the router anything: it carries an overlay
(`deploy.lab.overlay`).
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from deploy.lab import frr, processes
from deploy.lab.kinds import FabricKind
from deploy.lab.namespaces import write_setting
from deploy.lab.plan import LabPlan
from deploy.lab.processes import Process
from migrator.errors import FerryError
from netfabric.routes.netlink.speaker import PORT

READY_TIMEOUT_S: Final = 30.0
_POLL_S: Final = 0.02
_KEY_BYTES: Final = 32


def ensure_router(plan: LabPlan, report: Callable[[str], None]) -> None:
    """Let the router forward, and run its end of the talk. FerryError with its log's end."""
    if not plan.has_router:
        return
    for setting in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        write_setting(plan.router, setting, "1")
    frr.ensure_daemons(plan, report)
    if plan.fabric is not FabricKind.ROUTED:
        return
    key = plan.route_key_path
    if not key.exists():
        key.touch(mode=0o600)
        key.write_text(secrets.token_hex(_KEY_BYTES))
    if _find(plan) is None:
        process = processes.spawn_in(plan.router, _command(plan), plan.folder / "router.log")
        _wait_listening(process, plan.folder / "router.log")
        report("the router listens")


def _command(plan: LabPlan) -> list[str]:
    return [
        *(sys.executable, "-m", "netfabric.routes.netlink"),
        *("--key-file", str(plan.route_key_path)),
        *("--network", plan.guest_network, "--network", plan.guest_network6),
    ]


def _find(plan: LabPlan) -> Process | None:
    running = processes.processes_in([plan.router])[plan.router]
    return processes.find_by_argument(running, str(plan.route_key_path))


def _wait_listening(process: Process, log: Path) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not _listens(process.pid):
        if not processes.alive(process) or time.monotonic() > deadline_s:
            raise FerryError(
                f"the lab's router doesn't listen on UDP port {PORT}; the end of {log}:\n"
                f"{processes.tail(log)}"
            )
        time.sleep(_POLL_S)


def _listens(pid: int) -> bool:
    try:
        lines = Path(f"/proc/{pid}/net/udp").read_text().splitlines()[1:]
    except OSError:
        return False
    return any(int(line.split()[1].rpartition(":")[2], 16) == PORT for line in lines)
