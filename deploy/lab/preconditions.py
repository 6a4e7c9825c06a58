"""What a machine must have before a lab can be made, checked together, one sentence each.

The kernel's part is tried for real, in a nameless network namespace that ends with the child
process that tries it: `python -m deploy.lab.preconditions`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from pyroute2 import IPRoute, NetlinkError

from deploy.lab.enter import CLONE_NEWNET
from migrator.errors import RefusedError

_PROBE_TIMEOUT_S: Final = 20.0
_PAGED_ENGINE_KERNEL: Final = (6, 7)
"""PAGEMAP_SCAN, which the page engine's dirty tracking stands on, came with Linux 6.7."""


def require_root() -> None:
    """Raises RefusedError with one sentence unless the caller is root."""
    if os.geteuid() != 0:
        message = "a lab needs root, for network namespaces and taps: run it with sudo"
        raise RefusedError(message, [message])


def check_machine(qemu_binary: str = "qemu-system-x86_64") -> None:
    """Raises RefusedError with everything that is missing. Changes nothing."""
    require_root()
    missing: list[str] = []
    if shutil.which(qemu_binary) is None:
        missing.append(f"{qemu_binary} is not installed: apt-get install qemu-system-x86")
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        missing.append(f"/dev/net/tun can't be opened ({error.strerror}): modprobe tun")
    missing += _kernel_faults()
    if missing:
        raise RefusedError("this machine can't hold a lab: " + "; ".join(missing), missing)


def remarks() -> list[str]:
    """What works less well on this machine, though a lab can be made."""
    release = os.uname().release
    version = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if version < _PAGED_ENGINE_KERNEL:
        return [
            f"Linux {release} is older than 6.7: the page engine can't track pages, so QEMU's "
            "own migration is used"
        ]
    return []


def _kernel_faults() -> list[str]:
    command = [sys.executable, "-m", "deploy.lab.preconditions"]
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return [f"the kernel's network features can't be tried out within {_PROBE_TIMEOUT_S:g} s"]
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [f"the kernel's network features can't be tried out: {last}"]
    return list(filter(None, done.stdout.splitlines()))


def _probe() -> list[str]:
    """Try every kind of interface and qdisc a lab uses, in a namespace of our own."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        return [f"network namespaces don't work here: {os.strerror(ctypes.get_errno())}"]
    faults: list[str] = []
    with IPRoute() as route:
        for kind, extra in (("bridge", {}), ("veth", {"peer": "probe-peer"})):
            try:
                route.link("add", ifname=f"probe-{kind}", kind=kind, **extra)
            except NetlinkError as error:
                faults.append(f"the kernel makes no {kind} interfaces ({error}): modprobe {kind}")
        try:
            route.tc("add", "tbf", index=1, rate=125_000, burst=65536, limit=65536)
        except NetlinkError as error:
            faults.append(f"the kernel has no tbf shaping ({error}): modprobe sch_tbf")
    return faults


if __name__ == "__main__":
    print("\n".join(_probe()))
