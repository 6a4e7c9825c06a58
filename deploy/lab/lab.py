"""A lab's life: up, status, down, and its agents one by one.

    plan ──> up ──> namespaces, cables ──> folders, configurations ──> agents ──> lab.json
                         │ any failure, Ctrl-C: what this `up` made is removed, the rest stays
             down ──> kill what runs in the namespaces ──> remove namespaces, folder, registration

Rules:
- Everything is idempotent and repairs: `up` makes what is missing, `down` removes what is there.
- Nothing relies on an orderly end. After a kill -9 at any point the next `up` repairs and the next
  `down` removes everything, because both look at the machine rather than at notes.
- One command at a time changes a lab (`registry.lab_lock`).
- Agents and QEMUs outlive the command: own session, no terminal.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final

import msgspec

from deploy.lab import (
    etcd,
    frr,
    membership,
    namespaces,
    network,
    overlay,
    processes,
    registry,
    routed,
    storage,
)
from deploy.lab.config import agent_config_text
from deploy.lab.kinds import FabricKind, StoreKind
from deploy.lab.merging import merge, with_fabric
from deploy.lab.plan import LabPlan, NodePlan, check_lab_name, lab_of_namespace
from deploy.lab.preconditions import check_machine, require_root
from deploy.lab.processes import Process
from deploy.lab.record import (
    DEFAULT_NAME,
    LabRecord,
    labs_root,
    load,
    read_record,
    recorded,
    write_atomically,
    write_record,
)
from deploy.lab.removal import interrupts_ignored, remove_everything, remove_traces
from migrator.errors import FerryError, NotFoundError

AGENT_COMMAND: Final = (sys.executable, "-m", "node_agent")
READY_TIMEOUT_S: Final = 60.0
"""An agent starts in about a second; two dozen at once on two slow cores take their time."""
STOP_TIMEOUT_S: Final = 15.0
"""How long an agent may take to end on SIGTERM before it is killed."""


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    mgmt_address: str
    api: str
    agent: str
    """`ready`, `starting` (runs, but its API doesn't answer) or `stopped`."""
    agent_pid: int | None
    processes: int
    """How many processes run in the node, agent included."""


class LabStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    state: str
    """`ready`, or `damaged`: `ferry lab up` repairs it, `ferry lab down` removes it."""
    folder: str
    link_mbit: int | None
    guest_network: str
    nodes: tuple[NodeStatus, ...]
    missing: tuple[str, ...]
    """Namespaces and interfaces that should be there and aren't."""


def up(
    name: str = DEFAULT_NAME,
    *,
    nodes: int | None = None,
    link_mbit: int | None = None,
    node_memory_bytes: int | None = None,
    store: StoreKind | None = None,
    storage_kinds: Sequence[str] = (),
    tls: bool | None = None,
    fabric: FabricKind | None = None,
    agent_command: Sequence[str] | None = None,
    ready_timeout_s: float = READY_TIMEOUT_S,
    report: Callable[[str], None] = lambda _line: None,
) -> LabRecord:
    """Make the lab, or repair it and let it grow; returns when every agent answers.

    What isn't given stays as it is: 3 nodes, unshaped links (Mbit/s; 0 lifts a shaping), 4 GiB
    a node, the state in an SQLite file and no TLS for a new lab. `storage_kinds` are added to those
    that it has. `agent_command` gets `--config PATH` appended. `report` hears each step.

    Raises FerryError (RefusedError: the machine lacks something; InvalidRequest: a number is wrong;
    ConflictError: the lab is locked, lives elsewhere or would shrink). Then, as after a
    KeyboardInterrupt, what this call made is removed again, and what was there before stays.
    """
    check_lab_name(name)
    require_root()
    with registry.lab_lock(name) as lock, ExitStack() as undo:
        try:
            folder = labs_root() / name
            present = read_record(folder)
            index = lock.claim(folder, present.plan.index if present else None).index
            if present is None:
                # Also what an earlier `up` left that was killed half-way.
                undo.callback(remove_everything, name, folder, lock, ())
                check_machine()
                remove_traces(name, folder, ())
            plan = merge(name, index, present, nodes, link_mbit, node_memory_bytes, store, tls)
            plan = with_fabric(plan, present, fabric)
            kinds = storage.check_kinds([*plan.storage, *storage_kinds])
            storage.check_installed(kinds)
            plan = msgspec.structs.replace(plan, storage=kinds)
            frr.check_installed(plan)
            if plan.etcd_members:
                etcd.check_installed()
            command = tuple(agent_command or (present.agent_command if present else AGENT_COMMAND))
            record = _make(plan, command, present, undo, report)
            if plan.tls:
                membership.ensure(plan, record, ready_timeout_s, report)
            for item, node in zip(record.nodes, plan.nodes, strict=True):
                assert item.agent is not None
                processes.wait_healthy(
                    node.name, item.agent, node.api_socket, node.log_path, ready_timeout_s
                )
                report(f"agent {node.name} answers")
        except BaseException:
            with interrupts_ignored():
                undo.close()
            raise
        undo.pop_all()
        return record


def down(name: str = DEFAULT_NAME) -> bool:
    """End and remove everything of the lab, whatever state it is in. False: there was nothing.

    Raises FerryError when a process won't end or a namespace can't be removed; try again then.
    """
    check_lab_name(name)
    require_root()
    with registry.lab_lock(name) as lock:
        entered = lock.registration()
        folder = entered.folder if entered else labs_root() / name
        record = read_record(folder)
        left = namespaces.lab_namespaces(name)
        found = entered is not None or folder.exists() or bool(left)
        agents = [node.agent for node in record.nodes if node.agent] if record else []
        remove_everything(name, folder, lock, agents)
    return found


def down_all() -> list[str]:
    """`down` for every lab of this machine, half-made ones too. Their names."""
    names = list_labs()
    for name in names:
        down(name)
    return names


def list_labs() -> list[str]:
    """Every lab that left a trace: a registration, a folder or a namespace."""
    names = {item.name for item in registry.registered()}
    names.update(filter(None, map(lab_of_namespace, namespaces.lab_namespaces())))
    return sorted(names.union(recorded()))


def status(name: str = DEFAULT_NAME) -> LabStatus:
    """How the lab is. Raises NotFoundError if there is none of this name. Changes nothing."""
    require_root()
    plan = load(name).plan
    missing = network.missing_interfaces(plan)
    running = processes.processes_in(plan.namespaces)
    nodes = []
    for node in plan.nodes:
        agent = processes.find_by_argument(running[node.namespace], str(node.config_path))
        ready = agent is not None and processes.healthy(node.api_socket)
        nodes.append(
            NodeStatus(
                name=node.name,
                mgmt_address=node.mgmt_address,
                api=f"unix:{node.api_socket}",
                agent="stopped" if agent is None else "ready" if ready else "starting",
                agent_pid=agent.pid if agent else None,
                processes=len(running[node.namespace]),
            )
        )
    sound = not missing and all(node.agent == "ready" for node in nodes)
    return LabStatus(
        name=name,
        state="ready" if sound else "damaged",
        folder=str(plan.folder),
        link_mbit=plan.link_mbit,
        guest_network=plan.guest_network,
        nodes=tuple(nodes),
        missing=tuple(missing),
    )


def restart_agent(lab: str, node: str, ready_timeout_s: float = READY_TIMEOUT_S) -> Process:
    """Stop the node's agent and start it again; returns when it answers. Its domains stay.

    Raises FerryError when the new agent doesn't answer; the log's end is in the message.
    """
    stop_agent(lab, node)
    return start_agent(lab, node, ready_timeout_s)


def start_agent(lab: str, node: str, ready_timeout_s: float = READY_TIMEOUT_S) -> Process:
    """Start the node's agent unless it runs; returns when it answers. Raises as restart_agent."""
    require_root()
    with registry.lab_lock(lab):
        record = load(lab)
        target = record.plan.node(node)
        agent = _find_agent(target) or _spawn_agent(target, record.agent_command)
        known = {item.name: item.agent for item in record.nodes if item.agent}
        write_record(record.plan, record.agent_command, {**known, node: agent})
        processes.wait_healthy(node, agent, target.api_socket, target.log_path, ready_timeout_s)
    return agent


def stop_agent(lab: str, node: str, *, kill: bool = False) -> bool:
    """End the node's agent: SIGTERM, SIGKILL after 15 s or with `kill` at once. Domains stay.

    False: it wasn't running.
    """
    require_root()
    with registry.lab_lock(lab):
        target = load(lab).plan.node(node)
        agent = _find_agent(target)
        if agent is not None:
            _end_agent(target, agent, kill=kill)
    return agent is not None


def kill_agent(lab: str, node: str) -> bool:
    """SIGKILL the node's agent, as a crash would. False: it wasn't running."""
    return stop_agent(lab, node, kill=True)


def etcd_member(lab: str, member: str, *, run: bool) -> bool:
    """Start one member of the lab's etcd with what it has on its disk, or SIGKILL it.

    One that is started serves when this returns, if a majority of the members runs.
    False: it was so already. NotFoundError: there is no such member.
    """
    require_root()
    with registry.lab_lock(lab):
        plan = load(lab).plan
        found = next((each for each in plan.etcd_members if each.name == member), None)
        if found is None:
            names = (
                ", ".join(each.name for each in plan.etcd_members) or "none: its store is a file"
            )
            raise NotFoundError(f"lab {lab} has no etcd member {member!r}; its members are {names}")
        process = etcd.find_member(found)
        if (process is not None) is run:
            return False
        if process is None:
            process = etcd.start_member(plan, found)
            if etcd.majority_runs(plan):
                etcd.wait_serving(found, process)
        else:
            processes.send_signal(process, signal.SIGKILL)
            processes.wait_ended([process], STOP_TIMEOUT_S)
    return True


def storage_server(lab: str, kind: str, *, run: bool) -> bool:
    """Start the lab's storage server of a kind with what it has on its disk, or SIGKILL it.

    False: it was so already. NotFoundError: it has no such server.
    """
    require_root()
    with registry.lab_lock(lab):
        plan = load(lab).plan
        if kind not in plan.storage:
            names = ", ".join(plan.storage) or "none"
            raise NotFoundError(f"lab {lab} has no storage server {kind!r}; it has {names}")
        return storage.start(plan, kind) if run else storage.kill(plan, kind)


def namespace_of(lab: str, where: str) -> str:
    """The namespace of a node, or of another host of the lab. NotFoundError names them all."""
    return load(lab).plan.namespace_of(where)


def command_in(lab: str, where: str, command: Sequence[str]) -> list[str]:
    """The argument vector that runs `command` in a node, the client or the storage namespace."""
    namespace = namespace_of(lab, where)
    return [sys.executable, "-I", "-S", processes.ENTER_SCRIPT, namespace, *command]


def run_in(
    lab: str, where: str, command: Sequence[str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run `command` there to its end, output captured. Raises TimeoutExpired: killed."""
    return subprocess.run(
        command_in(lab, where, command),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


# --- parts -----------------------------------------------------------------------------------


def _make(
    plan: LabPlan,
    command: tuple[str, ...],
    present: LabRecord | None,
    undo: ExitStack,
    report: Callable[[str], None],
) -> LabRecord:
    """Everything up to started agents. `undo` gets what takes back each step of a repair."""

    def made(namespace: str) -> None:
        report(f"namespace {namespace}")
        undo.callback(namespaces.remove_namespace, namespace)
        undo.callback(processes.kill_all, [namespace])

    plan.volumes_path.mkdir(parents=True, exist_ok=True)
    known = {node.name: node.agent for node in present.nodes if node.agent} if present else {}
    # Written before anything is made, so that an interrupted lab is repaired to the same shape.
    write_record(plan, command, known)
    if present is not None:
        undo.callback(write_record, present.plan, present.agent_command, known)
    for node in plan.nodes:
        if not node.folder.exists():
            undo.callback(shutil.rmtree, node.folder, ignore_errors=True)
        node.state_path.mkdir(parents=True, exist_ok=True)
    network.ensure_network(plan, made)
    etcd.ensure_members(plan, report)
    overlay.ensure_client(plan)
    routed.ensure_router(plan, report)
    storage.ensure_servers(plan, report)
    agents = {node.name: _ensure_agent(plan, node, command, undo, report) for node in plan.nodes}
    return write_record(plan, command, agents)


def _ensure_agent(
    plan: LabPlan,
    node: NodePlan,
    command: tuple[str, ...],
    undo: ExitStack,
    report: Callable[[str], None],
) -> Process:
    """The node's agent, started if it isn't there, restarted if its configuration is another."""
    text = agent_config_text(plan, node)
    agent = _find_agent(node)
    changed = not node.config_path.exists() or node.config_path.read_text() != text
    if changed:
        write_atomically(node.config_path, text.encode())
    if agent is None or changed:
        fresh = agent is None
        if agent is not None:
            _end_agent(node, agent, kill=False)
        agent = _spawn_agent(node, command)
        if fresh:
            undo.callback(processes.send_signal, agent, signal.SIGKILL)
        report(f"agent {node.name} started")
    return agent


def _find_agent(node: NodePlan) -> Process | None:
    running = processes.processes_in([node.namespace])[node.namespace]
    return processes.find_by_argument(running, str(node.config_path))


def _spawn_agent(node: NodePlan, command: Sequence[str]) -> Process:
    return processes.spawn_in(
        node.namespace, [*command, "--config", str(node.config_path)], node.log_path
    )


def _end_agent(node: NodePlan, agent: Process, *, kill: bool) -> None:
    if not kill:
        processes.send_signal(agent, signal.SIGTERM)
        if not processes.wait_ended([agent], STOP_TIMEOUT_S):
            return
    processes.send_signal(agent, signal.SIGKILL)
    if processes.wait_ended([agent], STOP_TIMEOUT_S):
        raise FerryError(f"the agent of {node.name} (pid {agent.pid}) won't end, even when killed")
