"""HAProxy's runtime API: a server is taken out before its guest moves, and put back after it.

    before-migration, before-switchover    state drain | maint, or a lower weight; then wait until
                                           it has few sessions
    after-resume                           its new address, where the hook has one; ready again
    after-migration, on-failure            ready again

One connection a command, as the runtime API closes it after each. Its answer to an order is empty;
a text is an error.
"""

from __future__ import annotations

import asyncio
import csv
import io
from typing import Final

from node_agent.hooks.model import HaproxyAway, HaproxyHook, HookCall, HookPoint
from node_agent.hooks.port import HookDriver, HookError

_ANSWER_BYTES_MAX: Final = 4 * 1024 * 1024
_COMMAND_S: Final = 5.0
_POLL_S: Final = 0.1
"""HAProxy doesn't tell when a session ends: it has to be asked."""
_AWAY: Final = frozenset({HookPoint.BEFORE_MIGRATION, HookPoint.BEFORE_SWITCHOVER})
_BACK: Final = frozenset({HookPoint.AFTER_RESUME, HookPoint.AFTER_MIGRATION, HookPoint.ON_FAILURE})


class HaproxyDriver(HookDriver[HaproxyHook]):
    """See the module."""

    async def run(self, settings: HaproxyHook, call: HookCall, *, deadline_s: float) -> str:
        server = f"{settings.backend}/{_server_name(settings, call)}"
        if call.point in _AWAY:
            return await self._take_out(settings, server)
        if call.point in _BACK:
            return await self._put_back(settings, server, call)
        return "nothing to do"

    async def _take_out(self, settings: HaproxyHook, server: str) -> str:
        if settings.away is HaproxyAway.WEIGHT:
            await _order(settings, f"set server {server} weight {settings.weight_percent}%")
            done = f"{server} has {settings.weight_percent}% of its weight"
        else:
            await _order(settings, f"set server {server} state {settings.away}")
            done = f"{server} is in {settings.away}"
        if settings.sessions_below is None:
            return done
        while True:
            sessions = await _sessions(settings, server)
            if sessions < settings.sessions_below:
                return f"{done}, {sessions} sessions left"
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
    answer = await _command(settings, "show stat")
    backend, _, name = server.partition("/")
    for row in csv.DictReader(io.StringIO(answer.removeprefix("# "))):
        if (row.get("pxname"), row.get("svname")) == (backend, name):
            return int(row.get("scur") or 0)
    raise HookError(f"HAProxy at {settings.address} has no server {server}")


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
        raise HookError(f"HAProxy at {settings.address} can't be reached: {error}") from error
    return answer.decode(errors="replace").strip()


async def _connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host.strip("[]"), int(port))
