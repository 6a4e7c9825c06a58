"""What the domains of a node use of its CPUs and its network, measured over time: `drain.usage`.

Every `SAMPLE_S` the CPU time of each hypervisor process and the byte counters of its taps are read
from /proc and /sys; an exponential mean with a time constant of `MEMORY_S` forgets peaks. So a
minute's burst moves nobody, and an hour's load does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from migrator.errors import FerryError
from migrator.model import DomainStatus, NodeName
from migrator.ports import HypervisorDriver, Struct
from node_agent.background import Background
from node_agent.peers.hub import PeerHub
from node_agent.planner.balance import Usage

log = logging.getLogger(__name__)

USAGE: Final = "drain.usage"
SAMPLE_S: Final = 5.0
MEMORY_S: Final = 300.0
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


class UsageParams(Struct, frozen=True, kw_only=True):
    """No params."""


class NodeUsage(Struct, frozen=True, kw_only=True):
    domains: Mapping[str, Usage]


class Reading(Struct, frozen=True, kw_only=True):
    """One domain's counters at a moment."""

    pid: int
    at_s: float
    cpu_s: float
    network_bytes: int


class UsageMeter:
    """See the module. `open` starts the one task, `close` ends it."""

    def __init__(self, hypervisor: HypervisorDriver) -> None:
        self._hypervisor = hypervisor
        self._last: dict[str, Reading] = {}
        self._means: dict[str, Usage] = {}
        self._task = Background("usage-meter")

    def register(self, hub: PeerHub) -> None:
        hub.handle(USAGE, UsageParams, self._answer)

    def open(self) -> None:
        self._task.start(self._run())

    async def close(self) -> None:
        await self._task.close()

    async def _answer(self, _: NodeName, __: UsageParams) -> NodeUsage:
        return NodeUsage(domains=dict(self._means))

    async def _run(self) -> None:
        while True:
            try:
                await self.sample()
            except FerryError as error:
                log.warning("what the domains use can't be measured now: %s", error)
            await asyncio.sleep(SAMPLE_S)

    async def sample(self) -> None:
        """Read all counters once."""
        statuses = await self._hypervisor.list_domains()
        readings = await asyncio.to_thread(read_all, statuses)
        for gone in self._means.keys() - readings.keys():
            del self._means[gone]
        for name, reading in readings.items():
            before = self._last.get(name)
            if before is not None and before.pid == reading.pid and reading.at_s > before.at_s:
                self._means[name] = merged(self._means.get(name), before, reading)
        self._last = readings


def merged(mean: Usage | None, before: Reading, now: Reading) -> Usage:
    """The mean with one more interval: the older the less it weighs."""
    seconds = now.at_s - before.at_s
    cpus = max(0.0, now.cpu_s - before.cpu_s) / seconds
    network = max(0, now.network_bytes - before.network_bytes) / seconds
    if mean is None:
        return Usage(cpus=cpus, network_bytes_per_s=network, seconds=seconds)
    # Until there is a full memory of it, all that was seen weighs alike.
    weight = max(1.0 - math.exp(-seconds / MEMORY_S), seconds / (mean.seconds + seconds))
    return Usage(
        cpus=mean.cpus + weight * (cpus - mean.cpus),
        network_bytes_per_s=mean.network_bytes_per_s
        + weight * (network - mean.network_bytes_per_s),
        seconds=mean.seconds + seconds,
    )


def read_all(
    statuses: Sequence[DomainStatus], proc: Path = Path("/proc"), net: Path = Path("/sys/class/net")
) -> dict[str, Reading]:
    """The counters of each domain that has a process. Blocks for some microseconds each."""
    found: dict[str, Reading] = {}
    for status in statuses:
        if status.pid is None:
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (proc / str(status.pid) / "stat").read_text().rpartition(")")[2].split()
            found[status.name] = Reading(
                pid=status.pid,
                at_s=time.monotonic(),
                cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS_PER_S,
                network_bytes=_network_bytes(proc / str(status.pid) / "fdinfo", net),
            )
    return found


def _network_bytes(fdinfo: Path, net: Path) -> int:
    """Of the taps that the process holds: their descriptors name them."""
    taps: set[str] = set()
    for entry in fdinfo.iterdir():
        with contextlib.suppress(OSError):
            for line in entry.read_text().splitlines():
                if line.startswith("iff:"):
                    taps.add(line.partition(":")[2].strip())
    total = 0
    for tap in taps:
        for way in ("rx_bytes", "tx_bytes"):
            with contextlib.suppress(OSError, ValueError):
                total += int((net / tap / "statistics" / way).read_text())
    return total
