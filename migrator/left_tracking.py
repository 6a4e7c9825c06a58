"""Ends the write tracking that an engine has left, as it was killed, perhaps with its agent.

Until then each first write to a page of the guest is slower. By the agent's own hand, in a thread:
it takes some milliseconds, 60 where 2 GiB are in use.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from migrator.engine import kernel
from migrator.engine.dirty_log import LogClaim
from migrator.errors import FerryError, NotFoundError
from migrator.model import DomainName
from migrator.own_threads import in_own_thread
from migrator.ports import GuestMemory

log = logging.getLogger(__name__)
OpenMemory = Callable[[DomainName], Awaitable[GuestMemory]]

_CLEAR_S: Final = 15.0
"""An engine that is ending may have the dirty log for some of them (`LogClaim`)."""


async def clear_tracking(open_memory: OpenMemory, domain: DomainName) -> None:
    """Returns after _CLEAR_S at the latest. Where it can't be done the log says so, and the next
    migration, sampling or agent does it. A guest that is gone has none.
    """
    try:
        async with asyncio.timeout(_CLEAR_S):
            await _clear_in_thread(await open_memory(domain))
    except (NotFoundError, ProcessLookupError):
        pass
    except (FerryError, OSError) as error:  # TimeoutError is among them.
        reason = str(error) or f"it took longer than {_CLEAR_S:g} s"
        log.warning("the write tracking of %s isn't ended: %s", domain, reason)


async def _clear_in_thread(memory: GuestMemory) -> None:
    """The thread has the memory as long as it takes, whoever waits for it."""
    try:
        clearing = in_own_thread("write tracking", lambda: _clear(memory))
    except OSError:
        memory.close()
        raise
    clearing.add_done_callback(lambda _: memory.close())
    await asyncio.shield(clearing)


def _clear(memory: GuestMemory) -> None:
    """Nothing else is touched: missing pages that somebody waits for would read as zeros."""
    scanner = kernel.PagemapScanner(memory.pagemap_fd)
    mappings = [each for region in memory.regions for each in region.mappings]
    tracked = [each for each in mappings if scanner.is_tracked(each.address)]
    if not tracked:
        return
    claim = LogClaim(memory.regions[0].fd)
    claim.take()
    try:
        for mapping in tracked:
            kernel.uffd_unregister(memory.uffd, mapping.address, mapping.length_bytes)
    finally:
        claim.give_back()
