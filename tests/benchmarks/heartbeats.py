"""What a store carries when many agents only speak and listen.

    python -m tests.benchmarks.heartbeats --nodes 50 --domains 750 --seconds 20

One real etcd on loopback, and for each node the production registry with a connection of its own,
all in this process. Prints, by etcd's own metrics, bytes and requests a second, its share of a
core, and how late a second of an agent is. With domains each node looks every ten seconds whose
they are, as an agent does. What nodes are like has the size that it has with
QEMU 7.2: 3 KB.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import statistics
import time
import urllib.request
from typing import Final

import msgspec

from migrator.model import NodeInfo, OwnershipRecord, OwnershipState
from node_agent.domain_ownership import SWEEP_S
from node_agent.domain_records import DomainRecords
from node_agent.nodes import NodeRegistry
from node_agent.state.etcd import EtcdSettings, EtcdStore
from node_agent.state.ownership import StoreOwnership
from node_agent.state.typed import TypedStore
from tests.contract.etcd_members import EtcdMember, running_members
from tests.interrupts import interruptible
from tests.unit.heartbeats import heartbeat

_METRIC: Final = re.compile(r"^(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_MODELS: Final = tuple(f"Processor-Model-v{number}" for number in range(130))
"""As many bytes as QEMU's names of processors and machines take."""


def metrics(member: EtcdMember) -> dict[str, float]:
    """Each metric's sum over its labels."""
    sums: dict[str, float] = {}
    host, port = member.endpoint
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=5.0) as answer:
        for name, value in _METRIC.findall(answer.read().decode()):
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


class Node:
    """One agent's part in it."""

    def __init__(self, number: int, member: EtcdMember) -> None:
        made = heartbeat(f"node-{number:03}", cpus=64, pools=("fast", "default"))
        capabilities = msgspec.structs.replace(made.capabilities, cpu_models=_MODELS)
        self._info = msgspec.structs.replace(made, capabilities=capabilities)
        self._store = EtcdStore(EtcdSettings(endpoints=(member.endpoint,), prefix="/bench/"))
        typed = TypedStore(self._store)
        self._registry = NodeRegistry(typed, self._describe)
        self._records = DomainRecords(typed)
        self._swept_s = time.monotonic() - SWEEP_S * random.random()
        self.took_s: list[float] = []

    async def _describe(self) -> NodeInfo:
        return self._info

    async def run(self, delay_s: float, until: float) -> None:
        await self._store.open()
        try:
            await asyncio.sleep(delay_s)
            while time.monotonic() < until:
                begun = time.monotonic()
                await self._registry.beat()
                await self._registry.read()
                if begun - self._swept_s >= SWEEP_S:
                    self._swept_s = begun
                    await self._records.list_ownership()
                self.took_s.append(time.monotonic() - begun)
                await asyncio.sleep(max(0.0, begun + 1.0 - time.monotonic()))
        finally:
            await self._store.close()


async def define(member: EtcdMember, nodes: int, domains: int) -> None:
    """Their ownership records: who runs which."""
    store = EtcdStore(EtcdSettings(endpoints=(member.endpoint,), prefix="/bench/"))
    await store.open()
    ownership = StoreOwnership(store)
    for number in range(domains):
        owned = OwnershipRecord(
            domain=f"web-{number:04}",
            token=1,
            owner=f"node-{number % nodes:03}",
            state=OwnershipState.RUNNING,
        )
        await ownership.compare_and_set(None, owned)
    await store.close()


async def measure(member: EtcdMember, nodes: int, domains: int, seconds: float) -> None:
    """After a warm-up of a third of it, and of a sweep."""
    await define(member, nodes, domains)
    warm_s = max(seconds / 3.0, SWEEP_S + 2.0 if domains else 0.0)
    until = time.monotonic() + warm_s + seconds
    each = [Node(number, member) for number in range(nodes)]
    running = [
        asyncio.create_task(node.run(number / nodes, until)) for number, node in enumerate(each)
    ]
    await asyncio.sleep(warm_s)
    before, begun = await asyncio.to_thread(metrics, member), time.monotonic()
    for node in each:
        node.took_s.clear()
    await asyncio.sleep(max(0.0, until - 1.0 - time.monotonic()))
    after, took_s = await asyncio.to_thread(metrics, member), time.monotonic() - begun
    await asyncio.gather(*running)

    def rate(name: str) -> float:
        return (after[name] - before[name]) / took_s

    sent, received = (
        rate(f"etcd_network_client_grpc_{what}_bytes_total") / 1e6 for what in ("sent", "received")
    )
    seconds_taken = sorted(1e3 * took for node in each for took in node.took_s)
    print(
        f"{nodes} nodes, {domains} domains, a second: sent {sent:.2f} MB, "
        f"received {received:.3f} MB, {rate('grpc_server_handled_total'):.0f} requests, "
        f"{100 * rate('process_cpu_seconds_total'):.0f} % of a core for etcd; an agent's beat and "
        f"look: median {statistics.median(seconds_taken):.0f} ms, worst {seconds_taken[-1]:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--domains", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    with interruptible("heartbeats"), running_members(1) as (member,):
        asyncio.run(measure(member, options.nodes, options.domains, options.seconds))


if __name__ == "__main__":
    main()
