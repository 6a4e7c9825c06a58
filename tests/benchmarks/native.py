"""QEMU's own migration: two QEMUs in the lab's namespaces, over the same link, without any agent.

The command line is Ferry's, so the guest is the same machine; only its memory is QEMU's own
(anonymous, as everybody's is), and the monitor a plain one.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hypervisor.qemu.command_line import TAP_FD, QemuLaunch, build_command
from migrator.errors import FerryError
from migrator.model import DomainSpec, FencingToken
from migrator.ports import Launch
from tests.benchmarks.cases import Case
from tests.benchmarks.monitor import Monitor
from tests.benchmarks.results import Run
from tests.benchmarks.site import Site, open_tap, spawn

PORT: Final = 49_200
WIRE_PER_PAYLOAD: Final = 1514 / 1448
"""Bytes on an Ethernet link for each byte of a TCP stream of full segments."""
_UNLIMITED: Final = 1 << 40
_END_S: Final = 10.0
_OURS: Final = ("-object", "-chardev", "-mon", "-machine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How QEMU is told to do it."""

    downtime_limit_ms: int
    multifd_channels: int = 0
    multifd_compression: str = "none"


class _Qemu:
    """One process with its tap and monitor. `close` ends it for certain."""

    def __init__(self, site: Site, node: str, spec: DomainSpec, *, incoming: bool) -> None:
        self._stack = contextlib.ExitStack()
        namespace = site.plan.node(node).namespace
        path = site.folder / f"{node}.qmp"
        path.unlink(missing_ok=True)
        try:
            tap = open_tap(namespace, "bench0")
            try:
                command = plain_command(site, spec, tap=tap, monitor=path, incoming=incoming)
                self.process = spawn(namespace, command, site.folder / f"{node}.log", [tap])
            finally:
                os.close(tap)
            self._stack.callback(self._end)
            self.monitor = Monitor(path)
            self._stack.callback(self.monitor.close)
        except BaseException:
            self._stack.close()
            raise

    def _end(self) -> None:
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_S)

    def close(self) -> None:
        self._stack.close()


def plain_command(
    site: Site, spec: DomainSpec, *, tap: int, monitor: Path, incoming: bool
) -> list[str]:
    """Ferry's command line without what is Ferry's own."""
    launch = Launch(spec=spec, disks=(), tap_fds=(tap,), token=FencingToken(1))
    request = QemuLaunch(
        launch=launch,
        binary=site.binary,
        accelerator="tcg",
        console_log=site.folder / "console.log",
        incoming=incoming,
    )
    given = build_command(request)
    command = [given.pop(0)]
    while given:
        word = given.pop(0)
        value = given[0] if given and word in _OURS else ""
        ours = "monitor" in value or '"id":"ram0"' in value
        if ours:
            given.pop(0)
        elif word != "-S":
            word = word.replace("memory-backend=ram0,", "")
            command.append(word.replace(f"fd={TAP_FD}", f"fd={tap}"))
    return [*command, "-qmp", f"unix:{monitor},server=on,wait=off"]


def _share(sent: int, seconds: float, case: Case) -> float | None:
    if seconds <= 0.0 or not case.link_bytes_per_s:
        return None
    return sent * WIRE_PER_PAYLOAD / seconds / case.link_bytes_per_s


class NativeGuest:
    """A guest on n1 that QEMU itself moves to n2, once: it has to be started anew for each run."""

    def __init__(self, site: Site, case: Case, spec: DomainSpec, method: Method) -> None:
        self._site, self._case, self._spec, self._method = site, case, spec, method
        self._source = _Qemu(site, "n1", spec, incoming=False)
        self._destination: _Qemu | None = None

    def close(self) -> None:
        for qemu in (self._source, self._destination):
            if qemu is not None:
                qemu.close()

    def migrate(self) -> Run:
        """One migration. What goes wrong is in the result."""
        asked_at_s = time.time()
        source = self._source.monitor
        deadline = time.monotonic() + self._case.timeout_s
        try:
            self._destination = _Qemu(self._site, "n2", self._spec, incoming=True)
            destination = self._destination.monitor
            self._configure(source)
            self._configure(destination)
            destination.command("migrate-incoming", {"uri": f"tcp:0:{PORT}"})
            began_at_s = time.time()
            address = self._site.plan.node("n2").mgmt_address
            source.command("migrate", {"uri": f"tcp:{address}:{PORT}"})
            _, stopped_at_s = source.wait_event(frozenset({"STOP"}), deadline)
            source.wait_event(frozenset({"MIGRATION"}), deadline, "completed")
            completed_at_s = time.time()
            _, resumed_at_s = destination.wait_event(frozenset({"RESUME"}), deadline)
            done = source.command("query-migrate")
        except FerryError as error:
            return Run(completed=False, error=str(error), total_s=time.time() - asked_at_s)
        ended_at_s = max(resumed_at_s, completed_at_s)
        sent = int(done["ram"]["transferred"])
        moving_s = stopped_at_s - began_at_s
        return Run(
            completed=True,
            blackout_ms=(resumed_at_s - stopped_at_s) * 1e3,
            total_s=ended_at_s - asked_at_s,
            transfer_s=ended_at_s - began_at_s,
            bytes_sent=sent,
            line_rate_share=_share(sent, moving_s, self._case),
            stopped_at_s=stopped_at_s,
            timeline=(("QEMU's downtime", float(done.get("downtime", 0))),),
        )

    def _configure(self, monitor: Monitor) -> None:
        capabilities = ["events", *(["multifd"] if self._method.multifd_channels else [])]
        states = [{"capability": name, "state": True} for name in capabilities]
        monitor.command("migrate-set-capabilities", {"capabilities": states})
        parameters: dict[str, int | str] = {
            "downtime-limit": self._method.downtime_limit_ms,
            "max-bandwidth": self._case.cap_bytes_per_s or _UNLIMITED,
        }
        if self._method.multifd_channels:
            parameters["multifd-channels"] = self._method.multifd_channels
            parameters["multifd-compression"] = self._method.multifd_compression
        monitor.command("migrate-set-parameters", parameters)
