"""Where a benchmark happens: a lab's namespaces, and the domain as Ferry defines it.

Every engine moves the same guest between the same namespaces over the same shaped link.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import msgspec
from pyroute2 import IPRoute

from deploy import lab
from deploy.guest.build import GuestImage
from deploy.lab.cables import MGMT_INTERFACE
from deploy.lab.enter import enter
from deploy.lab.namespaces import netlink_socket
from deploy.lab.plan import GUEST_BRIDGE
from migrator.errors import FerryError
from migrator.model import DomainSpec, KernelBoot, NicSpec
from netfabric import taps
from tests.benchmarks.cases import MIB, UDP_PORT, Case
from tests.benchmarks.client import Observed

T = TypeVar("T")

ROOT: Final = Path(__file__).resolve().parents[2]
GUEST_NUMBER: Final = 10
MAC: Final = "52:54:00:be:0c:01"
DOMAIN: Final = "bench"
_CALL_TIMEOUT_S: Final = 20.0
_CLIENT_END_S: Final = 15.0
READY_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Flavour:
    """What a lab's agents are set to beyond its own settings. Each has a lab of its own."""

    streams: int = 1
    tls: bool = False


PLAIN: Final = Flavour()


@dataclass(frozen=True, slots=True)
class Site:
    """One lab, two of whose nodes the guest moves between."""

    lab_name: str
    image: GuestImage
    folder: Path
    """For logs and sockets; short."""
    binary: str = "qemu-system-x86_64"
    resources: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Ended with the benchmark, before the lab."""

    @property
    def plan(self) -> lab.LabPlan:
        return lab.load(self.lab_name).plan

    @property
    def guest_address(self) -> str:
        return self.plan.guest_address(GUEST_NUMBER)

    def spec(self, case: Case) -> DomainSpec:
        """The domain of a case, not yet pinned to a machine type."""
        plan = self.plan
        return DomainSpec(
            name=DOMAIN,
            memory_bytes=case.memory_mib * MIB,
            nics=(NicSpec(mac=MAC, bridge=GUEST_BRIDGE, addresses=(self.guest_address,)),),
            boot=KernelBoot(
                kernel=str(self.image.kernel),
                initrd=str(self.image.initrd),
                cmdline=case.command_line(
                    address=f"{self.guest_address}/24",
                    udp_target=f"{plan.client_guest_address}:{UDP_PORT}",
                ),
            ),
        )


class Sites:
    """The labs, one a flavour, made when they are first wanted and ended by `close`."""

    def __init__(self, image: GuestImage, folder: Path, *, node_memory_bytes: int) -> None:
        self.image, self._folder = image, folder
        self._node_memory_bytes = node_memory_bytes
        self._made: dict[Flavour, Site] = {}

    def of(self, flavour: Flavour, link_mbit: int) -> Site:
        """Its lab, with the link shaped so. FerryError if it can't be made."""
        site = self._made.get(flavour)
        if site is None:
            name = f"bench{len(self._made)}-{os.getpid()}"
            site = self._made[flavour] = Site(name, self.image, self._folder)
            lab.up(
                name,
                nodes=2,
                link_mbit=link_mbit,
                node_memory_bytes=self._node_memory_bytes,
                agent_command=_agent_command(flavour),
                tls=flavour.tls,
            )
        else:
            lab.up(site.lab_name, link_mbit=link_mbit)
        return site

    def close(self) -> None:
        """End what runs in the labs, then the labs."""
        for site in self._made.values():
            site.resources.close()
            lab.down(site.lab_name)
        self._made.clear()


def _agent_command(flavour: Flavour) -> list[str] | None:
    """None: a lab's usual one."""
    if flavour.streams == PLAIN.streams:
        return None
    script = str(Path(__file__).with_name("agent.py"))
    return [sys.executable, script, "--streams", str(flavour.streams)]


def in_namespace(namespace: str, work: Callable[[], T]) -> T:
    """Do `work` in a thread that has entered the namespace; what it starts is there too."""
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            enter(namespace)
            results.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name=f"in-{namespace}", daemon=True)
    thread.start()
    thread.join(_CALL_TIMEOUT_S)
    if failures:
        raise failures[0]
    if not results:
        raise TimeoutError(f"work in {namespace} took more than {_CALL_TIMEOUT_S:g} s")
    return results[0]


def open_tap(namespace: str, name: str) -> int:
    """A new tap on the node's bridge. Closing the descriptor removes it."""

    descriptor = in_namespace(namespace, lambda: taps.open_tap(name))
    with IPRoute(fileno=netlink_socket(namespace)) as route:
        index = {link.get_attr("IFLA_IFNAME"): link["index"] for link in route.get_links()}
        route.link("set", index=index[name], master=index[GUEST_BRIDGE])
        route.link("set", index=index[name], state="up")
    return descriptor


def sent_bytes(namespace: str, interface: str = MGMT_INTERFACE) -> int:
    """What the interface has sent so far, by the kernel's count."""
    text = in_namespace(namespace, Path("/proc/thread-self/net/dev").read_text)
    for line in text.splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == interface:
            return int(figures.split()[8])
    raise FerryError(f"{namespace} has no interface {interface}")


class Client:
    """The guest's user as a process of its own. `finish` ends it and says what it saw."""

    def __init__(self, site: Site, case: Case) -> None:
        load = case.load
        options = (
            *("--guest", site.guest_address, "--udp-port", str(UDP_PORT)),
            *("--download-bytes-per-s", str(load.download_bytes_per_s)),
            *("--players", str(load.players)),
            *("--player-packets-per-s", str(load.player_packets_per_s)),
            *(["--watch-work"] if case.watch_work else []),
        )
        command = [sys.executable, "-m", "tests.benchmarks.client", *options]
        self._process = subprocess.Popen(
            lab.command_in(site.lab_name, "client", command),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def wait_ready(self, timeout_s: float = READY_S) -> None:
        """Until the guest's packets arrive. Raises FerryError."""
        lines: list[bytes] = []

        def read() -> None:
            assert self._process.stdout is not None
            lines.append(self._process.stdout.readline())

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(timeout_s)
        if lines != [b"ready\n"]:
            raise FerryError(f"the guest's packets didn't arrive within {timeout_s:g} s")

    def finish(self) -> Observed:
        """Raises FerryError when it doesn't end."""
        try:
            output, _ = self._process.communicate(timeout=_CLIENT_END_S)
        except subprocess.TimeoutExpired as error:
            raise FerryError(f"the client doesn't end within {_CLIENT_END_S:g} s") from error
        return msgspec.json.decode(output, type=Observed)

    def close(self) -> None:
        """End it by force if it still runs. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(_CLIENT_END_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()


def spawn(
    namespace: str, command: Sequence[str], log: Path, fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a program in the namespace, without anything in between."""

    def start() -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=tuple(fds),
                start_new_session=True,
            )

    return in_namespace(namespace, start)
