"""A domain's launch -> QEMU's argument vector. Pure: no file is looked at, nothing is spawned.

Rules that both ends of a migration depend on:
- every device has a fixed PCI address that follows from the spec alone, so that the source and
  the destination build the same machine in the same order;
- the machine type is a versioned one;
- a disk's format is explicit (probing is a security hole), its cache is bypassed (two hosts share
  the volume), and its errors stop the guest (a lost server is a wait, not a broken filesystem);
- a process always starts paused (`-S`): the driver records it before its vCPUs first run.

The process inherits descriptors at fixed numbers (see the constants); the agent finds the ones
that it needs again by these numbers after its own restart.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import msgspec

from hypervisor.machine_types import FAMILIES, family
from hypervisor.qemu.block_nodes import block_nodes
from hypervisor.qemu.config import MONITORS
from migrator.errors import HypervisorError
from migrator.model import BlockSource, DomainSpec, KernelBoot, NicSpec
from migrator.ports import Launch

RAM_FD = 100
"""The guest's memory (a memfd) in QEMU's descriptor table."""
MONITOR_FD = 101
"""The first monitor's listening socket; the others follow."""
TAP_FD = 110
"""The first NIC's tap; the others follow."""
UFFD_FD = 200
"""Where the preloaded shim parks the userfaultfd."""
END_FD = 201
"""Where it tells how QEMU ended (`records.END`)."""

RNG_SLOT = 2
NIC_SLOTS = range(0x03, 0x0B)
DISK_SLOTS = range(0x0B, 0x1F)
"""PCI slots. 0 is the host bridge, 1 the PIIX (pc), 0x1f the ICH9 (q35)."""

MEMORY_GRANULE_BYTES = 1024 * 1024
_UUID_NAMESPACE = uuid.UUID("5b0c9e0e-6a58-4dcb-9c52-0d1a6f3f6e11")


class QemuLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """A launch with the host's choices made."""

    launch: Launch
    binary: str
    accelerator: str
    """`kvm` or `tcg`."""
    console_log: Path
    incoming: bool
    host_devices: frozenset[str] = frozenset()
    """Those disk paths that are block devices on this host."""


def build_command(request: QemuLaunch) -> list[str]:
    """The argument vector, the binary first. HypervisorError if the spec doesn't fit a machine."""
    launch, spec = request.launch, request.launch.spec
    _validate(launch)
    alias = family(spec.machine)
    bus = "pcie.0" if alias == "q35" else "pci.0"
    arguments = [
        request.binary,
        *("-name", f"guest={spec.name},debug-threads=on"),
        *("-uuid", str(uuid.uuid5(_UUID_NAMESPACE, spec.name))),
        *("-no-user-config", "-nodefaults", "-display", "none"),
        *("-msg", "timestamp=on"),
        *("-sandbox", _SANDBOX),
        *("-accel", request.accelerator),
        *("-machine", f"{spec.machine},{_MACHINE_OPTIONS}"),
        *("-cpu", spec.cpu_model),
        *("-smp", f"cpus={spec.vcpus},sockets=1,cores={spec.vcpus},threads=1"),
        *("-m", f"size={spec.memory_bytes // 1024}k"),
        *("-object", _json(_memory(spec))),
        *("-rtc", "base=utc"),
        *("-action", "panic=pause"),
        *("-boot", "menu=off,strict=on"),
        *_no_sleep_states(alias),
        *_monitors(),
        *_console(request.console_log),
        *("-device", _json({"driver": "pvpanic"})),
        *_random(bus),
    ]
    for index, nic in enumerate(spec.nics):
        arguments += _nic(index, nic, bus, request.accelerator)
    for index, source in enumerate(launch.disks):
        arguments += _disk(index, source, bus, request.host_devices)
    arguments += _boot(spec)
    arguments.append("-S")
    if request.incoming:
        arguments += ("-incoming", "defer")
    return arguments


_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""Seccomp: a broken-out guest can't spawn programs. The same set that libvirt uses."""

_MACHINE_OPTIONS = (
    "memory-backend=ram0,graphics=off,vmport=off,dump-guest-core=off,suppress-vmdesc=on"
)
"""graphics=off sends the firmware's messages to the serial console; suppress-vmdesc=on leaves a
description for debuggers, a fifth of it, out of the device state, which is sent in a blackout."""


