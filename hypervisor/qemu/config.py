"""What an operator can set about the QEMU driver, and the paths that follow from it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Literal

import msgspec

from migrator.errors import HypervisorError

Accelerator = Literal["auto", "kvm", "tcg"]

MONITORS = 2
"""QEMU serves one client a monitor. The second is the way in when a hung agent holds the first."""


class QemuConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The driver's settings. Everything that it writes is under `state_directory`:

    run/DOMAIN/state.json, m0, m1   the running process's record and monitor sockets; gone with it
    logs/DOMAIN.console.log         the guest's serial console, appended across restarts
    logs/DOMAIN.qemu.log            QEMU's own messages, appended across restarts
    lock                            held while a driver has the directory open
    """

    state_directory: Path
    binary: str = "qemu-system-x86_64"
    accelerator: Accelerator = "auto"

    @property
    def run_directory(self) -> Path:
        return self.state_directory / "run"

    @property
    def log_directory(self) -> Path:
        return self.state_directory / "logs"

    @property
    def lock_path(self) -> Path:
        return self.state_directory / "lock"

    def domain_directory(self, domain: str) -> Path:
        return self.run_directory / domain

    def console_log(self, domain: str) -> Path:
        return self.log_directory / f"{domain}.console.log"

    def qemu_log(self, domain: str) -> Path:
        return self.log_directory / f"{domain}.qemu.log"


def monitor_path(directory: Path, index: int) -> Path:
    """The unix socket of a domain's monitor `index` (0 to MONITORS - 1)."""
    return directory / f"m{index}"


def prepare_directories(config: QemuConfig) -> int:
    """Make the folders and take the lock; returns the lock's descriptor."""
    try:
        for directory in (config.state_directory, config.run_directory, config.log_directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(config.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HypervisorError(f"can't use {config.state_directory}: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise HypervisorError(
            f"another agent uses {config.state_directory}; nothing was touched"
        ) from error
    return lock
