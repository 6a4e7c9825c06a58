"""What there is in a lab: counted over all nodes, so that it doesn't matter where a guest runs."""

from __future__ import annotations

import contextlib
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pyroute2 import IPRoute

from deploy.lab.namespaces import lab_namespaces, netlink_socket
from deploy.lab.processes import command_of
from migrator.engine.spares import SPARES
from netfabric.taps import TUNNEL_NAME
from tests.integration.cluster.world import SLOW_POLL_S, Cluster, eventually

SETTLE_S = 45.0
"""Six engines are started, after everybody else, where cores are taken. Less than the minute after
which a copy is given up that nobody asks for: that one is left behind.
"""


def take(cluster: Cluster) -> Counter[str]:
    """Everything that a migration could leave behind, by kind."""
    found: Counter[str] = Counter(namespaces=len(lab_namespaces(cluster.name)))
    memfds: set[str] = set()
    for node in cluster.plan.nodes:
        for process in cluster.processes(node.name):
            kind = _kind(command_of(process.pid))
            found[f"{kind} processes"] += 1
            links = dict(_descriptors(process.pid))
            memfds.update(link for link in links.values() if link.startswith("/memfd:ferry"))
            if kind in ("agent", "qemu"):  # A spare engine may still be at its imports.
                sockets = sum(link.startswith("socket:") for link in links.values())
                found[f"{kind} sockets"] += sockets
                found[f"{kind} descriptors"] += len(links) - sockets
        interfaces = _interfaces(node.namespace)
        found["interfaces"] += len(interfaces)
        found["tunnels"] += sum(bool(TUNNEL_NAME.fullmatch(name)) for name in interfaces)
        found["sockets in folders"] += sum(1 for _ in _sockets(node.folder))
    found["memfds"] = len(memfds)
    return found


def take_settled(cluster: Cluster) -> Counter[str]:
    """The same once each node has its spare engines, and nothing changes any more.

    The tunnels of an earlier migration live through its grace time: they are waited for.
    """
    before, last = take(cluster), take(cluster)

    def settled() -> bool:
        nonlocal before, last
        before, last = last, take(cluster)
        spares = last["engine processes"] == SPARES * len(cluster.plan.nodes)
        return before == last and spares and not last["tunnels"]

    try:
        eventually("the lab settles", settled, SETTLE_S, SLOW_POLL_S)
    except AssertionError as error:
        raise AssertionError(f"{error}: {_changes(before, last)}") from None
    return last


def assert_nothing_left(
    cluster: Cluster, before: Counter[str], *, connections_change: bool = False
) -> None:
    """Within `SETTLE_S` there is what there was: connections are closed with a little delay.

    `connections_change`: agents were started anew; two of them are connected, both ways, or not
    yet.
    """
    slack = len(cluster.plan.nodes) * (len(cluster.plan.nodes) - 1) if connections_change else 0
    last = before

    def same() -> bool:
        nonlocal last
        last = take(cluster)
        if slack and abs(last["agent sockets"] - before["agent sockets"]) <= 2 * slack:
            last["agent sockets"] = before["agent sockets"]
        return last == before

    try:
        eventually("nothing is left behind", same, SETTLE_S, SLOW_POLL_S)
    except AssertionError as error:
        raise AssertionError(f"{error}: {_changes(before, last)}") from None


def tracked(cluster: Cluster, node: str) -> bool:
    """Whether writes of a guest there are tracked: "uw" is userfaultfd's write protection."""
    for process in cluster.processes(node):
        if _kind(command_of(process.pid)) == "qemu":
            smaps = ""
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # It has just ended.
                smaps = Path(f"/proc/{process.pid}/smaps").read_text()
            if any("uw" in line.split() for line in smaps.splitlines() if "VmFlags" in line):
                return True
    return False


def _changes(before: Counter[str], after: Counter[str]) -> str:
    changes = [
        f"{kind}: {before[kind]}, then {after[kind]}"
        for kind in sorted({*before, *after})
        if before[kind] != after[kind]
    ]
    return "; ".join(changes) or f"nothing changes: {after}"


def _kind(command: list[str]) -> str:
    words = " ".join(command)
    if "migrator.engine" in words:
        return "engine"
    if "node_agent" in words:
        return "agent"
    return "qemu" if "qemu-system" in words else "other"


def _descriptors(pid: int) -> Iterator[tuple[str, str]]:
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                link = str(entry.readlink())
                if link.startswith("/memfd:"):
                    link += f" {entry.stat().st_ino}"
                yield entry.name, link


def _interfaces(namespace: str) -> list[str]:
    with IPRoute(fileno=netlink_socket(namespace)) as route:
        return [link.get_attr("IFLA_IFNAME") for link in route.get_links()]


def _sockets(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(path.lstat().st_mode):
                    yield path
