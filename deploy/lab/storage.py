"""The lab's storage servers, in its storage namespace, and the pools that the agents have on them.

`ferry lab up --storage nfs,nbd` starts them; `ferry lab storage nfs kill` is how one dies. A kind
of server is a module with `prepare` and a line in `_KINDS`; the pool has the kind's name.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from deploy.lab import nfs_server, processes, tgt_server
from deploy.lab.plan import LabPlan
from deploy.lab.processes import Process
from migrator.errors import FerryError, InvalidRequest, RefusedError
from node_agent.config import format_endpoint
from storage.nbd.protocol import PORT as NBD_PORT
from storage.settings import NbdSettings, NfsSettings, PoolSettings

READY_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.02
_PATH: Final = "/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin:/usr/local/bin"


class ServerProcess(msgspec.Struct, frozen=True, kw_only=True):
    """One process of a storage server."""

    name: str
    command: tuple[str, ...]
    mark: str
    """An argument that only this process has."""
    port: int
    """It listens there when it is ready."""
    own_log: Path | None = None
    """Removed before each start, for `serves`."""
    serves: Callable[[], bool] = lambda: True
    """Whether one that listens is ready."""


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of server. `prepare` makes its folders and files; both get folder and address."""

    programs: Mapping[str, str]
    """What must be installed, and Debian's package of it."""
    prepare: Callable[[Path, str], Sequence[ServerProcess]]
    pool: Callable[[Path, str], PoolSettings]
    after_start: Callable[[Path, str], None] = lambda _folder, _address: None
    """What a server that was just started has to be told."""


def _prepare_nfs(folder: Path, _address: str) -> list[ServerProcess]:
    commands = nfs_server.prepare(folder)
    rpcbind, nfs = tuple(commands["rpcbind"]), tuple(commands["nfs"])
    return [
        ServerProcess(name="rpcbind", command=rpcbind, mark=rpcbind[-2], port=111),
        ServerProcess(
            name="nfs",
            command=nfs,
            mark=f"{folder}/ganesha.conf",
            port=nfs_server.PORT,
            own_log=nfs_server.log_path(folder),
            serves=lambda: nfs_server.serves(folder),
        ),
    ]


def _prepare_iscsi(folder: Path, address: str) -> list[ServerProcess]:
    command = tuple(tgt_server.prepare(folder, address))
    return [
        ServerProcess(name="tgtd", command=command, mark=command[-1], port=tgt_server.PORT),
    ]


def _prepare_nbd(folder: Path, address: str) -> list[ServerProcess]:
    volumes = folder / "volumes"
    volumes.mkdir(parents=True, exist_ok=True)
    command = (sys.executable, "-m", "storage.nbd", "--folder", str(volumes), "--address", address)
    return [ServerProcess(name="nbd", command=command, mark=str(volumes), port=NBD_PORT)]


_KINDS: Final[Mapping[str, Kind]] = {
    "nfs": Kind(
        programs=nfs_server.PROGRAMS,
        prepare=_prepare_nfs,
        pool=lambda folder, address: NfsSettings(
            name="nfs", server=address, export=str(nfs_server.export_path(folder))
        ),
    ),
    "iscsi": Kind(
        programs=tgt_server.PROGRAMS,
        prepare=_prepare_iscsi,
        pool=tgt_server.pool,
        after_start=tgt_server.make_targets,
    ),
    "nbd": Kind(
        programs={"qemu-nbd": "qemu-utils"},
        prepare=_prepare_nbd,
        pool=lambda _, address: NbdSettings(
            name="nbd", provisioner=format_endpoint(address, NBD_PORT)
        ),
    ),
}


def check_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """In a fixed order, each once. InvalidRequest names those that there are."""
    for kind in kinds:
        if kind not in _KINDS:
            known = ", ".join(_KINDS)
            raise InvalidRequest(f"a lab has no storage {kind!r}; it can have {known}")
    return tuple(kind for kind in _KINDS if kind in set(kinds))


def check_installed(kinds: Iterable[str]) -> None:
    """RefusedError with every program that is missing."""
    missing = [
        f"{program} is not installed: apt-get install {package}"
        for kind in kinds
        for program, package in _KINDS[kind].programs.items()
        if shutil.which(program, path=_PATH) is None
    ]
    if missing:
        raise RefusedError("this machine can't hold the lab's storage: " + missing[0], missing)


def pools(plan: LabPlan) -> tuple[PoolSettings, ...]:
    """One pool a kind."""
    return tuple(
        _KINDS[kind].pool(_folder(plan, kind), plan.storage_address) for kind in plan.storage
    )


def ensure_servers(plan: LabPlan, report: Callable[[str], None]) -> None:
    """Start what doesn't run; returns when all are ready. FerryError with a log's end."""
    for kind in plan.storage:
        if start(plan, kind):
            report(f"storage server {kind} started")


def start(plan: LabPlan, kind: str) -> bool:
    """Start the server of a kind with what it has on its disk. False: it ran."""
    folder = _folder(plan, kind)
    started = False
    for server in _KINDS[kind].prepare(folder, plan.storage_address):
        log = folder / f"{server.name}.log"
        process = _find(plan, server)
        if process is None:
            if server.own_log is not None:
                server.own_log.unlink(missing_ok=True)
            process = processes.spawn_in(_namespace(plan), server.command, log)
            started = True
        _wait_ready(server, process, log)
    if started:
        _KINDS[kind].after_start(folder, plan.storage_address)
    return started


def kill(plan: LabPlan, kind: str) -> bool:
    """SIGKILL every process of the server: those that name its folder, and tgtd, which has that in
    its environment. False: none ran.
    """
    folder = _folder(plan, kind)
    known = _KINDS.get(kind)
    servers = [] if known is None else known.prepare(folder, plan.storage_address)
    marks = {server.mark for server in servers}
    found = [
        process
        for process in processes.processes_in([_namespace(plan)])[_namespace(plan)]
        if any(
            f"{folder}/" in argument or argument in marks
            for argument in processes.command_of(process.pid)
        )
    ]
    for process in found:
        processes.send_signal(process, signal.SIGKILL)
    processes.wait_ended(found, READY_TIMEOUT_S)
    return bool(found)


def _folder(plan: LabPlan, kind: str) -> Path:
    return plan.folder / "storage" / kind


def _namespace(plan: LabPlan) -> str:
    return plan.namespace("storage")


def _find(plan: LabPlan, server: ServerProcess) -> Process | None:
    running = processes.processes_in([_namespace(plan)])[_namespace(plan)]
    return processes.find_by_argument(running, server.mark)


def _wait_ready(server: ServerProcess, process: Process, log: Path) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not (_listens(process.pid, server.port) and server.serves()):
        if not processes.alive(process) or time.monotonic() > deadline_s:
            raise FerryError(
                f"the lab's {server.name} doesn't serve on port {server.port}; the end of "
                f"{log}:\n{processes.tail(log)}"
            )
        time.sleep(_POLL_S)


def _listens(pid: int, port: int) -> bool:
    """Whether anybody listens on a TCP port in the network of this process."""
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, *_ = line.split()
            if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                return True
    return False
