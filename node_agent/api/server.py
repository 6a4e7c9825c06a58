"""The HTTP server: the route table as an aiohttp application, on TCP and on a unix socket.

    request ──► problems ──► middlewares (`auth`) ──► handler ──► ClusterService, Trust

The unix socket is its owner's alone (mode 0600): who reaches it is admin. TCP is HTTPS with users
and roles, or, where the configuration says "plain", open to whoever reaches it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import ssl
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware

from migrator.errors import ConfigError, words
from node_agent.api.auth import authentication
from node_agent.api.drain_handlers import DRAIN_SERVICE
from node_agent.api.hooks import PRESSURE_SERVICE
from node_agent.api.openapi import document
from node_agent.api.problems import problems
from node_agent.api.requests import BODY_CAP_BYTES, CLUSTER, check_query
from node_agent.api.route import Handler, Route
from node_agent.api.routes import ROUTES
from node_agent.api.streams import HEARTBEAT_S, STREAMS, Streams
from node_agent.api.trust_handlers import HOST_SHUTDOWN, REMOVAL, TRUST
from node_agent.cluster import ClusterService
from node_agent.drain.service import DrainService
from node_agent.host_shutdown import HostShutdown
from node_agent.pressure.service import PressureService
from node_agent.trust.removal import NodeRemoval
from node_agent.trust.service import Trust

SHUTDOWN_S: Final = 2.0
BACKLOG: Final = 128


def create_app(
    cluster: ClusterService,
    *,
    drains: DrainService | None = None,
    version: str = "",
    middlewares: Sequence[Middleware] = (),
    heartbeat_s: float = HEARTBEAT_S,
    trust: Trust | None = None,
    removal: NodeRemoval | None = None,
    pressure: PressureService | None = None,
    shutdown: HostShutdown | None = None,
) -> web.Application:
    """The application. `middlewares` come after `problems`: what they raise is answered as such.

    `trust`: None in plain mode; then nobody is asked who they are.
    """
    if trust is not None:
        middlewares = (authentication(trust.users, trust.node, ROUTES), *middlewares)
    app = web.Application(middlewares=[problems, *middlewares], client_max_size=BODY_CAP_BYTES)
    app[CLUSTER] = cluster
    if drains is not None:
        app[DRAIN_SERVICE] = drains
    if pressure is not None:
        app[PRESSURE_SERVICE] = pressure
    app[STREAMS] = Streams(heartbeat_s)
    if trust is not None:
        app[TRUST] = trust
    if removal is not None:
        app[REMOVAL] = removal
    if shutdown is not None:
        app[HOST_SHUTDOWN] = shutdown
    for route in ROUTES:
        app.router.add_route(route.method, route.path, _checked(route))

    # When it is asked for, which hardly any agent is: it takes 0.06 s of a core.
    @functools.cache
    def described() -> bytes:
        return msgspec.json.encode(document(ROUTES, version))

    async def get_openapi(_: web.Request) -> web.StreamResponse:
        return web.Response(
            body=await asyncio.to_thread(described), content_type="application/json"
        )

    app.router.add_route("GET", "/openapi.json", get_openapi)

    async def end_streams(app: web.Application) -> None:
        await app[STREAMS].close()

    app.on_shutdown.append(end_streams)
    return app


def _checked(route: Route) -> Handler:
    """The route's handler, behind a look at its parameters; probes may add theirs elsewhere."""
    if not route.path.startswith("/v1/"):
        return route.handler
    known = tuple(query.name for query in route.query)

    async def checked(request: web.Request) -> web.StreamResponse:
        check_query(request, known)
        return await route.handler(request)

    return checked


class ApiServer:
    """Serves an application. `listen` is (host, port), port 0 for any; None: no TCP."""

    def __init__(
        self,
        app: web.Application,
        *,
        listen: tuple[str, int] | None,
        socket_path: Path | None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
        self._listen = listen
        self._ssl_context = ssl_context
        self._socket_path = socket_path
        self._bound = False
        self._address: tuple[str, int] | None = None

    @property
    def address(self) -> tuple[str, int] | None:
        """Where it listens (the real port where 0 was asked for); None before `start`."""
        return self._address

    async def start(self) -> None:
        """Listen. ConfigError if a port or socket is taken; then nothing is left."""
        await self._runner.setup()
        try:
            if self._listen is not None:
                await self._start_tcp(*self._listen)
            if self._socket_path is not None:
                listening = await asyncio.to_thread(bind_unix, self._socket_path)
                self._bound = True
                await web.SockSite(self._runner, listening, backlog=BACKLOG).start()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Refuse new requests, end the streams, finish the rest for `SHUTDOWN_S`. Idempotent."""
        await self._runner.cleanup()
        if self._bound and self._socket_path is not None:
            self._bound = False
            await asyncio.to_thread(self._socket_path.unlink, missing_ok=True)

    async def _start_tcp(self, host: str, port: int) -> None:
        site = web.TCPSite(self._runner, host, port, backlog=BACKLOG, ssl_context=self._ssl_context)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"api.listen: {host}:{port} can't be listened on: {words(error)}"
            ) from error
        addresses: list[Any] = self._runner.addresses
        self._address = (str(addresses[0][0]), int(addresses[0][1]))


def bind_unix(path: Path) -> socket.socket:
    """A bound unix socket with mode 0600 from its first moment.

    A stale socket file is replaced. ConfigError if somebody listens on it, or something else is
    there; then it is left as it was.
    """
    if path.exists() or path.is_symlink():
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"api.socket: {path} exists and is not a socket")
        if _answers(path):
            raise ConfigError(f"api.socket: another agent listens on {path}")
        path.unlink()
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(bound.fileno(), 0o600)  # Linux gives the file that `bind` makes this mode.
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        bound.bind(str(path))
    except OSError as error:
        bound.close()
        raise ConfigError(f"api.socket: {path} can't be listened on: {words(error)}") from error
    bound.setblocking(False)
    return bound


def _answers(path: Path) -> bool:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.settimeout(0.5)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
