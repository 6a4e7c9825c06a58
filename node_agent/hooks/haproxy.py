"""HAProxy's runtime API: a server is taken out before its guest moves, and put back after it.

    before-migration, before-switchover    state drain | maint, or a lower weight; then wait until
                                           it has few sessions
    after-resume                           its new address, where the hook has one; ready again
    after-migration, on-failure            ready again

The last server that could serve is never taken out: new sessions would be refused, where those that
come within a blackout only wait. While others are out for a moment it waits for one of them.

One connection a command, as the runtime API closes it after each. Its answer to an order is empty;
a text is an error.
"""

from __future__ import annotations

import asyncio
import csv
import io
import time
from typing import Final

from migrator.errors import words
from node_agent.hooks.model import HaproxyAway, HaproxyHook, HookCall, HookPoint
from node_agent.hooks.port import HookDriver, HookError

_ANSWER_BYTES_MAX: Final = 4 * 1024 * 1024
_COMMAND_S: Final = 5.0
_POLL_S: Final = 0.05
"""HAProxy doesn't tell when a session ends: it has to be asked."""
_OTHERS_S: Final = 5.0
"""How long a server waits for another one to be back, and no more than half of the deadline."""
_NO_SERVERS: Final = frozenset({"FRONTEND", "BACKEND"})
"""Rows of `show stat` that are sums."""
_AWAY: Final = frozenset({HookPoint.BEFORE_MIGRATION, HookPoint.BEFORE_SWITCHOVER})
_BACK: Final = frozenset({HookPoint.AFTER_RESUME, HookPoint.AFTER_MIGRATION, HookPoint.ON_FAILURE})


class HaproxyDriver(HookDriver[HaproxyHook]):
    """See the module."""

    async def run(self, settings: HaproxyHook, call: HookCall, *, deadline_s: float) -> str:
        server = f"{settings.backend}/{_server_name(settings, call)}"
        if call.point in _AWAY:
            return await self._take_out(settings, server, min(_OTHERS_S, deadline_s / 2))
        if call.point in _BACK:
            return await self._put_back(settings, server, call)
        return "nothing to do"

    async def _take_out(self, settings: HaproxyHook, server: str, patience_s: float) -> str:
        if settings.away is HaproxyAway.WEIGHT:
            await _order(settings, f"set server {server} weight {settings.weight_percent}%")
            done = f"{server} has {settings.weight_percent}% of its weight"
        elif await self._out(settings, server, patience_s):
            done = f"{server} is in {settings.away}"
        else:
            return f"{server} stays in: no other server of {settings.backend} could serve"
        if settings.sessions_below is None:
            return done
        while True:
            sessions = await _sessions(settings, server)
            if sessions < settings.sessions_below:
                return f"{done}, {sessions} sessions left"
            await asyncio.sleep(_POLL_S)

    async def _out(self, settings: HaproxyHook, server: str, patience_s: float) -> bool:
        """Whether it is out. False: it would have been the last, and is as it was."""
        deadline_s = time.monotonic() + patience_s
        while True:
            rows = await _rows(settings, server)
            if _others(rows, server):
                await _order(settings, f"set server {server} state {settings.away}")
                # Another agent may have taken the other one out at the same moment.
                if _others(await _rows(settings, server), server):
                    return True
                await _order(settings, f"set server {server} state ready")
            if len(rows) == 1 or time.monotonic() > deadline_s:
                return False
            await asyncio.sleep(_POLL_S)

    async def _put_back(self, settings: HaproxyHook, server: str, call: HookCall) -> str:
        done = ""
        address = settings.addresses.get(call.destination or "")
        if address is not None and call.point is not HookPoint.ON_FAILURE:
            host, _, port = address.rpartition(":")
            # It answers an order that worked with what it changed.
            await _command(settings, f"set server {server} addr {host.strip('[]')} port {port}")
            done = f" at {address}"
        if settings.away is HaproxyAway.WEIGHT:
            await _order(settings, f"set server {server} weight 100%")
        await _order(settings, f"set server {server} state ready")
        return f"{server} is ready{done}"


def _server_name(settings: HaproxyHook, call: HookCall) -> str:
    return settings.server.replace("{domain}", call.domain or "").replace("{node}", call.node)


async def _order(settings: HaproxyHook, command: str) -> None:
    answer = await _command(settings, command)
    if answer:
        raise HookError(f"HAProxy at {settings.address} refused `{command}`: {answer}")


async def _sessions(settings: HaproxyHook, server: str) -> int:
    """Current sessions of a server. HookError if there is no such server."""
    return int((await _rows(settings, server))[server].get("scur") or 0)


async def _rows(settings: HaproxyHook, server: str) -> dict[str, dict[str, str]]:
    """`show stat` of the backend's servers, by BACKEND/NAME. HookError: `server` isn't there."""
    answer = await _command(settings, "show stat")
    rows = {
        f"{settings.backend}/{row['svname']}": row
        for row in csv.DictReader(io.StringIO(answer.removeprefix("# ")))
        if row.get("pxname") == settings.backend and row.get("svname") not in _NO_SERVERS
    }
    if server not in rows:
        raise HookError(f"No such server {server} in HAProxy at {settings.address}")
    return rows


def _others(rows: dict[str, dict[str, str]], server: str) -> list[str]:
    """Those beside `server` that get new sessions."""
    return [
        name
        for name, row in rows.items()
        if name != server and row["status"].startswith(("UP", "no check")) and row["weight"] != "0"
    ]


async def _command(settings: HaproxyHook, command: str) -> str:
    """The answer, stripped."""
    try:
        async with asyncio.timeout(_COMMAND_S):
            reader, writer = await _connect(settings.address)
            try:
                writer.write(command.encode() + b"\n")
                await writer.drain()
                answer = await reader.read(_ANSWER_BYTES_MAX)
                while chunk := await reader.read(_ANSWER_BYTES_MAX):
                    answer += chunk
                    if len(answer) > _ANSWER_BYTES_MAX:
                        raise HookError(f"HAProxy at {settings.address} answers without end")
            finally:
                writer.close()
    except TimeoutError as error:
        raise HookError(
            f"HAProxy at {settings.address} didn't answer within {_COMMAND_S:g} s"
        ) from error
    except OSError as error:
        raise HookError(
            f"HAProxy at {settings.address} can't be reached: {words(error)}"
        ) from error
    return answer.decode(errors="replace").strip()


async def _connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host.strip("[]"), int(port))
