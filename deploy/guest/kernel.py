"""One of Debian's kernels, and those of its modules that a guest needs.

The package is downloaded and unpacked, never installed: the host's own boot is not touched. What
the guest needs of it stays in the cache, so that a changed workload needs no download.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.guest.unpacked import unpacked
from migrator.errors import FerryError

_ORDER_FILE: Final = "order"
_IMAGE_FILE: Final = "vmlinuz"
_ELF_FILE: Final = "vmlinux"
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_QUERY_TIMEOUT_S: Final = 60.0
_DOWNLOAD_TIMEOUT_S: Final = 300.0


class GuestBuildError(FerryError):
    """The guest image can't be made; the message says what is missing. The cache is unchanged."""

    code = "guest_build"


@dataclass(frozen=True, slots=True)
class WantedKernel:
    """What is asked for: the newest kernel of a flavour."""

    meta_package: str
    modules: tuple[str, ...]
    """The names of those that are needed, without what they need themselves."""


GUESTS_KERNEL: Final = WantedKernel(
    "linux-image-cloud-amd64",
    (
        "virtio_pci",
        "virtio_net",
        "virtio_blk",
        "evdev",  # the power button's events
        "button",  # the power button
        "pvpanic_pci",  # tells the hypervisor of a panic, where it offers the device
    ),
)


@dataclass(frozen=True, slots=True)
class KernelPackage:
    """A kernel as the package manager offers it, and which of its modules are needed."""

    name: str
    version: str
    modules: tuple[str, ...]

    @property
    def cache_name(self) -> str:
        """The name of its folder in the cache."""
        digest = hashlib.sha256(" ".join((self.name, *self.modules)).encode()).hexdigest()
        return f"kernel-{re.sub(r'[^A-Za-z0-9.+-]', '_', self.version)}-{digest[:12]}"


@dataclass(frozen=True, slots=True)
class UnpackedKernel:
    """What the cache holds of a kernel."""

    directory: Path
    elf_directory: Path

    @property
    def image(self) -> Path:
        """What a hypervisor boots: ELF where that could be had (see `unpacked`)."""
        elf = self.elf_directory / _ELF_FILE
        return elf if elf.is_file() else self.directory / _IMAGE_FILE

    def modules(self) -> Sequence[tuple[str, bytes]]:
        """File names and contents, in an order in which they can be loaded."""
        order = (self.directory / _ORDER_FILE).read_text().split()
        return [(name, (self.directory / name).read_bytes()) for name in order]


def resolve_kernel(wanted: WantedKernel) -> KernelPackage:
    """Which kernel package the flavour's newest is. Asks the local package lists only."""
    depends = run_tool(
        ["apt-cache", "depends", wanted.meta_package], package="apt", timeout_s=_QUERY_TIMEOUT_S
    )
    name = parse_depends(depends, wanted.meta_package)
    policy = run_tool(["apt-cache", "policy", name], package="apt", timeout_s=_QUERY_TIMEOUT_S)
    return KernelPackage(name, parse_policy(policy), wanted.modules)


def parse_depends(output: str, meta_package: str) -> str:
    """The kernel's package in the output of `apt-cache depends`."""
    flavour = re.escape(meta_package.removeprefix("linux-image"))
    match = re.search(rf"^\s*Depends: (linux-image-\d\S*{flavour})\s*$", output, re.MULTILINE)
    if match is None:
        raise GuestBuildError(
            f"the package lists don't know {meta_package}: run `apt-get update` (Debian, amd64)"
        )
    return match.group(1)


def parse_policy(output: str) -> str:
    """The version to download, in the output of `apt-cache policy`."""
    match = re.search(r"^\s*Candidate: (\S+)\s*$", output, re.MULTILINE)
    if match is None or match.group(1) == "(none)":
        raise GuestBuildError("no kernel version is on offer: run `apt-get update`")
    return match.group(1)


def fetch_kernel(package: KernelPackage, cache_directory: Path) -> UnpackedKernel:
    """The kernel from the cache, or else downloaded into it."""
    final = cache_directory / package.cache_name
    if not final.is_dir():
        with tempfile.TemporaryDirectory(dir=cache_directory, prefix=".kernel-") as work:
            _download_and_unpack(package, Path(work))
    kernel = UnpackedKernel(final, cache_directory / f"elf-{package.cache_name}")
    if not kernel.elf_directory.is_dir():
        with tempfile.TemporaryDirectory(dir=cache_directory, prefix=".elf-") as work:
            _write_elf(kernel, Path(work) / "result")
    return kernel


