"""An emulated machine with a kernel of Debian's, and the host's files to read: for one command.

    this machine                               emulated, without a network card
    /            ──── 9p, read-only ────►      / (what is written there stays in memory)
    output file  ◄─── second serial line ────  what the command prints
    status file  ◄─── third serial line ─────  how it ended
    console file ◄─── first serial line ─────  what the kernel says

For what the kernel at hand can't do: Debian's has VLAN filtering on bridges, connection tracking on
them, VRFs. It is emulated (TCG), so that it is the same wherever there is a QEMU.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.guest.build import default_cache_directory, read_busybox, ready_cache
from deploy.guest.cpio import character_device, directory, file, write_newc
from deploy.guest.kernel import UnpackedKernel, WantedKernel, fetch_kernel, resolve_kernel

KERNEL: Final = WantedKernel(
    "linux-image-amd64",
    (
        "crc32c_generic",  # libcrc32c asks for it by what it does, not by its name.
        *("virtio_pci", "9p", "9pnet_virtio", "overlay"),
        *("bridge", "br_netfilter", "8021q", "veth", "tun", "macvtap", "vxlan", "vrf", "sch_tbf"),
        *("nf_tables", "nft_ct", "nft_limit", "nft_fwd_netdev", "nft_dup_netdev"),
        *("nf_conntrack_bridge", "nf_conntrack_netlink", "nft_meta_bridge", "nft_reject_inet"),
    ),
)
_INIT: Final = Path(__file__).with_name("init.sh")
_FOLDERS: Final = ("bin", "dev", "host", "memory", "modules", "proc", "root", "sys")
_MEMORY: Final = "1024M"
_CONSOLE_LINES: Final = 60
_ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
}


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of the command. `status` None: it had no end, and `console` may say why."""

    status: int | None
    output: str
    console: str
    took_s: float


def prepare() -> UnpackedKernel:
    """The kernel, from the cache or the package mirror. GuestBuildError says what is missing."""
    return fetch_kernel(resolve_kernel(KERNEL), ready_cache(default_cache_directory()))


def run(
    kernel: UnpackedKernel,
    command: Sequence[str],
    folder: Path,
    limit_s: float,
    *,
    environment: Mapping[str, str],
) -> Ended:
    """Run it there in that folder. Nothing is left, however it ends."""
    with tempfile.TemporaryDirectory(prefix="ferry-machine-") as made:
        work = Path(made)
        script = _script(command, folder, environment)
        (work / "initrd").write_bytes(_initrd(kernel, script))
        lines = [work / name for name in ("console", "output", "status")]
        began_s = time.monotonic()
        said = _ran(_qemu(kernel, work / "initrd", lines), limit_s)
        took_s = time.monotonic() - began_s
        console, output, status = (_text(line) for line in lines)
    word = status.split()
    return Ended(
        status=int(word[1]) if len(word) == 2 else None,
        output=output,
        console=said + "\n".join(console.splitlines()[-_CONSOLE_LINES:]),
        took_s=took_s,
    )


def _ran(command: Sequence[str], limit_s: float) -> str:
    """What QEMU itself said."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as machine:
        try:
            return machine.communicate(timeout=limit_s)[0]
        except subprocess.TimeoutExpired:
            return f"it was ended after {limit_s:.0f} s\n"
        finally:
            machine.kill()


def _script(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    return "\n".join(
        [
            *(
                f"export {name}={shlex.quote(value)}"
                for name, value in {**_ENVIRONMENT, **environment}.items()
            ),
            f"cd {shlex.quote(str(folder))} && exec {shlex.join(command)}",
        ]
    )


def _initrd(kernel: UnpackedKernel, script: str) -> bytes:
    modules = kernel.modules()
    order = "".join(f"{name}\n" for name, _ in modules)
    return write_newc(
        [
            *(directory(path) for path in _FOLDERS),
            character_device("dev/console", 5, 1),
            file("init", _INIT.read_bytes(), executable=True),
            file("bin/busybox", read_busybox(), executable=True),
            file("command", script.encode()),
            file("modules/order", order.encode()),
            *(file(f"modules/{name}", data) for name, data in modules),
        ]
    )


def _qemu(kernel: UnpackedKernel, initrd: Path, lines: Sequence[Path]) -> list[str]:
    return [
        "qemu-system-x86_64",
        # One processor: two emulated ones spend most of their time waiting for each other.
        *("-machine", "pc,accel=tcg", "-cpu", "max", "-smp", "1", "-m", _MEMORY),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-kernel", str(kernel.image), "-initrd", str(initrd)),
        *("-append", "console=ttyS0 quiet panic=-1 mitigations=off init_on_alloc=0 noreplace-smp"),
        *(word for line in lines for word in ("-serial", f"file:{line}")),
        *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
    ]


def _text(path: Path) -> str:
    return path.read_text(errors="replace").replace("\r\n", "\n") if path.exists() else ""
