"""BGP in a routed lab: zebra and bgpd of Debian's frr, in every node and in the router.

One AS; the router reflects what the nodes announce. By EVPN the neighbours speak `l2vpn evpn`
alone. With type 5 (`evpn`) the router has an end of the VXLAN, too, and announces the client's
subnet; with type 2 (`evpn-l2`) the client has one, and an FRR of its own. Each pair of daemons has
a folder of its own for its configuration, sockets and logs, so that nothing of the machine's own
FRR is touched:

    ferry lab exec n1 -- vtysh --vty_socket /run/ferry-frr/LAB/n1 -c 'show bgp summary'
"""

from __future__ import annotations

import contextlib
import ipaddress
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from pyroute2 import IPRoute

from deploy.lab import processes
from deploy.lab.kinds import FRR_FABRICS, OVERLAY_IDENTIFIER, OVERLAY_MTU_BYTES, FabricKind
from deploy.lab.namespaces import work_in
from deploy.lab.plan import GUEST_BRIDGE, LabPlan
from migrator.errors import FerryError, RefusedError
from netfabric.vxlan.overlay import Overlay
from netfabric.vxlan.overlay import ensure as ensure_end

PROGRAMS: Final = Path("/usr/lib/frr")
ZEBRA_OPTIONS: Final = ("--v6-rr-semantics",)
"""An IPv6 route that changes is replaced. Else zebra takes it away first, and what comes in those
50 us to 2 ms is lost."""
ROUTER_HOLD_MS: Final = 50
"""The router's zebra acts so long after the first word. bgpd changes an EVPN route in two: it
takes the old one away, and enters the new one; where only the first has come by then, the route is
gone for a while. By default zebra waits 10 ms, and bgpd stood still for 13 just there in 1 of 448
changes on two busy cores. Not for the nodes: theirs have the router's way meanwhile, and bgpd would
hear late of what the kernel says.
"""
RUN: Final = Path("/run/ferry-frr")
"""Not in the labs' folder, which the daemons' user needn't be able to enter."""
USER: Final = "frr"
SYSTEM: Final = 64512
READY_TIMEOUT_S: Final = 30.0
_POLL_S: Final = 0.02
_BY_MAC: Final = ("  advertise-all-vni",)
_BY_ADDRESS: Final = (*_BY_MAC, "  advertise ipv4 unicast", "  advertise ipv6 unicast")


def check_installed(plan: LabPlan) -> None:
    """RefusedError: the lab wants BGP, and this machine has no FRR."""
    missing = not (PROGRAMS / "bgpd").exists() or shutil.which("vtysh") is None
    if plan.fabric in FRR_FABRICS and missing:
        reason = "FRR is not installed: apt-get install frr"
        raise RefusedError(f"this machine can't hold the lab's routers: {reason}", [reason])


def vty_directory(plan: LabPlan, role: str) -> Path:
    """Where the daemons of a node, or of `router`, have their sockets."""
    return RUN / plan.name / role


def remove(lab: str) -> None:
    """What the daemons of a lab have left, once they are ended. Idempotent."""
    shutil.rmtree(RUN / lab, ignore_errors=True)
    with contextlib.suppress(OSError):  # Other labs' are there, or none ever was.
        RUN.rmdir()


def ensure_daemons(plan: LabPlan, report: Callable[[str], None]) -> None:
    """Start what doesn't run. FerryError with a log's end."""
    if plan.fabric not in FRR_FABRICS:
        return
    if plan.fabric is FabricKind.EVPN:
        work_in(plan.router, lambda: ensure_end(_router_overlay(plan)))
        for number, node in enumerate(plan.nodes, 1):
            work_in(node.namespace, partial(_ensure_own, _own_networks(plan, number)))
    for role, lines in (("router", _router_lines(plan)), *_node_lines(plan)):
        folder = vty_directory(plan, role)
        folder.mkdir(parents=True, exist_ok=True)
        configuration, text = folder / "frr.conf", "\n".join(lines) + "\n"
        grown = configuration.exists() and configuration.read_text() != text
        configuration.write_text(text)
        for path in (folder, configuration):  # The daemons give up being root.
            shutil.chown(path, USER, USER)
        for daemon in ("zebra", "bgpd"):
            _ensure(plan, role, daemon, report)
        if grown:
            _tell(folder, configuration)


