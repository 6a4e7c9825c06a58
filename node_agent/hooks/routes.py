"""Host routes by webhook: somebody else's controller is told where guests' addresses are.

    POST URL, signed as a hook's delivery is (`webhook`)
      {"action": "lead", "addresses": ["10.0.0.5"], "node": "n2", "hops": ["192.0.2.2"], ...}

`action` is `prepare` (they will be there soon), `lead` (they are there now) or `withdraw`. An
answer of 2xx to `lead` says that every router leads there. The old node asks `where` they are
before it forwards no more: {"node": "n2"} is the answer.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from typing import ClassVar, Final, Literal

import aiohttp
import msgspec

from migrator.errors import FabricError
from migrator.ports import RouteDriver
from node_agent.hooks.webhook import post, why

LIMIT_S: Final = 3.0
"""For one call, repetitions included."""
GAP_S: Final = 0.05

_Action = Literal["prepare", "lead", "withdraw", "where"]

log = logging.getLogger(__name__)


class RouteCall(msgspec.Struct, frozen=True, kw_only=True):
    """What is posted."""

    action: _Action
    addresses: tuple[str, ...]
    node: str
    hops: tuple[str, ...]
    at_s: float


class _Where(msgspec.Struct, frozen=True):
    node: str = ""


class WebhookRoutes(RouteDriver):
    """See the module. Errors: FabricError. Belongs to one event loop."""

    name: ClassVar[str] = "webhook"

    def __init__(self, url: str, secret: str, *, node: str, hops: Sequence[str]) -> None:
        self._url = url
        self._secret = secret
        self._node = node
        self._hops = tuple(hops)
        self._session: aiohttp.ClientSession | None = None
        self._leading: dict[tuple[str, ...], asyncio.Task[bytes]] = {}

    async def open(self) -> None:
        self._session = aiohttp.ClientSession()

    def hold(self, addresses: Sequence[str]) -> None:
        """The controller knows already."""

    async def prepare(self, addresses: Sequence[str]) -> None:
        await self._call("prepare", addresses)

    def lead_here_now(self, addresses: Sequence[str]) -> float | None:
        """The call is on its way when this returns; `lead_here` waits for its answer."""
        if self._session is None or not addresses:
            return None
        key = tuple(addresses)
        task = asyncio.create_task(self._call("lead", addresses), name=f"routes of {key}")
        self._leading[key] = task
        task.add_done_callback(lambda done: self._forget(key, done))
        return time.time()

    async def lead_here(self, addresses: Sequence[str]) -> None:
        running = self._leading.get(tuple(addresses))
        await (asyncio.shield(running) if running else self._call("lead", addresses))

    async def leads_away(self, addresses: Sequence[str]) -> bool:
        content = await self._call("where", addresses)
        try:
            node = msgspec.json.decode(content or b"{}", type=_Where).node
        except msgspec.MsgspecError as error:
            raise FabricError(f"routes: {self._url} doesn't say where: {error}") from error
        return node not in ("", self._node)

    async def withdraw(self, addresses: Sequence[str]) -> None:
        try:
            await self._call("withdraw", addresses)
        except FabricError as error:
            log.warning("%s", error)

    async def close(self) -> None:
        for task in list(self._leading.values()):
            task.cancel()
        if self._leading:
            await asyncio.wait(set(self._leading.values()))
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _call(self, action: _Action, addresses: Sequence[str]) -> bytes:
        """Repeated until it is acknowledged, for LIMIT_S. FabricError: refused, or not in time."""
        if self._session is None:
            raise FabricError("routes: the webhook isn't open")
        call = RouteCall(
            action=action,
            addresses=tuple(addresses),
            node=self._node,
            hops=self._hops,
            at_s=time.time(),
        )
        body, delivery = msgspec.json.encode(call), secrets.token_hex(8)
        loop = asyncio.get_running_loop()
        ends_s, last = loop.time() + LIMIT_S, "no attempt was made"
        while (left_s := ends_s - loop.time()) > 0:
            try:
                status, content = await post(
                    self._session, self._url, self._secret, body, delivery, left_s
                )
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                last = why(error)
            else:
                if 200 <= status < 300:
                    return content
                last = f"status {status}"
                if 400 <= status < 500:
                    break
            await asyncio.sleep(min(GAP_S, max(ends_s - loop.time(), 0)))
        raise FabricError(f"routes: {self._url} has not done {action}: {last}")

    def _forget(self, key: tuple[str, ...], task: asyncio.Task[bytes]) -> None:
        if self._leading.get(key) is task:
            del self._leading[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s", error)
