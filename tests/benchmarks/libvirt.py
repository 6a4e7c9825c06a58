"""libvirt's `virsh migrate --live --p2p`: what most users have today.

Two libvirtd side by side, each in a node's network namespace and in mount and UTS namespaces of its
own, so that each has its own name, folders and /dev (without kvm). They are started for the first
run, and ended with the benchmark. Debian: libvirt-daemon-system, libvirt-clients.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
import uuid
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape, quoteattr

from deploy.lab.plan import GUEST_BRIDGE, NodePlan
from migrator.errors import FerryError
from migrator.model import DomainSpec, KernelBoot
from tests.benchmarks import newer_qemu
from tests.benchmarks.cases import Case
from tests.benchmarks.results import Run
from tests.benchmarks.site import DOMAIN, Site, spawn

_READY_S: Final = 30.0
_VIRSH_S: Final = 30.0
_END_S: Final = 10.0
_PRIVATE: Final = {
    "etc": "/etc/libvirt",
    "lib": "/var/lib/libvirt",
    "run": "/run/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
}
_LIBVIRTD: Final = "/usr/sbin/libvirtd"

_SCRIPT: Final = """
set -eu
hostname {name}
mkdir -p {folder}/dev
mount -t tmpfs -o mode=755 tmpfs {folder}/dev
for node in null zero full random urandom tty ptmx; do cp -a /dev/$node {folder}/dev/; done
mkdir {folder}/dev/net {folder}/dev/pts {folder}/dev/shm
cp -a /dev/net/tun {folder}/dev/net/
mount --bind /dev/pts {folder}/dev/pts
mount --bind /dev/shm {folder}/dev/shm
ln -s /proc/self/fd {folder}/dev/fd
mount --move {folder}/dev /dev
{binds}
mount --bind {folder}/hosts /etc/hosts
exec {libvirtd} --listen -p /run/libvirt/libvirtd.pid
"""

_LIBVIRTD_CONF: Final = """listen_tcp = 1
listen_tls = 0
auth_tcp = "none"
auth_unix_rw = "none"
host_uuid = "{uuid}"
"""

_QEMU_CONF: Final = """security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
"""


def missing() -> str | None:
    """Why libvirt can't be measured here; None: it can."""
    absent = [name for name in (_LIBVIRTD, "virsh", "unshare") if shutil.which(name) is None]
    if not absent:
        return None
    return f"{', '.join(absent)} not found: install libvirt-daemon-system and libvirt-clients"


class _Daemon:
    """One node's libvirtd."""

    def __init__(self, site: Site, node: NodePlan) -> None:
        self.folder = site.folder / f"v{node.name}"
        self.socket = self.folder / "run" / "libvirt-sock"
        for name in _PRIVATE:
            (self.folder / name).mkdir(parents=True)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {node.name}\n")
        text = _LIBVIRTD_CONF.format(uuid=uuid.uuid4())
        (self.folder / "etc" / "libvirtd.conf").write_text(text)
        (self.folder / "etc" / "qemu.conf").write_text(_QEMU_CONF)
        (self.folder / "etc" / "qemu").mkdir()
        binds = "\n".join(
            f"mkdir -p {path}; mount --bind {self.folder / name} {path}"
            for name, path in _PRIVATE.items()
        )
        emulator = shutil.which(site.binary)
        modules = newer_qemu.modules_to_bind(Path(emulator)) if emulator else None
        if modules is not None:
            binds += f"\nmount --bind {modules[0]} {modules[1]}"
        script = _SCRIPT.format(name=node.name, folder=self.folder, binds=binds, libvirtd=_LIBVIRTD)
        unshare = ["unshare", "--mount", "--uts", "--propagation", "private"]
        self._process = spawn(
            node.namespace, [*unshare, "sh", "-c", script], site.folder / f"{node.name}-virt.log"
        )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + _READY_S
        while True:
            with contextlib.suppress(FerryError):
                self.virsh("capabilities")
                return
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise FerryError("libvirtd doesn't answer")
            time.sleep(0.2)

    def virsh(self, *words: str, timeout_s: float = _VIRSH_S) -> str:
        """The output. Raises FerryError with what virsh says."""
        uri = f"qemu+unix:///system?socket={self.socket}"
        try:
            done = subprocess.run(
                ["virsh", "-c", uri, *words],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise FerryError(f"virsh {words[0]}: not done within {timeout_s:g} s") from None
        if done.returncode:
            raise FerryError(f"virsh {words[0]}: {done.stderr.strip()}")
        return done.stdout

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_END_S)