def _tell(folder: Path, configuration: Path) -> None:
    """Let running daemons have what has come to their configuration. FerryError: they refuse."""
    done = subprocess.run(
        ["vtysh", "--vty_socket", str(folder), "-f", str(configuration)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=READY_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise FerryError(f"FRR refuses {configuration}:\n{done.stdout}{done.stderr}")


def _ensure(plan: LabPlan, role: str, daemon: str, report: Callable[[str], None]) -> None:
    folder, namespace = vty_directory(plan, role), plan.namespace(role)
    pid_path, log = folder / f"{daemon}.pid", folder / f"{daemon}.log"
    running = processes.processes_in([namespace])[namespace]
    if processes.find_by_argument(running, str(pid_path)) is not None:
        return
    command = [
        str(PROGRAMS / daemon),
        *("-f", str(folder / "frr.conf"), "-i", str(pid_path), "-z", str(folder / "zserv.api")),
        *("--vty_socket", str(folder), "-P", "0"),
        *("--log", f"file:{log}"),
        *(ZEBRA_OPTIONS if daemon == "zebra" else ()),
    ]
    process = processes.spawn_in(namespace, command, log)
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not (folder / f"{daemon}.vty").is_socket():
        if not processes.alive(process) or time.monotonic() > deadline_s:
            raise FerryError(
                f"the lab's {daemon} of {role} doesn't serve; the end of {log}:\n"
                f"{processes.tail(log)}"
            )
        time.sleep(_POLL_S)
    report(f"{daemon} of {role} started")


def _node_lines(plan: LabPlan) -> Iterator[tuple[str, list[str]]]:
    if plan.fabric is FabricKind.EVPN_L2:
        client = plan.client_subnet
        yield "client", _evpn_lines("client", client.address, [client.router], said=_BY_MAC)
    for number, node in enumerate(plan.nodes, 1):
        subnet = plan.subnet(number)
        if plan.fabric is FabricKind.EVPN_L2:
            yield node.name, _evpn_lines(node.name, subnet.address, [subnet.router], said=_BY_MAC)
            continue
        if plan.fabric is FabricKind.EVPN:
            lines = _routed_evpn_lines(node.name, subnet.address, [subnet.router])
            yield node.name, [*lines, *_networks(_own_networks(plan, number))]
            continue
        yield (
            node.name,
            [
                *_head(node.name, subnet.address),
                *_neighbour(subnet.router),
                *_neighbour(subnet.router6),
                *_families([subnet.router], [subnet.router6], ""),
            ],
        )


def _router_lines(plan: LabPlan) -> list[str]:
    subnets = [plan.subnet(number) for number, _ in enumerate(plan.nodes, 1)]
    four = [subnet.address for subnet in subnets]
    six = [subnet.address6 for subnet in subnets]
    client = plan.client_subnet
    if plan.fabric is FabricKind.EVPN_L2:
        ends = [*four, client.address]
        return _evpn_lines("router", client.router, ends, "route-reflector-client")
    if plan.fabric is FabricKind.EVPN:
        networks = [
            (4, client.router, client.prefix_bits),
            (6, client.router6, client.prefix6_bits),
        ]
        return [
            f"zebra work-queue {ROUTER_HOLD_MS}",
            *_routed_evpn_lines("router", client.router, four, "route-reflector-client"),
            *_networks(networks),
        ]
    lines = _head("router", client.router)
    for address in (*four, *six):
        lines += _neighbour(address)
    return [*lines, *_families(four, six, "route-reflector-client")]


def _router_overlay(plan: LabPlan) -> Overlay:
    return Overlay(
        bridge=GUEST_BRIDGE,
        identifier=OVERLAY_IDENTIFIER,
        local=plan.subnet(1).router,
        remotes=(),
        mtu_bytes=OVERLAY_MTU_BYTES,
        evpn=True,
    )


def _own_networks(plan: LabPlan, number: int) -> list[tuple[int, str, int]]:
    """What a node announces for good: with the last route to it FRR would forget the way there,
    before it changes that route.
    """
    return [
        (4, f"10.74.{plan.index}.{number}", 32),
        (6, f"fd74:{plan.index:x}::{number:x}", 128),
    ]


def _ensure_own(networks: list[tuple[int, str, int]]) -> None:
    """On the loopback interface of the thread's namespace."""
    with IPRoute() as route:
        for _, address, bits in networks:
            route.addr("replace", index=1, address=address, prefixlen=bits)


def _routed_evpn_lines(
    name: str, identifier: str, neighbours: list[str], more: str = ""
) -> list[str]:
    lines = _evpn_lines(name, identifier, neighbours, more, said=_BY_ADDRESS)
    return [f"vni {OVERLAY_IDENTIFIER}", *lines]


def _evpn_lines(
    name: str, identifier: str, neighbours: list[str], more: str = "", said: Sequence[str] = ()
) -> list[str]:
    lines = _head(name, identifier)
    for address in neighbours:
        lines += _neighbour(address)
    lines.append(" address-family l2vpn evpn")
    for address in neighbours:
        lines.append(f"  neighbor {address} activate")
        if more:
            lines.append(f"  neighbor {address} {more}")
    return [*lines, *said, " exit-address-family"]


def _networks(networks: list[tuple[int, str, int]]) -> Iterator[str]:
    for version, address, bits in networks:
        yield f" address-family ipv{version} unicast"
        yield f"  network {ipaddress.ip_interface(f'{address}/{bits}').network}"
        yield " exit-address-family"


def _head(name: str, identifier: str) -> list[str]:
    return [
        "frr defaults datacenter",
        f"hostname {name}",
        "ip nht resolve-via-default",
        "ipv6 nht resolve-via-default",
        f"router bgp {SYSTEM}",
        f" bgp router-id {identifier}",
        " no bgp default ipv4-unicast",
        " bgp network import-check",
    ]


def _neighbour(address: str) -> list[str]:
    return [
        f" neighbor {address} remote-as {SYSTEM}",
        f" neighbor {address} timers connect 1",
        f" neighbor {address} advertisement-interval 0",
    ]


def _families(four: list[str], six: list[str], more: str) -> Iterator[str]:
    for family, addresses in (("ipv4", four), ("ipv6", six)):
        yield f" address-family {family} unicast"
        for address in addresses:
            yield f"  neighbor {address} activate"
            if more:
                yield f"  neighbor {address} {more}"
        yield " exit-address-family"
