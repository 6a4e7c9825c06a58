"""What a machine must have before a lab can be made, checked together, one sentence each.

The kernel's part is tried for real, in a nameless network namespace that ends with the socket in
it by which it is tried.
"""

from __future__ import annotations

import os
import shutil
from typing import Final

from pyroute2 import IPRoute, NetlinkError

from deploy.lab.namespaces import nameless_netlink_socket
from migrator.errors import RefusedError, words

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
    """Try every kind of interface and qdisc a lab uses, in a namespace of our own."""
    try:
        route = IPRoute(fileno=nameless_netlink_socket())
    except OSError as error:
        return [f"network namespaces don't work here: {words(error)}"]
    faults: list[str] = []
    with route:
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
