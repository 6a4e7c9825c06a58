"""A volume that a target or a hook makes: gone again if what follows comes to nothing.

A call that is cancelled doesn't end what was asked for there. So its making goes to its end first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from migrator.errors import FerryError

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def made(
    making: Coroutine[Any, Any, object], delete: Callable[[], Awaitable[object]], what: str
) -> AsyncIterator[None]:
    """The body fills what `making` has made; where either fails, or is cancelled, `delete` is for
    what was made. Where that fails, too, `what` ("pool p: LUN v") is said to be left.
    """
    under_way = asyncio.ensure_future(making)
    try:
        await asyncio.shield(under_way)
        yield
    except BaseException:
        await to_its_end(_unmake(under_way, delete, what))
        raise


async def _unmake(
    making: asyncio.Future[object], delete: Callable[[], Awaitable[object]], what: str
) -> None:
    await asyncio.wait({making})
    if making.cancelled() or making.exception() is not None:
        return
    try:
        await delete()
    except FerryError as error:
        log.error("%s is left half made: %s", what, error)


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Clean-up that a second cancellation doesn't cut short."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)
