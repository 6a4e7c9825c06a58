"""All of a node's checks, in the order in which an operator would look.

Reads the configuration and asks the node's own agent, where one runs, for what only the cluster
knows (other nodes, domains, pools). Without an agent the rest is checked all the same. It changes
nothing.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from migrator.errors import ConfigError
from migrator.model import HypervisorCapabilities, NodeState, PoolRoom
from node_agent import fabrics
from node_agent.cli.client import ApiClient
from node_agent.cli.errors import ApiProblem, CliError
from node_agent.config import AgentConfig, parse_endpoint
from node_agent.doctor import links, paths
from node_agent.doctor.certificates import check_certificates, check_store_certificates
from node_agent.doctor.findings import Diagnosis, Finding, failure, fine, warning
from node_agent.doctor.frr import check_frr
from node_agent.doctor.units import check_units
from node_agent.doctor.user_tokens import check_user_tokens
from node_agent.migrations.room import STATE_ROOM_BYTES, free_bytes
from node_agent.resources import DomainList, Node, NodeList, Pool, PoolList
from node_agent.trust.records import UserList

KERNEL_MIN: Final = (6, 7)
QEMU_MIN: Final = (7, 2)
CONNECT_S: Final = 2.0
STATE_ROOM_WARN_BYTES: Final = 64 * 2**20


def examine(
    config: AgentConfig, capabilities: Callable[[], HypervisorCapabilities | str]
) -> Diagnosis:
    """Everything. `capabilities` asks the hypervisor, and gives its reason where it can't be."""
    client = ApiClient(f"unix:{config.api.socket}")
    nodes, running = _nodes(client)
    findings = [
        _kernel(),
        *_hypervisor(capabilities()),
        *_devices(),
        state_directory(Path(config.node.state_directory)),
        *links.check_kernel_links(fabrics.leading_obstacle(config)),
        links.check_connection_tracking(),
        *_network(config, _bridges_in_use(client) if running else frozenset()),
        links.check_multicast(config.migration.address),
        *check_certificates(config, time.time()),
        *check_store_certificates(config, time.time()),
        _agent(config, running),
        *check_units(config.node.guest_shutdown_s),
        *_ports(config, running),
        *_pools(client, running),
        *_user_tokens(client, running),
        *_others(config, nodes),
    ]
    return Diagnosis(node=config.node.name, findings=tuple(findings))


def _network(config: AgentConfig, bridges: frozenset[str]) -> list[Finding]:
    """What the guests' network needs here."""
    table = config.fabric
    if table.driver == "macvtap":
        return [links.check_uplink(table.uplink)]
    local = (table.local or config.migration.address, *filter(None, (table.local6,)))
    if table.driver == "vxlan":
        found = links.check_overlay(table.bridge, local[0], fabrics.carried_bytes(config))
        return [*links.check_bridges(bridges), found, *check_frr(table, local)]
    if table.driver != "routed":
        return links.check_bridges(bridges)
    return [*links.check_routed(local), *check_frr(table, local)]


