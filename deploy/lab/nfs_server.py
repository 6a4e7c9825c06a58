"""An NFSv3 server in user space: rpcbind, which QEMU's client asks for ports, and nfs-ganesha.

Its commands and its configuration; who runs them, and in which network, is the caller's business.
Everything it writes is below its folder, and its /run is its own (`private`).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from deploy.lab import private

PORT: Final = 2049
PROGRAMS: Final = {"rpcbind": "rpcbind", "ganesha.nfsd": "nfs-ganesha-vfs"}
"""What must be installed, and Debian's package of it."""

_CONFIGURATION: Final = """\
NFS_CORE_PARAM {{
  NFS_Port = {port}; MNT_Port = 20048; Rquota_Port = 875; NLM_Port = 32803;
  Protocols = 3; Enable_NLM = false; Enable_RQUOTA = false;
}}
NFS_KRB5 {{ Active_krb5 = false; }}
NFSV4 {{ Graceless = true; RecoveryBackend = fs; RecoveryRoot = "{folder}/recovery"; }}
EXPORT {{
  Export_Id = 1; Path = "{export}"; Pseudo = "/ferry";
  Access_Type = RW; Squash = No_Root_Squash; SecType = sys; Protocols = 3; Transports = TCP;
  FSAL {{ Name = VFS; }}
}}
LOG {{ Default_Log_Level = EVENT; }}
"""


_SERVES: Final = "NFS SERVER INITIALIZED"
"""What ganesha logs once rpcbind knows its programs: some 2 ms after it listens."""


def export_path(folder: Path) -> Path:
    """What is exported, under its own path."""
    return folder / "export"


def log_path(folder: Path) -> Path:
    """ganesha's log. Remove it before each start: see `serves`."""
    return folder / "ganesha.log"


def serves(folder: Path) -> bool:
    """Whether the ganesha that this log is of can be mounted by now."""
    try:
        return _SERVES in log_path(folder).read_text(errors="replace")
    except FileNotFoundError:
        return False


def prepare(folder: Path) -> Mapping[str, list[str]]:
    """Make the folders and the configuration; the commands to run, by name, in this order."""
    for part in (export_path(folder), folder / "recovery", folder / "run"):
        part.mkdir(parents=True, exist_ok=True)
    configuration = folder / "ganesha.conf"
    configuration.write_text(
        _CONFIGURATION.format(port=PORT, folder=folder, export=export_path(folder))
    )
    wrapped = [sys.executable, "-I", "-S", str(Path(private.__file__).resolve()), f"{folder}/run"]
    ganesha = ["ganesha.nfsd", "-F", "-f", str(configuration)]
    return {
        "rpcbind": [*wrapped, _program("rpcbind"), "-f"],
        "nfs": [
            *wrapped,
            _program(ganesha[0]),
            *ganesha[1:],
            *("-L", str(log_path(folder)), "-p", f"{folder}/ganesha.pid"),
        ],
    }


def _program(name: str) -> str:
    return shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin") or name
