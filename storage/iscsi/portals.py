"""Whether portals answer this node: who makes the LUNs may be asked over another network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from typing import Final

from migrator.errors import words

ANSWER_S: Final = 2.0
_PORT: Final = 3260


async def trouble_of(portals: Collection[str]) -> str | None:
    """Those that take no connection, and why; None: all do."""
    found = await asyncio.gather(*(_trouble_of(each) for each in sorted(portals)))
    return "; ".join(filter(None, found)) or None


async def _trouble_of(portal: str) -> str:
    host, port = _address_of(portal)
    try:
        async with asyncio.timeout(ANSWER_S):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return f"portal {portal} doesn't answer this node within {ANSWER_S:g} s"
    except OSError as error:
        return f"portal {portal} can't be reached from this node: {words(error)}"
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return ""


def _address_of(portal: str) -> tuple[str, int]:
    """Of ADDRESS, ADDRESS:PORT or ADDRESS:PORT,GROUP, where an IPv6 address has brackets."""
    host, _, port = portal.partition(",")[0].rpartition(":")
    if host and port.isdecimal():
        return host.strip("[]"), int(port)
    return portal.partition(",")[0].strip("[]"), _PORT
