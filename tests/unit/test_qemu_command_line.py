"""A launch -> QEMU's argument vector, by tables."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from hypervisor.qemu.command_line import MONITOR_FD, RAM_FD, TAP_FD, QemuLaunch, build_command
from migrator.errors import HypervisorError
from migrator.model import (
    Boot,
    DiskBoot,
    DiskFormat,
    DiskSpec,
    DomainSpec,
    FencingToken,
    FileSource,
    KernelBoot,
    NicSpec,
)
from migrator.ports import Launch

MIB = 1024**2


def launch(
    *,
    machine: str = "pc-q35-7.2",
    disks: tuple[FileSource, ...] = (),
    nics: tuple[NicSpec, ...] = (),
    boot: Boot | None = None,
    memory_bytes: int = 64 * MIB,
    taps: int | None = None,
) -> Launch:
    spec = DomainSpec(
        name="vm-1",
        memory_bytes=memory_bytes,
        vcpus=2,
        machine=machine,
        disks=tuple(DiskSpec(volume=f"d{index}") for index in range(len(disks))),
        nics=nics,
        boot=boot or DiskBoot(),
    )
    count = len(nics) if taps is None else taps
    return Launch(
        spec=spec, disks=disks, tap_fds=tuple(range(50, 50 + count)), token=FencingToken(1)
    )


def command(
    request: Launch,
    *,
    incoming: bool = False,
    accelerator: str = "tcg",
    host_devices: frozenset[str] = frozenset(),
    console: str = "/var/log/vm-1.log",
) -> list[str]:
    return build_command(
        QemuLaunch(
            launch=request,
            binary="/usr/bin/qemu-system-x86_64",
            accelerator=accelerator,
            console_log=Path(console),
            incoming=incoming,
            host_devices=host_devices,
        )
    )


def values(arguments: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(arguments) if name == option]


def objects(arguments: list[str], option: str) -> dict[str, dict[str, Any]]:
    """The JSON values of an option, by their id, node name or driver."""
    found = [json.loads(value) for value in values(arguments, option)]
    return {each.get("id") or each.get("node-name") or each["driver"]: each for each in found}


def raw(path: str, *, read_only: bool = False) -> FileSource:
    return FileSource(path=path, format=DiskFormat.RAW, read_only=read_only)


NIC = NicSpec(mac="52:54:00:00:00:01", bridge="br0")


@pytest.mark.parametrize(
    ("machine", "bus", "sleep_device"),
    [("pc-q35-7.2", "pcie.0", "ICH9-LPC"), ("pc-i440fx-7.2", "pci.0", "PIIX4_PM")],
)
def test_the_machine(machine: str, bus: str, sleep_device: str) -> None:
    arguments = command(launch(machine=machine, disks=(raw("/a"),), nics=(NIC,)))
    assert arguments[0] == "/usr/bin/qemu-system-x86_64"
    (chosen,) = values(arguments, "-machine")
    assert chosen.startswith(f"{machine},memory-backend=ram0,")
    assert values(arguments, "-accel") == ["tcg"]
    assert values(arguments, "-smp") == ["cpus=2,sockets=1,cores=2,threads=1"]
    assert values(arguments, "-m") == ["size=65536k"]
    assert {"-nodefaults", "-no-user-config", "-S"} <= set(arguments)
    assert f"{sleep_device}.disable_s3=1" in values(arguments, "-global")
    devices = objects(arguments, "-device")
    assert {name: device.get("bus") for name, device in devices.items()} == {
        "pvpanic": None,
        "virtio-rng0": bus,
        "virtio-net0": bus,
        "virtio-disk0": bus,
    }


def test_the_memory_is_the_inherited_memfd() -> None:
    memory = objects(command(launch()), "-object")["ram0"]
    assert memory["qom-type"] == "memory-backend-file"
    assert memory["mem-path"] == f"/proc/self/fd/{RAM_FD}"
    assert memory["share"] is True
    assert memory["size"] == 64 * MIB


def test_every_device_has_an_address_of_its_own_that_the_spec_alone_decides() -> None:
    nics = tuple(NicSpec(mac=f"52:54:00:00:00:0{index}", bridge="br0") for index in range(8))
    disks = tuple(raw(f"/d{index}") for index in range(20))
    devices = objects(command(launch(disks=disks, nics=nics)), "-device")
    addresses = [int(device["addr"], 16) for device in devices.values() if "addr" in device]
    assert len(addresses) == len(set(addresses)) == 29
    assert set(addresses) <= set(range(2, 31))
    fewer = objects(command(launch(disks=disks[:1], nics=nics[:1])), "-device")
    assert fewer["virtio-disk0"]["addr"] == devices["virtio-disk0"]["addr"]
    assert fewer["virtio-net0"]["addr"] == devices["virtio-net0"]["addr"]


def test_disks() -> None:
    path = "/pool/a,b.raw"
    arguments = command(
        launch(
            disks=(
                raw(path),
                FileSource(path="/pool/c.qcow2", format=DiskFormat.QCOW2),
                raw("/dev/vg/d", read_only=True),
            )
        ),
        host_devices=frozenset({"/dev/vg/d"}),
    )
    nodes, devices = objects(arguments, "-blockdev"), objects(arguments, "-device")
    assert [nodes[f"disk{index}"]["driver"] for index in range(3)] == ["raw", "qcow2", "raw"]
    assert [nodes[f"disk{index}-file"]["driver"] for index in range(3)] == [
        "file",
        "file",
        "host_device",
    ]
    assert nodes["disk0-file"]["filename"] == path
    assert nodes["disk2"]["read-only"] is True
    assert nodes["disk2-file"]["read-only"] is True
    for index in range(3):
        assert nodes[f"disk{index}"]["cache"]["direct"] is True
        assert nodes[f"disk{index}-file"]["cache"]["direct"] is True
        device = devices[f"virtio-disk{index}"]
        assert (device["werror"], device["rerror"]) == ("stop", "stop")
        assert device["bootindex"] == index + 1


@pytest.mark.parametrize(("accelerator", "vhost"), [("tcg", "off"), ("kvm", "on")])
def test_nics(accelerator: str, vhost: str) -> None:
    jumbo = NicSpec(mac="52:54:00:00:00:02", bridge="br0", mtu_bytes=9000)
    arguments = command(launch(nics=(NIC, jumbo)), accelerator=accelerator)
    assert values(arguments, "-netdev") == [
        f"tap,id=net0,fd={TAP_FD},vhost={vhost}",
        f"tap,id=net1,fd={TAP_FD + 1},vhost={vhost}",
    ]
    devices = objects(arguments, "-device")
    assert devices["virtio-net0"]["mac"] == NIC.mac
    assert "host_mtu" not in devices["virtio-net0"]
    assert devices["virtio-net1"]["host_mtu"] == 9000


@pytest.mark.parametrize(
    ("boot", "expected"),
    [
        (DiskBoot(), []),
        (KernelBoot(kernel="/k"), ["-kernel", "/k"]),
        (
            KernelBoot(kernel="/k", initrd="/i", cmdline="console=ttyS0 a,b"),
            ["-kernel", "/k", "-initrd", "/i", "-append", "console=ttyS0 a,b"],
        ),
    ],
)
def test_boot(boot: Boot, expected: list[str]) -> None:
    arguments = command(launch(boot=boot))
    start = arguments.index("-kernel") if expected else arguments.index("-S")
    assert arguments[start:] == [*expected, "-S"]


def test_a_destination_waits_for_device_state() -> None:
    assert command(launch(), incoming=True)[-3:] == ["-S", "-incoming", "defer"]
    assert "-incoming" not in command(launch())


def test_monitors_and_console() -> None:
    chardevs = values(command(launch(), console="/log/a,b.log"), "-chardev")
    assert chardevs == [
        f"socket,id=monitor0,fd={MONITOR_FD},server=on,wait=off",
        f"socket,id=monitor1,fd={MONITOR_FD + 1},server=on,wait=off",
        "file,id=console0,path=/log/a,,b.log,append=on",
    ]


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (launch(machine="q35"), "not a versioned"),
        (launch(machine="microvm"), "not a versioned"),
        (launch(memory_bytes=64 * MIB + 4096), "multiple"),
        (launch(disks=tuple(raw(f"/{index}") for index in range(21))), "more than 20 disks"),
        (launch(nics=(NIC,) * 9), "more than 8 network"),
        (launch(nics=(NIC,), taps=0), "0 taps"),
    ],
)
def test_what_does_not_fit_is_refused(request_: Launch, problem: str) -> None:
    with pytest.raises(HypervisorError, match=problem):
        command(request_)
