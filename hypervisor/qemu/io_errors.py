"""What QEMU says of a disk that failed -> a sentence for an operator. Pure.

The event BLOCK_IO_ERROR says the most: device, operation, reason. An agent that was restarted since
then has only `query-block`, which still knows which disk it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from migrator.model import DomainSpec

_DISK = re.compile(r"disk(\d+)")
_FULL = "its pool has no space left; the guest goes on by itself once there is some"


def describe_event(data: Mapping[str, object], spec: DomainSpec) -> str:
    """From the event's data: `write of disk 0 (fast/web) failed: Input/output error`."""
    node = str(data.get("node-name") or data.get("device") or "")
    operation, reason = data.get("operation", "access"), data.get("reason", "unknown")
    if data.get("nospace") is True:
        reason = _FULL
    return f"{operation} of {_named(node, spec)} failed: {reason}"


def describe_status(devices: object, spec: DomainSpec) -> str | None:
    """From the answer of `query-block`; None if every disk is well."""
    if not isinstance(devices, list):
        return None
    for device in devices:
        if not isinstance(device, Mapping) or device.get("io-status", "ok") == "ok":
            continue
        name = _named(str(device.get("qdev") or device.get("device") or ""), spec)
        full = device.get("io-status") == "nospace"
        return f"{name} failed{f': {_FULL}' if full else ''}"
    return None


def _named(node: str, spec: DomainSpec) -> str:
    """The disk's number and volume, where the name tells."""
    found = _DISK.search(node)
    if found is None or int(found[1]) >= len(spec.disks):
        return node or "a disk"
    disk = spec.disks[int(found[1])]
    return f"disk {found[1]} ({disk.pool}/{disk.volume})"
