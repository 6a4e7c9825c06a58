"""The CLI's HTTP client: synchronous, from the standard library alone, so that `ferry` starts fast.

find_address()   --api, $FERRY_API, --lab, $FERRY_LAB, /run/ferry/api.sock, the only lab
ApiClient        typed requests; a problem document becomes ApiProblem, silence Unreachable
"""

from __future__ import annotations

import http.client
import importlib
import os
import select
import socket
import ssl
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from migrator.errors import FerryError, words
from migrator.tls import verification_words
from migrator.unknown_fields import decode
from node_agent.cli.errors import ApiProblem, CliError, ExitCode, Unreachable
from node_agent.resources import Problem

T = TypeVar("T")

DEFAULT_SOCKET: Final = Path("/run/ferry/api.sock")
CONNECT_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 120.0
READ_TIMEOUT_S: Final = 60.0
"""Of a GET: an agent that asks a silent one itself has given up by then."""
PATIENCE_S: Final = 10.0
"""After so long without an answer the user hears what is being waited for."""
ANSWER_CAP_BYTES: Final = 64 * 1024 * 1024


def path_of(domain: str) -> str:
    """The API's path of a domain."""
    return f"/v1/domains/{quote(domain, safe='')}"


def migration_path(id: str) -> str:
    """The API's path of a migration."""
    return f"/v1/migrations/{quote(id, safe='')}"


def find_address(api: str | None, lab: str | None) -> str:
    """`unix:PATH` or `http://HOST:PORT`, see the module. CliError if there is none to be found."""
    api = api or (None if lab else os.environ.get("FERRY_API"))
    if api:
        return api
    lab = lab or os.environ.get("FERRY_LAB")
    if lab:
        return _lab_address(lab)
    if DEFAULT_SOCKET.exists():
        return f"unix:{DEFAULT_SOCKET}"
    labs = _labs()
    if len(labs) == 1:
        return _lab_address(labs[0])
    why = (
        f"there are several labs ({', '.join(labs)}): choose one with --lab"
        if labs
        else f"there is no {DEFAULT_SOCKET}. On a host of the cluster: "
        "`systemctl start ferry-agent`, which takes some seconds to listen; elsewhere: "
        "`ferry context add`, or --api; to try it: `ferry lab up`"
    )
    raise CliError(f"no agent found: {why}", ExitCode.UNREACHABLE)


def _labs() -> list[str]:
    try:
        found: list[str] = _lab_module().recorded()
    except ImportError:
        return []
    return found


def _lab_module() -> Any:
    """What labs have noted: an installation may lack it, and `node_agent` doesn't depend on it."""
    return importlib.import_module("deploy.lab.record")


def _lab_address(name: str) -> str:
    """The API of the lab's first node that listens."""
    try:
        addresses: list[str] = [node.api for node in _lab_module().load(name).nodes]
    except (FerryError, ImportError) as error:
        raise CliError(str(error), ExitCode.NOT_FOUND) from error
    for address in addresses:
        if _listens(address):
            return address
    raise CliError(f"no agent of lab {name} answers", ExitCode.UNREACHABLE)


def _listens(address: str) -> bool:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(address.removeprefix("unix:"))
        except OSError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Access:
    """How an agent is spoken to over the network."""

    token: str | None = None
    """A bearer token."""
    tls: ssl.SSLContext | None = None
    """None: the system's authorities, for https."""
    server_name: str | None = None
    """The name that the agent's certificate must have; None: the host that was dialed."""


