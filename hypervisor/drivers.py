"""Every hypervisor driver by the name that the configuration uses. Literal: nothing is scanned."""

from __future__ import annotations

from hypervisor.qemu.driver import QemuDriver
from hypervisor.simulated.driver import SimulatedHypervisor
from migrator.ports import HypervisorDriver

DRIVERS: dict[str, type[HypervisorDriver]] = {
    "qemu": QemuDriver,
    "simulated": SimulatedHypervisor,
}
