"""Pages that come before a destination's QEMU is up, or even launched.

They are written to the memory file, which is made first and given to QEMU then. That is right as
long as QEMU touches none of its memory before it is given device state: 7.2 doesn't, with q35 and
pc. So it is looked at each time, when QEMU is up, by its own page tables: what others write to the
file doesn't show up in them. One that has touched a page fails that start, and is given none so
early again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial

from hypervisor.qemu.guest import Guest
from hypervisor.qemu.memory import create_memfd, open_arriving, region_of, touched
from hypervisor.qemu.offload import offload
from migrator.errors import HypervisorError
from migrator.model import DomainName, DomainSpec
from migrator.ports import MemoryRegion


class EarlyPages:
    """Of one driver, and so of one QEMU binary: whether that is possible, and what was made."""

    def __init__(self) -> None:
        self._possible = True
        self._lock = threading.Lock()
        self._made: dict[str, int] = {}
        """Memory files by domain, until its QEMU is up, has failed, or none will be started."""

    def make(self, spec: DomainSpec) -> bool:
        """A memory file for that domain. False: it would do harm. HypervisorError."""
        if not self._possible:
            return False
        self.drop(spec.name)
        try:
            made = create_memfd(spec)
        except OSError as error:
            raise HypervisorError(f"{spec.name}: its memory can't be made: {error}") from error
        with self._lock:
            self._made[spec.name] = made
        return True

    def of(self, name: str) -> Callable[[], int] | None:
        """Gives a new descriptor of the file that was made, to any thread; HypervisorError when it
        was dropped meanwhile. None: there is no such file.
        """
        return partial(self._duplicate, name) if name in self._made else None

    def _duplicate(self, name: str) -> int:
        with self._lock:
            made = self._made.get(name)
            if made is None:
                raise HypervisorError(f"{name}: the memory that was made for it is gone")
            return os.dup(made)

    async def regions(
        self, name: DomainName, guest_of: Callable[[DomainName], Guest]
    ) -> Sequence[MemoryRegion]:
        """Of what was made, or of the QEMU that has taken it. NotFoundError: there is neither."""
        if (duplicate := self.of(name)) is not None:
            return (region_of(duplicate()),)
        guest = guest_of(name)
        ram = await offload(
            lambda: open_arriving(guest.process, guest.record.ram_fd), undo=os.close
        )
        return (region_of(ram),)

    def drop(self, name: str) -> None:
        """Whoever has a descriptor of it keeps it. Idempotent."""
        with self._lock:
            made = self._made.pop(name, None)
        if made is not None:
            os.close(made)

    def close(self) -> None:
        """Drop all."""
        for name in list(self._made):
            self.drop(name)

    async def see_untouched(self, guest: Guest) -> None:
        """HypervisorError: pages that have come may be lost."""
        pid, ram_fd = guest.process.pid, guest.record.ram_fd
        if await offload(lambda: touched(pid, ram_fd)):
            self._possible = False
            raise HypervisorError(
                "QEMU touched its guest's memory at its start: pages that had come may be lost; "
                "the next start will wait with them"
            )
