"""The first frame to a guest and the first from it, by its taps. Proof that it has arrived."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence

from migrator.errors import FabricError
from migrator.ports import FirstFrames
from netfabric import capture
from netfabric.threads import in_thread


class _Watch:
    def __init__(self, outgoing_to_guest: bool) -> None:
        self._outgoing_to_guest = outgoing_to_guest
        self.to_guest_at_s: float | None = None
        self.from_guest_at_s: float | None = None
        self.done = asyncio.Event()

    def take(self, ready: socket.socket) -> None:
        try:
            received = capture.receive(ready)
        except FabricError:  # The tap is gone.
            self.done.set()
            return
        if received is None:
            return
        _, outgoing, at_s = received
        if outgoing is self._outgoing_to_guest:
            self.to_guest_at_s = self.to_guest_at_s or at_s
        else:
            self.from_guest_at_s = self.from_guest_at_s or at_s
        if self.to_guest_at_s is not None and self.from_guest_at_s is not None:
            self.done.set()


async def watch_first_frames(
    interfaces: Sequence[str], timeout_s: float, *, outgoing_to_guest: bool = True
) -> FirstFrames:
    """From now on, until a frame went each way on any of them, or time is up. FabricError.

    `outgoing_to_guest`: what leaves by them goes to the guest, as with taps.
    """
    watch, loop = _Watch(outgoing_to_guest), asyncio.get_running_loop()
    sockets: list[socket.socket] = []
    try:
        for interface in interfaces:
            opened = capture.open_capture(interface)
            sockets.append(opened)
            loop.add_reader(opened, watch.take, opened)
        if sockets:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await watch.done.wait()
    finally:
        for opened in sockets:
            loop.remove_reader(opened)
        # Closing waits until no packet is under way to it: some ms.
        await asyncio.shield(asyncio.ensure_future(in_thread(lambda: _close(sockets))))
    return FirstFrames(to_guest_at_s=watch.to_guest_at_s, from_guest_at_s=watch.from_guest_at_s)


def _close(sockets: Sequence[socket.socket]) -> None:
    for opened in sockets:
        opened.close()
