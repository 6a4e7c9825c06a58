"""Builds the guest image: Debian's cloud kernel, and an initrd with busybox and the workload.

    python -m deploy.guest.build [--cache DIRECTORY]

prints KERNEL= and INITRD=, for `eval` in a shell. The image is built once and kept in the cache
($FERRY_CACHE, or /var/cache/ferry):

    kernel-VERSION-HASH/       vmlinuz and the modules, from the kernel's package
    elf-kernel-VERSION-HASH/   vmlinux, taken out of vmlinuz: guests have nothing to unpack
    guest-HASH/                initrd.cpio.gz; the hash is of all that went into it

A folder appears whole or not at all, so builders may run at the same time.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.guest.cpio import (
    CpioEntry,
    character_device,
    directory,
    file,
    symlink,
    write_newc,
)
from deploy.guest.kernel import (
    GUESTS_KERNEL,
    GuestBuildError,
    UnpackedKernel,
    fetch_kernel,
    publish,
    resolve_kernel,
    run_tool,
)

_WORKLOAD: Final = Path(__file__).parent / "workload"
_COMPILER: Final = (
    "gcc",
    "-O2",
    "-static",
    "-pthread",
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-s",
)
_APPLETS: Final = (
    "cat",
    "dmesg",
    "free",
    "insmod",
    "ip",
    "ls",
    "mount",
    "ping",
    "poweroff",
    "ps",
    "sh",
    "top",
)
_FOLDERS: Final = ("bin", "dev", "lib", "lib/modules", "proc", "sys", "tmp")
_COMPILE_TIMEOUT_S: Final = 120.0
_IMAGE_FORMAT: Final = "1"
"""Grows when this file changes what it writes for the same inputs."""


@dataclass(frozen=True, slots=True)
class GuestImage:
    """What a hypervisor boots directly. Both files stay where they are; treat them as read-only."""

    kernel: Path
    initrd: Path


def default_cache_directory() -> Path:
    """$FERRY_CACHE, or /var/cache/ferry (which needs root)."""
    return Path(os.environ.get("FERRY_CACHE") or "/var/cache/ferry")


def ready_cache(cache_directory: Path) -> Path:
    """The cache, made if need be. GuestBuildError: it can't be."""
    cache_directory = cache_directory.absolute()
    try:
        cache_directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GuestBuildError(
            f"the cache {cache_directory} can't be made ({error.strerror}): set FERRY_CACHE"
        ) from error
    return cache_directory


def build_guest(cache_directory: Path) -> GuestImage:
    """The guest image, from the cache where its inputs have not changed.

    Takes under a second when cached, some ten seconds and a download of 27 MB when not. Raises
    GuestBuildError, which says in a sentence what to install; the cache is then as it was.
    """
    cache_directory = ready_cache(cache_directory)
    package = resolve_kernel(GUESTS_KERNEL)
    busybox = read_busybox()
    sources = sorted(path for path in _WORKLOAD.iterdir() if path.suffix in {".c", ".h", ".sh"})
    digest = hashlib.sha256()
    for part in (
        _IMAGE_FORMAT.encode(),
        package.cache_name.encode(),
        busybox,
        " ".join((*_COMPILER, *_APPLETS, *_FOLDERS)).encode(),
        *(path.name.encode() + b"\0" + path.read_bytes() for path in sources),
    ):
        digest.update(len(part).to_bytes(8, "little") + part)
    final = cache_directory / f"guest-{digest.hexdigest()[:16]}"
    kernel = fetch_kernel(package, cache_directory)
    if not final.is_dir():
        with tempfile.TemporaryDirectory(dir=cache_directory, prefix=".guest-") as work:
            _write_initrd(Path(work), final, kernel, busybox, sources)
    return GuestImage(kernel=kernel.image, initrd=final / "initrd.cpio.gz")


def read_busybox() -> bytes:
    """The static one, which needs nothing beside it. GuestBuildError: there is none."""
    found = shutil.which("busybox")
    if found is None:
        raise GuestBuildError("`busybox` is missing: install the package busybox-static")
    data = Path(found).read_bytes()
    if b"ld-linux" in data[:4096]:
        raise GuestBuildError(f"{found} is not static: install the package busybox-static")
    return data


def _write_initrd(
    work: Path, final: Path, kernel: UnpackedKernel, busybox: bytes, sources: Sequence[Path]
) -> None:
    program = work / "workload"
    run_tool(
        [
            *_COMPILER,
            "-o",
            str(program),
            *(str(path) for path in sources if path.suffix == ".c"),
        ],
        package="gcc",
        timeout_s=_COMPILE_TIMEOUT_S,
    )
    archive = write_newc(
        initrd_entries(
            init=(_WORKLOAD / "init.sh").read_bytes(),
            workload=program.read_bytes(),
            busybox=busybox,
            modules=kernel.modules(),
        )
    )
    result = work / "result"
    result.mkdir()
    (result / "initrd.cpio.gz").write_bytes(gzip.compress(archive, mtime=0))
    publish(result, final)


def initrd_entries(
    *, init: bytes, workload: bytes, busybox: bytes, modules: Sequence[tuple[str, bytes]]
) -> list[CpioEntry]:
    """The guest's root file system. `modules` are file names and contents, in loading order."""
    order = "".join(f"{name}\n" for name, _ in modules)
    return [
        *(directory(path) for path in _FOLDERS),
        character_device("dev/console", 5, 1),
        file("init", init, executable=True),
        file("bin/workload", workload, executable=True),
        file("bin/busybox", busybox, executable=True),
        *(symlink(f"bin/{applet}", "busybox") for applet in _APPLETS),
        file("lib/modules/order", order.encode()),
        *(file(f"lib/modules/{name}", data) for name, data in modules),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the guest image, or find it in the cache.")
    parser.add_argument(
        "--cache", type=Path, default=default_cache_directory(), metavar="DIRECTORY"
    )
    cache: Path = parser.parse_args().cache
    try:
        image = build_guest(cache)
    except GuestBuildError as error:
        print(f"can't build the guest: {error}", file=sys.stderr)
        return 1
    print(f"KERNEL={shlex.quote(str(image.kernel))}\nINITRD={shlex.quote(str(image.initrd))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
