"""A newer Debian's QEMU in a folder of its own: `make bench QEMU=trixie`.

    CACHE/qemu-SUITE/           a minimal Debian with QEMU, by debootstrap; some 500 MB, made once
    CACHE/qemu-SUITE/bin/       what is put first in PATH: qemu-system-x86_64

The binary is told (by patchelf, of the same folder) to take its loader and libraries from there,
so that it runs on this host as it is: no chroot, no wrapper. A wrapper would break the preloaded
shim, which acts in QEMU alone. Its modules are looked for where the host's QEMU has its own; one
that finds those ends (`modules_to_bind`). Nothing loads any but who asks for all that it can do.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

from migrator.errors import FerryError

BINARY: Final = "qemu-system-x86_64"
MIRROR: Final = "http://deb.debian.org/debian"
MIRROR_VARIABLE: Final = "FERRY_DEBIAN_MIRROR"
BOOTSTRAP_S: Final = 1200.0
_STEP_S: Final = 60.0
_READY: Final = ".ready"
_LOADER: Final = "lib64/ld-linux-x86-64.so.2"
_MODULES: Final = "usr/lib/x86_64-linux-gnu/qemu"
_LIBRARIES: Final = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
_SUITE: Final = re.compile(r"[a-z]{2,20}")


class NewerQemuError(FerryError):
    """That QEMU can't be had here; the message says why. The cache is as it was."""

    code = "newer_qemu"


def install(suite: str, cache_directory: Path) -> Path:
    """The folder to put first in PATH. Takes a minute and a download of 150 MB if it isn't cached.

    Needs root. NewerQemuError.
    """
    if not _SUITE.fullmatch(suite):
        raise NewerQemuError(f"QEMU={suite}: a Debian suite is wanted, like trixie")
    root = cache_directory / f"qemu-{suite}"
    if not (root / _READY).exists():
        if shutil.which("debootstrap") is None:
            raise NewerQemuError(f"QEMU={suite} takes debootstrap: apt-get install debootstrap")
        shutil.rmtree(root, ignore_errors=True)
        cache_directory.mkdir(parents=True, exist_ok=True)
        try:
            _bootstrap(suite, root)
            _relocate(root)
            version(root / "bin")
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)
            raise
        (root / _READY).touch()
    return root / "bin"


def version(folder: Path) -> str:
    """As the binary itself says. NewerQemuError if it doesn't run."""
    return _run([str(folder / BINARY), "--version"], _STEP_S).splitlines()[0]


def modules_to_bind(binary: Path) -> tuple[Path, Path] | None:
    """The folder of the binary's own modules, and where it looks for them. None: it is there."""
    root = binary.resolve().parent.parent.parent
    usual = Path("/", _MODULES)
    if not (root / _READY).exists() or not usual.is_dir():
        return None
    return root / _MODULES, usual


def _bootstrap(suite: str, root: Path) -> None:
    mirror = os.environ.get(MIRROR_VARIABLE, MIRROR)
    packages = "qemu-system-x86,patchelf"
    # In a mount namespace of its own: what it mounts in the folder never outlives it.
    command = ["unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={packages}"]
    _run([*command, suite, str(root), mirror], BOOTSTRAP_S)


def _relocate(root: Path) -> None:
    libraries = ":".join(str(root / each) for each in _LIBRARIES)
    patch = ["chroot", str(root), "patchelf", "--set-interpreter", str(root / _LOADER)]
    _run([*patch, "--force-rpath", "--set-rpath", libraries, f"/usr/bin/{BINARY}"], _STEP_S)
    (root / "bin").unlink(missing_ok=True)  # A link to usr/bin, of which we want one program.
    (root / "bin").mkdir()
    (root / "bin" / BINARY).symlink_to(root / "usr" / "bin" / BINARY)


def _run(command: list[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NewerQemuError(f"{command[0]}: {error}") from error
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-5:])
        raise NewerQemuError(f"{command[0]} ended with status {done.returncode}: {tail}")
    return done.stdout
