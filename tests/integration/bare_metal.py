"""Guests of a few bytes: boot sectors that do one thing, so that no test waits for a system.

SeaBIOS loads the first sector of the first disk to 0x7c00 and jumps there, in real mode.
"""

from __future__ import annotations

from pathlib import Path

SECTOR_BYTES = 512
COUNTER_OFFSET = 0x2000
"""Where COUNT counts, in the guest's memory."""

# The Q35's ACPI registers, where SeaBIOS puts them: PM1_STS at 0x600, PM1_EN at 0x602, PM1_CNT at
# 0x604. Without its bit in PM1_EN the button's press isn't latched.
_POWER_OFF = bytes.fromhex(
    "ba0406"  # mov dx, 0x604
    "b80020"  # mov ax, SLP_EN
    "ef"  # out dx, ax
    "f4ebfd"  # hlt; jmp to the hlt
)

POWER_OFF = _POWER_OFF
"""Powers itself off at once."""

HEED_BUTTON = (
    bytes.fromhex(
        "ba0206"  # mov dx, 0x602
        "b80001"  # mov ax, PWRBTN_EN
        "ef"  # out dx, ax
        "ba0006"  # mov dx, 0x600
        "ed"  # in ax, dx
        "f6c401"  # test ah, PWRBTN_STS
        "74fa"  # jz to the in
    )
    + _POWER_OFF
)
"""Powers itself off when the power button is pressed."""

PANIC = bytes.fromhex(
    "ba0505"  # mov dx, 0x505: pvpanic
    "b001"  # mov al, PVPANIC_PANICKED
    "ee"  # out dx, al
    "f4ebfd"  # hlt; jmp to the hlt
)
"""Reports a panic."""

COUNT = bytes.fromhex(
    "31c08ed8"  # xor ax, ax; mov ds, ax
    "66ff060020"  # inc dword [0x2000]
    "ebf9"  # jmp to the inc
)
"""Counts at COUNTER_OFFSET for as long as its vCPU runs."""


def is_beyond(count: int, before: int) -> bool:
    """Whether COUNT has gone on since. It has 32 bits, through which a fast core is in seconds."""
    return 0 < (count - before) % 2**32 < 2**31


def write_disk(path: Path, program: bytes, *, capacity_bytes: int = 1024**2) -> None:
    """A raw disk that boots `program`."""
    sector = program.ljust(SECTOR_BYTES - 2, b"\0") + b"\x55\xaa"
    with path.open("wb") as disk:
        disk.write(sector)
        disk.truncate(capacity_bytes)
