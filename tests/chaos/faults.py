"""What can fail, and for how long. Each fault begins at once and ends by itself.

A killed agent or storage server is started again, as systemd would; a killed engine or hypervisor
isn't.
"""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from deploy.lab.lab import storage_server
from deploy.lab.processes import Process, send_signal
from tests.integration.cluster.world import Cluster, Guest, eventually

STOPPED_S: Final = 10.0
SERVER_DOWN_S: Final = 5.0
STORE_LOCKED_S: Final = 5.0
LINK_DOWN_S: Final = 10.0
_TABLE: Final = "ferry_chaos"
PROCESSES: Final = tuple(
    f"{side} {kind}"
    for side in ("source", "destination")
    for kind in ("agent", "engine", "hypervisor")
)


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a fault happens: a migration that is held at a step."""

    cluster: Cluster
    guest: Guest
    source: str
    destination: str
    storage: str | None
    """The kind of storage server that the guest's disk is on; None: a folder."""

    def node(self, side: str) -> str:
        return self.source if side == "source" else self.destination

    def find(self, what: str) -> list[Process]:
        """The processes that `what` ("source agent") names now."""
        side, kind = what.split()
        node = self.node(side)
        if kind == "agent":
            return [self.cluster.agent(node)]
        if kind == "engine":
            return self.cluster.engines(node)
        return self.cluster.qemus(node, self.guest.name)


Begin = Callable[[Stage], "Ongoing"]


class Ongoing:
    """A fault that was begun. `wait` returns when it is over; `end` has it over at once."""

    def __init__(self, end: Callable[[], None], seconds: float) -> None:
        self._end = end
        self._problem: BaseException | None = None
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(seconds,), name="fault")
        self._thread.start()

    def _run(self, seconds: float) -> None:
        self._enough.wait(seconds)  # How long the fault lasts.
        try:
            self._end()
        except BaseException as error:
            self._problem = error

    def wait(self) -> None:
        self._thread.join()
        if self._problem is not None:
            raise self._problem

    def end(self) -> None:
        self._enough.set()
        self.wait()


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    begin: Begin
    needs_server: bool = False
    """It is about the storage server, or the way to it."""
    may_lose: str | None = None
    """The side whose memory it destroys; None: nobody's."""


class Absent(Exception):
    """There is no such process at this step."""


def _victims(stage: Stage, what: str) -> list[Process]:
    found = stage.find(what)
    if not found:
        raise Absent(f"there is no {what} at this step")
    return found


def _kill(what: str) -> Begin:
    def begin(stage: Stage) -> Ongoing:
        for victim in _victims(stage, what):
            stage.cluster.kill(victim)
        restart = what.endswith("agent")
        return Ongoing(stage.cluster.restart_missing_agents if restart else _nothing, 0.0)

    return begin


def _stop(what: str) -> Begin:
    def begin(stage: Stage) -> Ongoing:
        victims = _victims(stage, what)
        for victim in victims:
            send_signal(victim, signal.SIGSTOP)

        def resume() -> None:
            for victim in victims:
                send_signal(victim, signal.SIGCONT)

        return Ongoing(resume, STOPPED_S)

    return begin


def _kill_server(stage: Stage) -> Ongoing:
    kind = stage.storage
    assert kind is not None
    storage_server(stage.cluster.name, kind, run=False)
    return Ongoing(
        lambda: _ignore(storage_server(stage.cluster.name, kind, run=True)), SERVER_DOWN_S
    )


def _lock_store(stage: Stage) -> Ongoing:
    """Nobody can write the state, as with a backup that holds the file."""
    connection = sqlite3.connect(
        stage.cluster.plan.store_path, isolation_level=None, check_same_thread=False, timeout=10.0
    )
    eventually("the store's lock is free", lambda: _locked(connection))

    def unlock() -> None:
        connection.execute("ROLLBACK")
        connection.close()

    return Ongoing(unlock, STORE_LOCKED_S)


def _locked(connection: sqlite3.Connection) -> bool:
    with contextlib.suppress(sqlite3.OperationalError):
        connection.execute("BEGIN EXCLUSIVE")
        return True
    return False


def _cut(pair: Callable[[Stage], tuple[str, str]]) -> Begin:
    def begin(stage: Stage) -> Ongoing:
        namespace_role, address = pair(stage)
        namespace = stage.cluster.plan.namespace(namespace_role)
        rules = (
            f"add table inet {_TABLE}\n"
            f"add chain inet {_TABLE} in {{ type filter hook input priority 0; }}\n"
            f"add chain inet {_TABLE} out {{ type filter hook output priority 0; }}\n"
            f"add rule inet {_TABLE} in ip saddr {address} drop\n"
            f"add rule inet {_TABLE} out ip daddr {address} drop\n"
        )
        _nft(namespace, rules)
        return Ongoing(lambda: _nft(namespace, f"delete table inet {_TABLE}\n"), LINK_DOWN_S)

    return begin


def _nft(namespace: str, rules: str) -> None:
    subprocess.run(
        ["ip", "netns", "exec", namespace, "nft", "-f", "-"],
        input=rules,
        text=True,
        check=True,
        capture_output=True,
        timeout=30,
    )


def _between_nodes(stage: Stage) -> tuple[str, str]:
    return stage.source, stage.cluster.plan.node(stage.destination).mgmt_address


def _to_storage(side: str) -> Callable[[Stage], tuple[str, str]]:
    return lambda stage: (stage.node(side), stage.cluster.plan.storage_address)


def _nothing() -> None:
    pass


def _ignore(_value: object) -> None:
    pass


def _all() -> Iterator[Fault]:
    for what in PROCESSES:
        lost = what.split()[0] if what.endswith("hypervisor") else None
        yield Fault(name=f"kill {what}", begin=_kill(what), may_lose=lost)
    for what in PROCESSES:
        yield Fault(name=f"stop {what}", begin=_stop(what))
    yield Fault(name="kill storage server", begin=_kill_server, needs_server=True)
    yield Fault(name="lock store", begin=_lock_store)
    yield Fault(name="cut nodes", begin=_cut(_between_nodes))
    for side in ("source", "destination"):
        yield Fault(name=f"cut {side} storage", begin=_cut(_to_storage(side)), needs_server=True)


FAULTS: Final[tuple[Fault, ...]] = tuple(_all())


@contextmanager
def ended_for_certain(cluster: Cluster) -> Iterator[None]:
    """Whatever happens in the body, no fault outlives it: an interrupted run leaves none."""
    try:
        yield
    finally:
        for node in cluster.plan.nodes:
            with contextlib.suppress(subprocess.CalledProcessError):
                _nft(node.namespace, f"delete table inet {_TABLE}\n")
            for process in cluster.processes(node.name):
                send_signal(process, signal.SIGCONT)
