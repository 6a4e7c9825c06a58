"""Guests behind a real HAProxy: each moves, its server is out meanwhile, no user notices."""

from __future__ import annotations

import http.client
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from deploy import lab
from migrator.model import MigrationState
from node_agent.hooks.model import HaproxyHook, HookFailure, HookPoint, HookSpec
from tests.contract.haproxy_server import Haproxy
from tests.integration.cluster.client import in_namespace
from tests.integration.cluster.world import Cluster, Guest, Load, describe, eventually

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

PORT = 8085
READY_S = 30.0
CONFIG = """
global
    stats socket {socket} level admin
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    retries 3
    option redispatch
frontend web
    bind 127.0.0.1:{port}
    default_backend web
backend web
    balance roundrobin
{servers}
"""


class Users:
    """One request after the other through HAProxy, until told to stop."""

    def __init__(self, namespace: str) -> None:
        self.answers = 0
        self.errors: list[str] = []
        self._namespace = namespace
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Users:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(READY_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._ask()
                self.answers += 1
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self.errors.append(f"{time.time():.3f} {error!r}")

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60.0)
        connection.sock = in_namespace(
            self._namespace, lambda: socket.create_connection(("127.0.0.1", PORT), 60.0)
        )
        with closing(connection):
            connection.request("GET", "/")
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == 200, (answer.status, body[:100])


@pytest.fixture
def guests(cluster: Cluster) -> Iterator[list[Guest]]:
    load = Load(dirty_pages_per_s=200, memory_mib=8, udp=False)
    with cluster.guest("lb1", "n1", load) as one, cluster.guest("lb2", "n1", load) as two:
        yield [one, two]


@pytest.fixture
def haproxy(cluster: Cluster, guests: list[Guest], tmp_path: Path) -> Iterator[Haproxy]:
    api_path = tmp_path / "api.sock"
    servers = "\n".join(f"    server {each.name} {each.address}:80" for each in guests)
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(socket=api_path, port=PORT, servers=servers))
    command = lab.command_in(cluster.name, "client", ["haproxy", "-db", "-f", str(config)])
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        eventually("HAProxy is ready", api_path.is_socket, READY_S)
        yield Haproxy(f"unix:{api_path}", PORT)
    finally:
        process.terminate()
        process.wait(READY_S)


def test_servers_are_out_while_their_guests_move_and_users_see_no_error(
    cluster: Cluster, guests: list[Guest], haproxy: Haproxy
) -> None:
    hook = HookSpec(
        name="lb",
        points=(HookPoint.BEFORE_SWITCHOVER, HookPoint.AFTER_RESUME, HookPoint.ON_FAILURE),
        action=HaproxyHook(address=haproxy.address, backend="web", sessions_below=1),
        domains=tuple(each.name for each in guests),
        on_failure=HookFailure.CANCEL,
    )
    api = cluster.api()
    api.post("/v1/hooks", HookSpec, hook)
    try:
        with Users(cluster.plan.namespace("client")) as users:
            for guest in guests:
                before = users.answers
                eventually("users are served", lambda: users.answers > before + 5)  # noqa: B023
                ended = cluster.ended(cluster.migrate(guest.name, guest.other_node()).id)
                assert ended.state is MigrationState.COMPLETED, describe(ended)
                done = {phase.name: phase.detail for phase in ended.timeline}
                assert f"web/{guest.name} is in drain, 0 sessions left" in done["leave"]

                def is_back(name: str = guest.name) -> bool:
                    return haproxy.server(name)["srv_admin_state"] == "0"

                eventually(f"{guest.name} is back in HAProxy", is_back)
            before = users.answers
            eventually("users are served", lambda: users.answers > before + 5)
        assert users.errors == []
        for guest in guests:
            guest.verify()
    finally:
        api.delete("/v1/hooks/lb")