class LibvirtEngine:
    """Starts guests under libvirt. The daemons live as long as the site."""

    def __init__(self) -> None:
        self._daemons: dict[str, tuple[_Daemon, _Daemon]] = {}

    def start(self, site: Site, case: Case, spec: DomainSpec) -> LibvirtGuest:
        reason = missing()
        if reason is not None:
            raise FerryError(reason)
        if site.lab_name not in self._daemons:
            pair = []
            for name in ("n1", "n2"):
                daemon = _Daemon(site, site.plan.node(name))
                site.resources.callback(daemon.close)
                pair.append(daemon)
            for daemon in pair:
                daemon.wait_ready()
            self._daemons[site.lab_name] = (pair[0], pair[1])
        return LibvirtGuest(site, case, spec, *self._daemons[site.lab_name])


class LibvirtGuest:
    """A transient domain on n1."""

    def __init__(
        self, site: Site, case: Case, spec: DomainSpec, source: _Daemon, destination: _Daemon
    ) -> None:
        self._site, self._case = site, case
        self._source, self._destination = source, destination
        definition = site.folder / "domain.xml"
        definition.write_text(domain_xml(spec, site.binary))
        source.virsh("create", str(definition))

    def close(self) -> None:
        for daemon in (self._source, self._destination):
            with contextlib.suppress(FerryError):
                daemon.virsh("destroy", DOMAIN)

    def migrate(self) -> Run:
        """One migration, by the command that users give."""
        address = self._site.plan.node("n2").mgmt_address
        words = ["migrate", "--live", "--p2p", "--unsafe"]
        if self._case.cap_bytes_per_s:
            words += ["--bandwidth", str(self._case.cap_bytes_per_s // 2**20)]
        uris = [f"qemu+tcp://{address}/system", f"tcp://{address}"]
        asked_at_s = time.time()
        try:
            self._source.virsh(*words, DOMAIN, *uris, timeout_s=self._case.timeout_s)
            total_s = time.time() - asked_at_s
            job = self._destination.virsh("domjobinfo", DOMAIN, "--completed")
        except FerryError as error:
            return Run(completed=False, error=str(error))
        downtime_ms = _figure(job, "Total downtime")
        return Run(
            completed=True,
            blackout_ms=downtime_ms,
            total_s=total_s,
            bytes_sent=int(_figure(job, "Data processed") or 0),
            timeline=(("as libvirt reports it", downtime_ms or 0.0),),
        )


_UNITS: Final = {"ms": 1.0, "B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}


def _figure(job: str, name: str) -> float | None:
    found = re.search(rf"^{name}:\s+([0-9.]+)\s+(\S+)", job, re.MULTILINE)
    return None if found is None else float(found[1]) * _UNITS[found[2]]


def domain_xml(spec: DomainSpec, binary: str) -> str:
    """The domain as libvirt has it: the same kernel, memory and NIC."""
    boot = spec.boot
    assert isinstance(boot, KernelBoot)
    emulator = shutil.which(binary) or binary
    interfaces = "".join(
        f"<interface type='bridge'><source bridge={quoteattr(GUEST_BRIDGE)}/>"
        f"<mac address={quoteattr(nic.mac)}/><model type='virtio'/></interface>"
        for nic in spec.nics
    )
    return f"""<domain type='qemu'>
  <name>{escape(spec.name)}</name>
  <memory unit='b'>{spec.memory_bytes}</memory>
  <vcpu>{spec.vcpus}</vcpu>
  <os>
    <type arch='x86_64' machine={quoteattr(spec.machine)}>hvm</type>
    <kernel>{escape(boot.kernel)}</kernel>
    <initrd>{escape(boot.initrd or "")}</initrd>
    <cmdline>{escape(boot.cmdline)}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>
  <devices>
    <emulator>{escape(str(Path(emulator)))}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {interfaces}
    <serial type='null'/>
  </devices>
</domain>
"""