def _write_elf(kernel: UnpackedKernel, result: Path) -> None:
    """A folder without a file says that there is no such image, so that nobody looks again."""
    result.mkdir()
    elf = unpacked(kernel.image.read_bytes())
    if elf is not None:
        (result / _ELF_FILE).write_bytes(elf)
    publish(result, kernel.elf_directory)


def publish(temporary: Path, final: Path) -> None:
    """Puts a finished folder in its place in one step; whoever was faster is left alone."""
    temporary.chmod(0o755)
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise


def _download_and_unpack(package: KernelPackage, work: Path) -> None:
    run_tool(
        # The sandbox user couldn't write into a folder of root's.
        [
            "apt-get",
            "download",
            "-qq",
            "-o",
            "APT::Sandbox::User=root",
            f"{package.name}={package.version}",
        ],
        package="apt",
        timeout_s=_DOWNLOAD_TIMEOUT_S,
        directory=work,
    )
    archive = next(work.glob("*.deb"), None)
    if archive is None:
        raise GuestBuildError(f"apt-get downloaded nothing for {package.name}={package.version}")
    root = work / "root"
    run_tool(
        ["dpkg-deb", "-x", str(archive), str(root)], package="dpkg", timeout_s=_DOWNLOAD_TIMEOUT_S
    )
    result = work / "result"
    result.mkdir()
    shutil.copyfile(_only(root / "boot", "vmlinuz-*"), result / _IMAGE_FILE)
    files = {
        module_name(path): path for path in (root / "lib/modules").rglob("*.ko*") if path.is_file()
    }
    names = load_order(package.modules, files)
    for name in names:
        (result / f"{name}.ko").write_bytes(read_module(files[name]))
    (result / _ORDER_FILE).write_text("".join(f"{name}.ko\n" for name in names))
    publish(result, work.parent / package.cache_name)


def _only(directory: Path, pattern: str) -> Path:
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        raise GuestBuildError(f"the kernel package has {len(found)} files {pattern}, expected one")
    return found[0]


def module_name(path: Path) -> str:
    """A module's name as the kernel spells it: without endings, underscores for hyphens."""
    return path.name.split(".ko")[0].replace("-", "_")


def read_module(path: Path) -> bytes:
    """A module's bytes, decompressed (Debian 13 compresses them)."""
    data = path.read_bytes()
    if path.suffix == ".ko":
        return data
    if path.suffix == ".xz":
        return lzma.decompress(data)
    raise GuestBuildError(f"module {path.name} is compressed in a way that isn't supported")


def module_depends(data: bytes) -> tuple[str, ...]:
    """Names of the modules that must be loaded before this one (its `.modinfo`)."""
    match = _DEPENDS.search(data)
    if match is None or not match.group(1):
        return ()
    return tuple(name.replace("-", "_") for name in match.group(1).decode().split(","))


def load_order(wanted: Sequence[str], files: Mapping[str, Path]) -> tuple[str, ...]:
    """The wanted modules and all that they need, each after its own needs.

    A wanted module without a file is built into this kernel and left out; a needed one without
    a file can't be, since only modules are named as needs: GuestBuildError.
    """
    order: dict[str, None] = {}

    def visit(name: str, needed_by: tuple[str, ...]) -> None:
        if name in order:
            return
        if name not in files or name in needed_by:
            raise GuestBuildError(f"the kernel's {needed_by[-1]} needs {name}, which can't be had")
        for needed in module_depends(read_module(files[name])):
            visit(needed, (*needed_by, name))
        order[name] = None

    for name in wanted:
        if name in files:
            visit(name, ())
    return tuple(order)


def run_tool(
    command: Sequence[str], *, package: str, timeout_s: float, directory: Path | None = None
) -> str:
    """Runs a tool and returns what it printed. GuestBuildError names `package` if it is missing."""
    if shutil.which(command[0]) is None:
        raise GuestBuildError(f"`{command[0]}` is missing: install the package {package}")
    try:
        finished = subprocess.run(
            command,
            cwd=directory,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise GuestBuildError(f"`{command[0]}` didn't end within {timeout_s:.0f} s") from error
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines() or ["no message"]
        raise GuestBuildError(
            f"`{' '.join(command[:2])}` failed with status {finished.returncode}: {lines[0]}"
        )
    return finished.stdout
