"""What is known about a running process, on disk: so that the next agent adopts it.

    run/DOMAIN/state.json    written atomically, before the guest's vCPUs first run
    run/DOMAIN/end           "r" while QEMU runs, "e" when it ended by exit(): the shim writes both

A folder without a record is a launch that an agent's death cut short before that: the guest in it
has never run. All functions block on the disk; call them off the event loop.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

import msgspec

from hypervisor.qemu.process import ProcessIdentity, current_boot
from migrator import durable
from migrator.model import DomainSpec
from migrator.unknown_fields import decode

FORMAT = 1
END: Final = "end"


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One process. The descriptor numbers are recorded: another release may choose others."""

    format: int = FORMAT
    process: ProcessIdentity
    spec: DomainSpec
    token: int
    incoming: bool
    """Started as a destination."""
    has_run: bool = False
    """Its vCPUs have run at some time."""
    ram_fd: int
    uffd_fd: int


def write_record(directory: Path, record: ProcessRecord) -> None:
    """Replace the record, all or nothing. OSError leaves the old one."""
    encoded = msgspec.json.format(msgspec.json.encode(record), indent=2)
    durable.replace(directory / "state.json", encoded)


_decoder: Final = msgspec.json.Decoder(ProcessRecord)


def read_record(directory: Path) -> ProcessRecord | None:
    """The record in a domain's folder; None if there is none that this release can read."""
    try:
        return decode((directory / "state.json").read_bytes(), _decoder)
    except (OSError, msgspec.DecodeError):
        return None


def has_record(directory: Path) -> bool:
    """Whether there is one, readable or not. True also where that can't be said."""
    try:
        (directory / "state.json").lstat()
    except OSError as error:
        return not isinstance(error, FileNotFoundError)
    return True


def make_end(directory: Path) -> int:
    """A descriptor for the shim, which tells there how QEMU ends. It is the caller's to close."""
    return os.open(directory / END, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)


def expect_end(directory: Path) -> None:
    """From here on its end is wanted, whatever it is. Idempotent."""
    (directory / END).unlink(missing_ok=True)


def crashed(directory: Path, record: ProcessRecord) -> bool:
    """Whether its process, which is gone, has run the guest and ended unasked, in this boot.

    False also where that can't be known: a QEMU without the shim, or with an older one.
    """
    try:
        running = (directory / END).read_bytes() == b"r"
        return running and record.has_run and record.process.boot_id == current_boot()
    except OSError:
        return False


def list_directories(run_directory: Path) -> list[Path]:
    """The folders of domains that may have a process, in the order of their names."""
    return sorted(path for path in run_directory.iterdir() if path.is_dir())


def remove_directory(directory: Path) -> None:
    """Forget a process. Idempotent."""
    shutil.rmtree(directory, ignore_errors=True)
