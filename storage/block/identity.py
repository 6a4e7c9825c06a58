"""What names a block device on every node that sees it, by whichever path. Blocking: for a thread.

    multipath         the WWID of the disks below it, so that one node may have a single path
    LVM, other dm     the mapping's UUID, which comes from the metadata on the disks
    SCSI, NVMe        the WWID that the device itself tells
    a partition       its disk's, and its number

All others (loop devices, for one) have none.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

SYSFS: Final = Path("/sys")
_MULTIPATH: Final = "mpath-"


def device_identity(device: Path, sysfs: Path = SYSFS) -> str | None:
    """None: it has no name of that kind. OSError: there is no such device."""
    status = device.stat()
    if not stat.S_ISBLK(status.st_mode):
        return None
    major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
    return identity_in_sysfs((sysfs / "dev" / "block" / f"{major}:{minor}").resolve())


def identity_in_sysfs(node: Path) -> str | None:
    """Of the device whose folder in sysfs is `node`."""
    if (number := _text(node / "partition")) is not None:
        disk = identity_in_sysfs(node.parent)
        return None if disk is None else f"{disk} partition {number}"
    uuid = _text(node / "dm" / "uuid")
    if uuid is not None and not uuid.startswith(_MULTIPATH):
        return f"dm {uuid}"
    if uuid is not None:
        below = {identity_in_sysfs(path.resolve()) for path in _entries(node / "slaves")}
        return below.pop() if len(below) == 1 else None
    wwid = _text(node / "wwid") or _text(node / "device" / "wwid")
    return None if wwid is None else f"wwid {wwid}"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
