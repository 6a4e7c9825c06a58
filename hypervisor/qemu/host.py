"""What this host can run: asked of QEMU and of the kernel, not guessed from versions.

QEMU is started once for it, without a machine, and answers over a socket pair. The answer is kept
until the binary changes: an upgrade of the package is noticed without a restart of the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from hypervisor.machine_types import FAMILIES, family
from hypervisor.qemu.config import QemuConfig
from hypervisor.qemu.cpu_features import CpuFeatures, features_of_host
from hypervisor.qemu.kernel import cpu_flags, kvm_obstacle, paged_engine_obstacle
from hypervisor.qemu.offload import offload
from hypervisor.qemu.process import Spawn, spawn
from hypervisor.qemu.qmp import Monitor, QmpEvent
from migrator.errors import HypervisorError
from migrator.model import HypervisorCapabilities

PROBE_TIMEOUT_S = 20.0
"""QEMU answers in well under a second; a host that boots many guests may be slow."""

_PROBE_FD = 100
_SOUND_UNDER_TCG = 10


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The capabilities, and what only this driver needs to know."""

    binary: str
    """Absolute path."""
    accelerator: str
    capabilities: HypervisorCapabilities
    cpus: CpuFeatures = CpuFeatures()


class _Answers(msgspec.Struct, frozen=True, kw_only=True):
    """Of a QEMU: machine types are versioned ones, and their aliases."""

    version: str
    machines: tuple[str, ...]
    models: tuple[str, ...]
    cpus: CpuFeatures


class HostProbe:
    """Finds the facts out, once a version of the binary. Safe to call concurrently."""

    def __init__(self, config: QemuConfig) -> None:
        self._config = config
        self._lock = asyncio.Lock()
        self._stamp: tuple[str, int, int] | None = None
        self._facts: HostFacts | None = None

    async def facts(self) -> HostFacts:
        """HypervisorError if there is no working QEMU here, or KVM is demanded but unusable."""
        async with self._lock:
            stamp = await asyncio.to_thread(_binary_stamp, self._config.binary)
            if self._facts is None or stamp != self._stamp:
                self._facts = await self._find(stamp[0])
                self._stamp = stamp
            return self._facts

    async def _find(self, binary: str) -> HostFacts:
        accelerator = await asyncio.to_thread(_choose_accelerator, self._config)
        told = await _ask_qemu(binary, accelerator)
        obstacle = await asyncio.to_thread(paged_engine_obstacle)
        flags = await asyncio.to_thread(cpu_flags) if accelerator == "kvm" else frozenset()
        return HostFacts(
            binary=binary,
            accelerator=accelerator,
            capabilities=HypervisorCapabilities(
                driver="qemu",
                version=told.version,
                accelerator=accelerator,
                machine_types=told.machines,
                cpu_models=told.models,
                cpu_features=tuple(sorted(flags)),
                paged_engine=obstacle is None,
                paged_engine_reason=obstacle,
                native_hazard=native_hazard(told.version, accelerator),
            ),
            cpus=told.cpus,
        )


def native_hazard(version: str, accelerator: str) -> str:
    """Found by guests that verify their memory: 7.2 by TCG loses pages, 10.0 and KVM lose none."""
    major = version.partition(".")[0]
    if accelerator != "tcg" or (major.isdecimal() and int(major) >= _SOUND_UNDER_TCG):
        return ""
    return (
        f"QEMU {version}'s own migration loses memory that a guest writes meanwhile, under "
        "emulation (TCG): the guest may crash after it"
    )


def _binary_stamp(binary: str) -> tuple[str, int, int]:
    found = shutil.which(binary)
    if found is None:
        raise HypervisorError(f"QEMU is not installed: no executable {binary!r}")
    path = Path(found).absolute()
    status = path.stat()
    return str(path), status.st_mtime_ns, status.st_size


def _choose_accelerator(config: QemuConfig) -> str:
    if config.accelerator == "tcg":
        return "tcg"
    obstacle = kvm_obstacle()
    if obstacle is None:
        return "kvm"
    if config.accelerator == "kvm":
        raise HypervisorError(f"accelerator kvm is configured, but {obstacle}")
    return "tcg"


async def _ask_qemu(binary: str, accelerator: str) -> _Answers:
    """With `accelerator` if it can be had: what a CPU model lacks depends on it."""
    arguments = [
        binary,
        *("-no-user-config", "-nodefaults", "-display", "none", "-S"),
        *("-machine", "none", *(("-accel", "kvm") if accelerator == "kvm" else ())),
        *("-accel", "tcg"),
        *(
            "-chardev",
            f"socket,id=monitor0,fd={_PROBE_FD}",
            "-mon",
            "chardev=monitor0,mode=control",
        ),
    ]
    ours, theirs = socket.socketpair()
    with ours:
        ours.setblocking(False)
        with theirs:
            request = Spawn(
                arguments=arguments,
                environment=dict(os.environ),
                descriptors={_PROBE_FD: theirs.fileno()},
                log=Path(os.devnull),
            )
            pid = await offload(lambda: spawn(request), undo=_end_later)
        try:
            return await _converse(binary, accelerator, ours)
        finally:
            await offload(lambda: _end(pid))


def _end(pid: int) -> None:
    """End the probe. It is our unreaped child: the pid can't have been reused."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _end_later(pid: int) -> None:
    asyncio.get_running_loop().run_in_executor(None, lambda: _end(pid))


async def _converse(binary: str, accelerator: str, connection: socket.socket) -> _Answers:
    monitor = Monitor(f"{binary} probe", _ignore_event, lambda: None)

    async def ask(command: str, arguments: Mapping[str, object] | None = None) -> object:
        return await monitor.execute(command, arguments, timeout_s=PROBE_TIMEOUT_S)

    try:
        await monitor.connect(connection, timeout_s=PROBE_TIMEOUT_S)
        machines, models = await ask("query-machines"), await ask("query-cpu-definitions")
        cpus = CpuFeatures()
        with contextlib.suppress(HypervisorError):  # Else nothing is known of them.
            used = await ask("query-kvm")
            if (isinstance(used, Mapping) and used.get("enabled")) == (accelerator == "kvm"):
                whole = {"type": "full", "model": {"name": "max"}}
                cpus = features_of_host(models, await ask("query-cpu-model-expansion", whole))
        return _Answers(
            version=monitor.version,
            machines=machine_names(machines),
            models=_names(models),
            cpus=cpus,
        )
    finally:
        await monitor.close()


def _ignore_event(_event: QmpEvent) -> None:
    pass


def machine_names(answer: object) -> tuple[str, ...]:
    """The q35 and pc types of a `query-machines` answer, the aliases among them, sorted."""
    found = {name for name in _names(answer) if family(name) is not None}
    return tuple(
        sorted(
            found | {alias for alias in FAMILIES if any(family(name) == alias for name in found)}
        )
    )


def _names(answer: object) -> tuple[str, ...]:
    if not isinstance(answer, Iterable):
        raise HypervisorError("QEMU's answer to a query is not a list")
    return tuple(sorted(str(entry["name"]) for entry in answer if isinstance(entry, Mapping)))