def pinned_context(authority_pem: str) -> ssl.SSLContext:
    """TLS 1.3 to servers whose certificate this authority signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=authority_pem)
    return context


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("ferry", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(CONNECT_TIMEOUT_S)
            self.sock.connect(self._path)
            self.sock.settimeout(self.timeout)
        except OSError:
            self.sock.close()
            raise


class _TcpConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.create_connection((self.host, self.port), CONNECT_TIMEOUT_S)
        self.sock.settimeout(self.timeout)


class _TlsConnection(_TcpConnection):
    def __init__(self, host: str, port: int, timeout: float, access: Access) -> None:
        super().__init__(host, port, timeout=timeout)
        self._access = access

    def connect(self) -> None:
        super().connect()
        context = self._access.tls or ssl.create_default_context()
        name = self._access.server_name or self.host
        try:
            self.sock = context.wrap_socket(self.sock, server_hostname=name)
        except BaseException:
            self.sock.close()
            raise


class ApiClient:
    """One agent's API. Each request has its own connection.

    Errors: ApiProblem (the agent refused), Unreachable (it can't be asked, or doesn't answer).
    """

    asked_for_change: ClassVar[bool] = False
    """Whether any of this process's did, and was answered: a Ctrl-C after that undoes nothing."""

    def __init__(self, address: str, access: Access | None = None) -> None:
        self.address = address
        self._access = access or Access()
        self._secure = False
        if not address.startswith("unix:"):
            parts = urlsplit(address if "//" in address else f"http://{address}")
            self._secure = parts.scheme == "https"
            try:
                self._host = parts.hostname or ""
                self._port = parts.port or (443 if self._secure else 80)
            except ValueError:
                self._host = ""
            if parts.scheme not in ("http", "https") or not self._host:
                raise CliError(
                    f"{address} is not an API address: unix:/PATH, https://HOST:PORT or "
                    "http://HOST:PORT",
                    ExitCode.USAGE,
                )
            if self._access.token is not None and not self._secure:
                raise CliError(
                    f"a token is never sent in clear text: {address} must be https://HOST:PORT",
                    ExitCode.USAGE,
                )

    def get(self, path: str, kind: type[T], *, timeout_s: float = READ_TIMEOUT_S) -> T:
        """GET a JSON resource."""
        return self.decoded(self._exchange("GET", path, timeout_s=timeout_s), kind)

    def post(
        self,
        path: str,
        kind: type[T],
        body: object = None,
        *,
        timeout_s: float = ANSWER_TIMEOUT_S,
        meanwhile: Sequence[tuple[float, str]] = (),
    ) -> T:
        """POST, None: an empty body. `meanwhile`: what to say after so many seconds (ascending)
        without an answer, where it is known what takes so long."""
        return self.decoded(self._exchange("POST", path, body, timeout_s, meanwhile), kind)

    def patch(self, path: str, kind: type[T], body: object) -> T:
        """PATCH."""
        return self.decoded(self._exchange("PATCH", path, body), kind)

    def delete(self, path: str) -> bytes:
        """DELETE; the body of the answer."""
        return self._exchange("DELETE", path)

    def lines(self, path: str, headers: Mapping[str, str] | None = None) -> Iterator[bytes]:
        """A stream's lines, until it ends."""
        for chunk in self.chunks(path, headers, by_line=True):
            yield chunk.rstrip(b"\r\n")

    def chunks(
        self, path: str, headers: Mapping[str, str] | None = None, *, by_line: bool = False
    ) -> Iterator[bytes]:
        """A stream's bytes as they come. The server says something every few seconds or ends."""
        with closing(self._connection(ANSWER_TIMEOUT_S)) as connection:
            try:
                connection.request("GET", path, headers={**self._authorization, **(headers or {})})
                response = connection.getresponse()
                if response.status >= 300:
                    self._raise_problem(response.status, response.read(ANSWER_CAP_BYTES))
                read = response.readline if by_line else response.read1
                while data := read(65_536):
                    yield data
            except (OSError, http.client.HTTPException) as error:
                raise self._unreachable(error) from error

    def _exchange(
        self,
        method: str,
        path: str,
        body: object = None,
        timeout_s: float = ANSWER_TIMEOUT_S,
        meanwhile: Sequence[tuple[float, str]] = (),
    ) -> bytes:
        data = None if body is None else msgspec.json.encode(body)
        headers = {"Accept": "application/json", **self._authorization}
        if data is not None:
            headers["Content-Type"] = "application/json"
        with closing(self._connection(timeout_s)) as connection:
            try:
                connection.request(method, path, body=data, headers=headers)
                self._wait(connection, timeout_s, meanwhile)
                response = connection.getresponse()
                answer = response.read(ANSWER_CAP_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise self._unreachable(error) from error
            except KeyboardInterrupt:
                if method == "GET":
                    raise
                raise CliError(
                    f"interrupted before {self.address} answered: what was asked for may be done "
                    "all the same",
                    ExitCode.INTERRUPTED,
                ) from None
        if response.status >= 300:
            self._raise_problem(response.status, answer)
        if method != "GET":
            ApiClient.asked_for_change = True
        return answer

    def _wait(
        self,
        connection: http.client.HTTPConnection,
        timeout_s: float,
        meanwhile: Sequence[tuple[float, str]],
    ) -> None:
        """Say on stderr that an answer takes long, instead of standing there in silence.

        What was waited here is taken from the time that the answer is given.
        """
        if connection.sock is None:
            return
        silent = (
            f"{self.address} has not answered for {PATIENCE_S:.0f} s; it is given "
            f"{timeout_s - PATIENCE_S:.0f} s more"
        )
        answer = select.poll()  # select(2) takes no descriptor above 1,023.
        answer.register(connection.sock, select.POLLIN)
        waited_s = 0.0
        for after_s, text in meanwhile or ((PATIENCE_S, silent),):
            if answer.poll(1000 * (after_s - waited_s)):
                return
            waited_s = after_s
            connection.sock.settimeout(max(timeout_s - waited_s, 1.0))
            print(f"ferry: {text}", file=sys.stderr, flush=True)

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        if self.address.startswith("unix:"):
            return _UnixConnection(self.address.removeprefix("unix:"), timeout_s)
        if self._secure:
            return _TlsConnection(self._host, self._port, timeout_s, self._access)
        return _TcpConnection(self._host, self._port, timeout=timeout_s)

    @property
    def _authorization(self) -> dict[str, str]:
        token = self._access.token
        return {} if token is None else {"Authorization": f"Bearer {token}"}

    def _raise_problem(self, status: int, body: bytes) -> None:
        try:
            problem = decode(body, msgspec.json.Decoder(Problem))
        except msgspec.DecodeError:
            detail = f"{self.address} answered {status}, which is not Ferry's API"
            problem = Problem(type="about:blank", title="", status=status, detail=detail, code="")
        raise ApiProblem(problem)

    def decoded(self, body: bytes, kind: type[T]) -> T:
        """An answer. What a newer agent has added to it is ignored. CliError: it is none."""
        try:
            return decode(body, msgspec.json.Decoder(kind))
        except msgspec.DecodeError as error:
            raise CliError(
                f"{self.address} answered what this ferry can't read: {error}"
            ) from error

    def _unreachable(self, error: Exception) -> Unreachable:
        if isinstance(error, ssl.SSLCertVerificationError):
            why = f"its certificate is not accepted: {verification_words(error)}"
            if "clock" in why:
                why += time.strftime(", which says %Y-%m-%d %H:%M UTC", time.gmtime())
        elif isinstance(error, TimeoutError):
            why = "it doesn't answer in time"
        elif isinstance(error, OSError):
            why = words(error)
        else:
            why = str(error) or "it closed the connection"
        return Unreachable(f"the agent at {self.address} can't be reached: {why}")