def _validate(launch: Launch) -> None:
    spec = launch.spec
    problems = []
    if family(spec.machine) is None or spec.machine in FAMILIES:
        problems.append(f"machine {spec.machine!r} is not a versioned q35 or pc type")
    if spec.memory_bytes % MEMORY_GRANULE_BYTES:
        problems.append(f"memory_bytes is not a multiple of {MEMORY_GRANULE_BYTES}")
    if len(spec.disks) > len(DISK_SLOTS):
        problems.append(f"more than {len(DISK_SLOTS)} disks")
    if len(spec.nics) > len(NIC_SLOTS):
        problems.append(f"more than {len(NIC_SLOTS)} network interfaces")
    if len(launch.disks) != len(spec.disks):
        problems.append(f"{len(spec.disks)} disks but {len(launch.disks)} opened volumes")
    if len(launch.tap_fds) != len(spec.nics):
        problems.append(f"{len(spec.nics)} NICs but {len(launch.tap_fds)} taps")
    if problems:
        raise HypervisorError(f"domain {spec.name} can't be launched: {'; '.join(problems)}")


def _json(value: dict[str, object]) -> str:
    """QEMU's JSON form of an option: no quoting rules, a path may hold any character."""
    return json.dumps(value, separators=(",", ":"))


def _escape(value: str) -> str:
    """A value in QEMU's key=value form, where a comma is doubled."""
    return value.replace(",", ",,")


def _memory(spec: DomainSpec) -> dict[str, object]:
    return {
        "qom-type": "memory-backend-file",
        "id": "ram0",
        "size": spec.memory_bytes,
        "mem-path": f"/proc/self/fd/{RAM_FD}",
        "share": True,
        "prealloc": False,
    }


def _no_sleep_states(alias: str | None) -> list[str]:
    """No ACPI S3 and S4: a sleeping guest has no vCPU to notice a migration or a power button."""
    device = "ICH9-LPC" if alias == "q35" else "PIIX4_PM"
    return ["-global", f"{device}.disable_s3=1", "-global", f"{device}.disable_s4=1"]


def _monitors() -> list[str]:
    arguments: list[str] = []
    for index in range(MONITORS):
        name = f"monitor{index}"
        arguments += (
            *("-chardev", f"socket,id={name},fd={MONITOR_FD + index},server=on,wait=off"),
            *("-mon", f"chardev={name},mode=control"),
        )
    return arguments


def _console(path: Path) -> list[str]:
    """Appends, so that the driver may truncate the file under QEMU to keep it bounded."""
    return [
        *("-chardev", f"file,id=console0,path={_escape(str(path))},append=on"),
        *("-serial", "chardev:console0"),
    ]


def _random(bus: str) -> list[str]:
    backend: dict[str, object] = {
        "qom-type": "rng-random",
        "id": "rng0",
        "filename": "/dev/urandom",
    }
    device: dict[str, object] = {
        "driver": "virtio-rng-pci",
        "rng": "rng0",
        "id": "virtio-rng0",
        "bus": bus,
        "addr": f"{RNG_SLOT:#x}",
    }
    return ["-object", _json(backend), "-device", _json(device)]


def _nic(index: int, nic: NicSpec, bus: str, accelerator: str) -> list[str]:
    """vhost follows the accelerator on both ends alike: it changes the features a guest sees."""
    vhost = "on" if accelerator == "kvm" else "off"
    device: dict[str, object] = {
        "driver": "virtio-net-pci",
        "netdev": f"net{index}",
        "id": f"virtio-net{index}",
        "mac": nic.mac,
        "bus": bus,
        "addr": f"{NIC_SLOTS[index]:#x}",
        "romfile": "",
    }
    if nic.mtu_bytes != 1500:
        device["host_mtu"] = nic.mtu_bytes
    return [
        *("-netdev", f"tap,id=net{index},fd={TAP_FD + index},vhost={vhost}"),
        *("-device", _json(device)),
    ]


def _disk(index: int, source: BlockSource, bus: str, host_devices: frozenset[str]) -> list[str]:
    device: dict[str, object] = {
        "driver": "virtio-blk-pci",
        "id": f"virtio-disk{index}",
        "drive": f"disk{index}",
        "bus": bus,
        "addr": f"{DISK_SLOTS[index]:#x}",
        "bootindex": index + 1,
        "werror": "stop",
        "rerror": "stop",
    }
    return [*block_nodes(f"disk{index}", source, host_devices), "-device", _json(device)]


def _boot(spec: DomainSpec) -> list[str]:
    if not isinstance(spec.boot, KernelBoot):
        return []
    arguments = ["-kernel", spec.boot.kernel]
    if spec.boot.initrd is not None:
        arguments += ("-initrd", spec.boot.initrd)
    if spec.boot.cmdline:
        arguments += ("-append", spec.boot.cmdline)
    return arguments
