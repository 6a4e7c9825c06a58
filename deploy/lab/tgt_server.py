"""An iSCSI target in user space: tgtd. What it knows is lost with it, and made again at its start.

Its command and its pool; who runs it, and in which network, is the caller's business. Everything
that it writes is below its folder.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Final

from storage.iscsi.restore import restore
from storage.settings import IscsiSettings

PORT: Final = 3260
PROGRAMS: Final = {"tgtd": "tgt"}
"""What must be installed, and Debian's package of it."""
_CONTROL_NUMBER: Final = 1


def pool(folder: Path, address: str) -> IscsiSettings:
    """The pool of its volumes."""
    return IscsiSettings(
        name="iscsi",
        portal=f"{address}:{PORT}",
        tgt_folder=str(folder / "volumes"),
        tgt_socket=f"{folder}/tgt.{_CONTROL_NUMBER}",
        chap_user="ferry",
        chap_secret_file=str(folder / "chap"),
    )


def prepare(folder: Path, address: str) -> list[str]:
    """Make the folder and a secret; the command to run."""
    (folder / "volumes").mkdir(parents=True, exist_ok=True)
    chap = folder / "chap"
    if not chap.exists():
        descriptor = os.open(chap, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(16))
    program = shutil.which("tgtd", path="/usr/sbin:/sbin:/usr/bin:/bin") or "tgtd"
    return [
        *("env", f"TGT_IPC_SOCKET={folder}/tgt"),
        *(program, "-f", "-C", str(_CONTROL_NUMBER), "--iscsi", f"portal={address}:{PORT}"),
    ]


def make_targets(folder: Path, address: str) -> None:
    """Give a tgtd that was just started every target that there was. FerryError."""
    restore(pool(folder, address))
