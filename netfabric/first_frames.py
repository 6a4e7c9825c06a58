"""The first frame to a guest and the first from it, by its taps. Proof that it has arrived.

The sockets are opened before the guest is resumed, and read after it: the kernel stamps each
frame's time, so what a busy agent reads late isn't late. What came before the resume doesn't count.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence

from migrator.errors import FabricError
from migrator.model import DomainName
from migrator.ports import FirstFrames
from netfabric import capture
from netfabric.threads import in_thread

log = logging.getLogger(__name__)


class _Watch:
    def __init__(self, since_s: float, outgoing_to_guest: bool) -> None:
        self._since_s = since_s
        self._outgoing_to_guest = outgoing_to_guest
        self.to_guest_at_s: float | None = None
        self.from_guest_at_s: float | None = None
        self.done = asyncio.Event()

    def take(self, ready: socket.socket) -> None:
        try:
            for _, outgoing, at_s in capture.received(ready):
                if at_s < self._since_s:
                    continue
                if outgoing is self._outgoing_to_guest:
                    self.to_guest_at_s = self.to_guest_at_s or at_s
                else:
                    self.from_guest_at_s = self.from_guest_at_s or at_s
                if self.to_guest_at_s is not None and self.from_guest_at_s is not None:
                    self.done.set()
                    return
        except FabricError:  # The tap is gone.
            self.done.set()


class FirstFrameWatches:
    """Of the domains that are on their way here. Belongs to one event loop."""

    def __init__(self, *, outgoing_to_guest: bool = True) -> None:
        """`outgoing_to_guest`: what leaves by the interface goes to the guest: a tap's does."""
        self._outgoing_to_guest = outgoing_to_guest
        self._sockets: dict[DomainName, list[socket.socket]] = {}

    async def open(self, domain: DomainName, interfaces: Sequence[str]) -> None:
        """From now on. Nothing depends on it: what can't be watched is logged."""
        await self.discard(domain)
        if not interfaces:
            return
        sockets = self._sockets[domain] = []
        for interface in interfaces:
            try:
                sockets.append(capture.open_capture(interface))
            except FabricError as error:
                log.warning("the first frames by %s aren't seen: %s", interface, error)

    async def wait(
        self, domain: DomainName, interfaces: Sequence[str], since_s: float, timeout_s: float
    ) -> FirstFrames:
        """Until a frame went each way since then (wall clock, s), or time is up. FabricError.

        Where nothing was opened, from now on.
        """
        if domain not in self._sockets:
            self._sockets[domain] = [capture.open_capture(each) for each in interfaces]
        sockets = self._sockets.pop(domain)
        watch, loop = _Watch(since_s, self._outgoing_to_guest), asyncio.get_running_loop()
        try:
            for opened in sockets:
                loop.add_reader(opened, watch.take, opened)
            if sockets:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout_s):
                        await watch.done.wait()
        finally:
            for opened in sockets:
                loop.remove_reader(opened)
            await asyncio.shield(asyncio.ensure_future(_closed(sockets)))
        return FirstFrames(to_guest_at_s=watch.to_guest_at_s, from_guest_at_s=watch.from_guest_at_s)

    async def discard(self, domain: DomainName) -> None:
        """Of a domain that doesn't come after all, or was waited for. Idempotent."""
        sockets = self._sockets.pop(domain, None)
        if sockets:
            await _closed(sockets)

    async def close(self) -> None:
        """Idempotent."""
        for domain in list(self._sockets):
            await self.discard(domain)


async def _closed(sockets: Sequence[socket.socket]) -> None:
    """Closing waits until no packet is under way to it: some ms."""

    def close() -> None:
        for opened in sockets:
            opened.close()

    await in_thread(close)