def version_of(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: "6.18.44-fc" is (6, 18, 44)."""
    matched = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in matched[0].split(".")) if matched else ()


def _kernel() -> Finding:
    release = platform.release()
    if version_of(release) >= KERNEL_MIN:
        return fine("kernel", release)
    return warning(
        "kernel",
        f"{release}: the page engine needs 6.7",
        "install a newer kernel; until then migrations use QEMU's own engine",
    )


def _hypervisor(found: HypervisorCapabilities | str) -> Iterator[Finding]:
    if isinstance(found, str):
        yield failure("QEMU", found, "install qemu-system-x86 7.2 or newer, or name its binary")
        return
    if version_of(found.version) < QEMU_MIN:
        yield failure("QEMU", f"version {found.version}", "install QEMU 7.2 or newer")
    else:
        yield fine("QEMU", f"version {found.version}, accelerator {found.accelerator}")
    if found.paged_engine:
        yield fine("userfaultfd", "write protection and PAGEMAP_SCAN work")
    else:
        yield warning(
            "userfaultfd",
            found.paged_engine_reason or "the page engine can't be used",
            "use Linux 6.7 or newer with CONFIG_USERFAULTFD, and run the agent as root",
        )
    if found.accelerator == "tcg":
        yield warning(
            "virtualization",
            "guests are emulated (TCG): ten times slower",
            "enable VT-x or AMD-V in the firmware, or nested virtualization, and modprobe kvm",
        )


def _devices() -> Iterator[Finding]:
    if os.geteuid() != 0:
        yield failure("rights", "this isn't root", "run the agent, and this, as root")
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        yield failure("/dev/net/tun", error.strerror or str(error), "modprobe tun")
    else:
        yield fine("/dev/net/tun", "opens")


def state_directory(folder: Path) -> Finding:
    """Whether there is room for the journal, without which nothing migrates."""
    check = "state directory"
    try:
        free = free_bytes(folder)
    except OSError as error:
        return failure(check, f"{folder}: {error.strerror}", "correct node.state_directory")
    told = f"{folder}: {free / 2**20:.0f} MiB free"
    if free < STATE_ROOM_BYTES:
        return failure(check, told, "free space there: nothing starts or migrates without it")
    if free < STATE_ROOM_WARN_BYTES:
        return warning(check, told, "free space there, before nothing starts or migrates any more")
    return fine(check, told)


def _nodes(client: ApiClient) -> tuple[Sequence[Node], bool]:
    try:
        return client.get("/v1/nodes", NodeList).nodes, True
    except ApiProblem:
        return (), True
    except CliError:
        return (), False


def _bridges_in_use(client: ApiClient) -> frozenset[str]:
    try:
        domains = client.get("/v1/domains", DomainList).domains
    except CliError:
        return frozenset()
    return frozenset(nic.bridge for domain in domains for nic in domain.spec.nics)


def _agent(config: AgentConfig, running: bool) -> Finding:
    if running:
        return fine("agent", f"answers on {config.api.socket}")
    return failure(
        "agent",
        f"nobody answers on {config.api.socket}",
        "systemctl start ferry-agent",
    )


def _ports(config: AgentConfig, running: bool) -> Iterator[Finding]:
    for name, (host, port) in (
        ("API port", config.api.listen_address),
        ("peer port", config.peer.listen_address),
    ):
        reason = _connects(host, port) if running else _binds(host, port)
        if reason is None:
            yield fine(name, f"{host} port {port}")
        elif running:
            yield failure(name, f"{host} port {port}: {reason}", "is another address meant?")
        else:
            yield failure(name, f"{host} port {port}: {reason}", "end what holds it")


def _pools(client: ApiClient, running: bool) -> Iterator[Finding]:
    if not running:
        return
    try:
        pools = client.get("/v1/pools", PoolList).pools
    except CliError as error:
        yield failure("storage", str(error), "see the agent's log")
        return
    for pool in pools:
        check = f"pool {pool.name}"
        if pool.refused:
            yield failure(check, f"{pool.driver}: {pool.refused}", "see docs/storage.md, Pools")
        elif pool.same_as:
            words = f"{pool.driver}, the place of pool {pool.same_as} under a second name"
            yield warning(
                check,
                f"{words}: by two names one volume could be given to two domains",
                "remove one of the two from agent.toml, once no domain has a disk on it",
            )
        elif pool.health.reachable:
            yield _room(pool)
        else:
            yield failure(check, f"{pool.driver}: {pool.health.reason}", "mend its server or mount")


def _room(pool: Pool) -> Finding:
    """Of one that is well, whether there is room in it."""
    check, told = f"pool {pool.name}", f"{pool.driver}, reachable"
    free = f"{told}: {(pool.health.free_bytes or 0) / 2**20:.0f} MiB free"
    if pool.room is PoolRoom.NONE:
        return failure(check, free, "make room: guests that write to it stand still without")
    if pool.room is PoolRoom.LITTLE:
        return warning(check, free, "make room, before guests that write to it stand still")
    return fine(check, told)


def _user_tokens(client: ApiClient, running: bool) -> Iterator[Finding]:
    """Nothing in plain mode, which has no users."""
    if not running:
        return
    try:
        users = client.get("/v1/users", UserList).users
    except CliError:
        return
    yield from check_user_tokens(users, time.time())


def _others(config: AgentConfig, nodes: Sequence[Node]) -> Iterator[Finding]:
    own = config.node.name
    known = {node.name: (node.peer_address, node.migration_address) for node in nodes}
    for peer in config.peers:
        known.setdefault(peer.name, (peer.address, peer.endpoint[0]))
    alive = {node.name for node in nodes if node.state is not NodeState.UNREACHABLE}
    silent = {node.name for node in nodes if node.state is NodeState.UNREACHABLE}
    offsets = {node.name: node.clock_offset_s for node in nodes if node.name in alive}
    mtu_bytes = links.mtu_towards(config.migration.address)
    for name, (peer_address, migration_address) in sorted(known.items()):
        if name == own:
            continue
        if name in silent:
            yield warning(f"node {name}", "no heartbeat", "look after it, or remove it")
        try:
            host, port = parse_endpoint(peer_address)
        except ConfigError as error:
            yield failure(f"node {name}", str(error), "correct its address")
            continue
        reason = _connects(host, port)
        if reason is not None:
            yield failure(
                f"peer port of {name}", f"{peer_address}: {reason}", _mend_port(port, name in alive)
            )
            continue
        yield fine(f"peer port of {name}", peer_address)
        yield paths.check_mtu(name, migration_address, mtu_bytes)
        yield paths.check_tunnel_port(name, migration_address, config.fabric.tunnel_port)
        yield paths.check_clock(name, migration_address, offsets.get(name))


def _mend_port(port: int, alive: bool) -> str:
    """A node with a heartbeat has an agent that runs."""
    if alive:
        return f"its agent runs: look for a firewall on TCP port {port}, there or on the way"
    return "start its agent"


def _connects(host: str, port: int) -> str | None:
    """Why no connection comes about; None if one does."""
    try:
        with socket.create_connection((host, port), CONNECT_S):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _binds(host: str, port: int) -> str | None:
    try:
        with socket.create_server((host, port)):
            return None
    except OSError as error:
        return error.strerror or str(error)


def default_config() -> Path:
    """The configuration that the agent's unit names."""
    return Path("/etc/ferry/agent.toml")
