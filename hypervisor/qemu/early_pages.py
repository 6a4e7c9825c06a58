"""Pages that come while a destination's QEMU still starts.

They are written to the memory file, which is there before QEMU is. That is right as long as QEMU
touches none of its memory before it is given device state: 7.2 doesn't, with q35 and pc. So it is
looked at each time, when QEMU is up, by its own page tables: what others write to the file doesn't
show up in them. One that has touched a page fails that start, and is given none so early again.
"""

from __future__ import annotations

from hypervisor.qemu.guest import Guest
from hypervisor.qemu.memory import touched
from hypervisor.qemu.offload import offload
from migrator.errors import HypervisorError


class EarlyPages:
    """Of one driver, and so of one QEMU binary."""

    def __init__(self) -> None:
        self.possible = True

    async def see_untouched(self, guest: Guest) -> None:
        """HypervisorError: pages that have come may be lost."""
        pid, ram_fd = guest.process.pid, guest.record.ram_fd
        if await offload(lambda: touched(pid, ram_fd)):
            self.possible = False
            raise HypervisorError(
                "QEMU touched its guest's memory at its start: pages that had come may be lost; "
                "the next start will wait with them"
            )
