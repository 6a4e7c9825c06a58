"""A real HAProxy beside a lab's guests, in its client's namespace: `load_balancer`.

    visitors ──► HAProxy, client's guest address : 8080 ──► guest : 80, guest : 80 ...
    agents ────► its runtime API, client's management address : 9999

It has no health checks: what it knows of a guest that moves is what Ferry's hook tells it.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.lab.plan import LabPlan
from deploy.lab.processes import ENTER_SCRIPT, tail
from migrator.errors import FerryError
from node_agent.hooks.model import HaproxyHook, HookPoint, HookSpec

BACKEND: Final = "web"
SERVED_BY: Final = "X-Served-By"
"""The header of each answer that names the guest."""
_PORT: Final = 8080
_RUNTIME_PORT: Final = 9999
_READY_S: Final = 20.0
_END_S: Final = 10.0
_POLL_S: Final = 0.02
_CONFIG: Final = """\
global
    stats socket {runtime} level admin
    stats socket {socket} level admin
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    retries 3
    option redispatch
frontend web
    bind {frontend}
    default_backend {backend}
backend {backend}
    balance roundrobin
    http-response set-header {served_by} %s
{servers}
"""


@dataclass(frozen=True, slots=True)
class LoadBalancer:
    """Addresses as seen in the lab's networks, HOST:PORT."""

    frontend: str
    runtime: str
    servers: tuple[str, ...]
    socket: Path
    """The runtime API also from outside the lab's networks."""

    def hook(self, name: str = "haproxy") -> HookSpec:
        """A server is out, without sessions, while its guest is switched over."""
        return HookSpec(
            name=name,
            points=(HookPoint.BEFORE_SWITCHOVER, HookPoint.AFTER_RESUME, HookPoint.ON_FAILURE),
            action=HaproxyHook(address=self.runtime, backend=BACKEND, sessions_below=1),
            domains=self.servers,
            deadline_s=20.0,
        )


def require_haproxy() -> None:
    """Raises FerryError with one sentence where it is missing."""
    if shutil.which("haproxy", path=_PATH) is None:
        raise FerryError("haproxy is not installed: apt-get install haproxy")


@contextmanager
def load_balancer(plan: LabPlan, guests: Mapping[str, str]) -> Iterator[LoadBalancer]:
    """It serves `guests`, addresses by domain, until the end of the block. Raises FerryError."""
    require_haproxy()
    path = plan.folder / "haproxy.sock"
    found = LoadBalancer(
        frontend=f"{plan.client_guest_address}:{_PORT}",
        runtime=f"{plan.client_mgmt_address}:{_RUNTIME_PORT}",
        servers=tuple(guests),
        socket=path,
    )
    path.unlink(missing_ok=True)
    config, log_path = plan.folder / "haproxy.cfg", plan.folder / "haproxy.log"
    config.write_text(
        _CONFIG.format(
            runtime=found.runtime,
            socket=path,
            frontend=found.frontend,
            backend=BACKEND,
            served_by=SERVED_BY,
            servers="\n".join(f"    server {name} {at}:80" for name, at in guests.items()),
        )
    )
    program = shutil.which("haproxy", path=_PATH) or "haproxy"
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", ENTER_SCRIPT, plan.namespace("client")),
                *(program, "-db", "-f", str(config)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the caller, who ends it.
        )
    try:
        _wait_ready(process, path, log_path)
        yield found
    finally:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        path.unlink(missing_ok=True)


def _wait_ready(process: subprocess.Popen[bytes], ready: Path, log_path: Path) -> None:
    deadline_s = time.monotonic() + _READY_S
    while not _answers(ready):
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise FerryError(f"HAProxy doesn't start; the end of {log_path}:\n{tail(log_path)}")
        time.sleep(_POLL_S)


def _answers(ready: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(ready))
        except OSError:
            return False
        return True


_PATH: Final = "/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin"
"""Debian puts it where a user's PATH doesn't reach."""
