"""A QEMU in a switchover goes before what else wants the cores: its guest stands still.

    hurry      source: just before the guest is stopped; destination: at its start, where it waits
    calm_soon  when the guest has run for `CATCH_UP_S`: what came for it meanwhile is dealt with
    calm       when it is ended: giving its memory back takes longer than a blackout

One that is started for a guest which runs elsewhere is the first to be killed where memory runs out
(`migrator.shortage`), until it is `loaded`.

What an earlier agent may have left urgent, or to be killed first, is calmed when it is seen to run.
"""

from __future__ import annotations

import asyncio
from typing import Final

from hypervisor.qemu.offload import offload
from migrator import cores, shortage

CATCH_UP_S: Final = 0.2


class Urgency:
    """Of one QEMU. Where the kernel refuses, blackouts may be longer; nothing else."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.possible = True
        """It may be urgent: it is, or an earlier agent left it so."""
        self._hurries = 0

    async def hurry(self) -> None:
        self.possible = True
        self._hurries += 1
        await offload(lambda: cores.set_niceness(self._pid, cores.URGENT))

    async def loaded(self) -> None:
        """It may be its guest's only copy from here on."""
        await offload(lambda: shortage.set_adjustment(self._pid, shortage.ours()))

    async def calm(self) -> None:
        """As any other. Idempotent."""
        if self.possible:
            self.possible = False
            await offload(lambda: cores.set_niceness(self._pid, cores.usual()))
            await self.loaded()

    async def calm_soon(self) -> None:
        """When it has caught up, unless it is to stand still again by then."""
        hurries = self._hurries
        await asyncio.sleep(CATCH_UP_S)
        if hurries == self._hurries:
            await self.calm()
