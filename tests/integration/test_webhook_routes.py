"""A guest's route is set by somebody else's controller, whom real agents tell by HTTP."""

from __future__ import annotations

import contextlib
import http.server
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import pytest

from deploy.lab.enter import enter
from deploy.lab.kinds import FabricKind
from deploy.lab.plan import LabPlan
from node_agent.hooks.routes import RouteCall
from node_agent.hooks.webhook import signature
from tests.integration import webhook_agent
from tests.integration.cluster.pings import PingWatch
from tests.integration.cluster.to_and_fro import cutover_of
from tests.integration.cluster.world import Cluster, Load, describe, eventually, two_nodes
from tests.integration.test_routed_network import wait_led

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

START_S: Final = 20.0
QUIET: Final = Load(udp=False, dirty_pages_per_s=500)


class Controller:
    """An HTTP server in the router's namespace, which sets the router's host routes as it is told.

    Belongs into a `with` block.
    """

    def __init__(self, plan: LabPlan) -> None:
        self._plan = plan
        self._secret = plan.route_key_path.read_text().strip()
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._server: http.server.ThreadingHTTPServer | None = None
        self._where: dict[str, str] = {}
        self.done: list[tuple[str, str]] = []
        """Action and node of each call that was answered, in order."""
        self.refused = 0
        self.refuses_to_lead = False

    def answer(self, body: bytes, stamp: str, signed: str) -> tuple[int, bytes]:
        """Status and content."""
        if signed != signature(self._secret, stamp, body):
            return 403, b""
        call = msgspec.json.decode(body, type=RouteCall)
        with self._lock:
            if call.action == "lead" and self.refuses_to_lead:
                self.refused += 1
                return 503, b""
            for address in call.addresses:
                self._set(call, address)
            self.done.append((call.action, call.node))
            return 200, msgspec.json.encode({"node": self._where.get(call.addresses[0], "")})

    def _set(self, call: RouteCall, address: str) -> None:
        if call.action == "lead":
            (hop,) = (each for each in call.hops if (":" in each) is (":" in address))
            subprocess.run(["ip", "route", "replace", address, "via", hop], check=True, timeout=20)
            self._where[address] = call.node
        elif call.action == "withdraw" and self._where.get(address) == call.node:
            subprocess.run(["ip", "route", "del", address], check=True, timeout=20)
            del self._where[address]

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="controller")
        self._thread.start()
        assert self._ready.wait(START_S)
        return self

    def _run(self) -> None:
        enter(self._plan.router)  # Its handlers' threads begin in this one's namespace.
        handler = type("Bound", (_Handler,), {"controller": self})
        self._server = http.server.ThreadingHTTPServer(("", webhook_agent.PORT), handler)
        self._ready.set()
        with self._server:
            self._server.serve_forever(0.05)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    controller: Controller

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        stamp, signed = self.headers["X-Ferry-Timestamp"], self.headers["X-Ferry-Signature"]
        status, content = self.controller.answer(body, stamp, signed)
        with contextlib.suppress(ConnectionError):  # an agent waits no longer than it likes
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what was asked is in `done`."""


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Cluster]:
    with two_nodes(f"w{os.getpid()}", FabricKind.ROUTED, webhook_agent.COMMAND, tmp_path) as made:
        yield made


def test_a_controller_moves_a_guests_route_and_nothing_is_lost(told: Cluster) -> None:
    client = told.plan.namespace("client")
    with Controller(told.plan) as controller:
        with (
            told.guest("told", load=QUIET) as guest,
            PingWatch(client, guest.address) as pings,
        ):
            pings.wait_answers(100)
            begun = len(controller.done)
            move = told.move("told", "n2")
            wait_led(told, guest.address, "n2")
            cutover = cutover_of(told, move)
            assert cutover.verified_ms is not None, (describe(move), cutover)
            assert not cutover.problems, cutover
            pings.wait_answers(100)
            eventually("n1 withdraws", lambda: ("withdraw", "n1") in controller.done[begun:])
            # The old node withdraws only what it was told is elsewhere; it may ask too soon, too.
            done = controller.done[begun:]
            led, withdrawn = done.index(("lead", "n2")), done.index(("withdraw", "n1"))
            assert done.index(("prepare", "n2")) < led < withdrawn, done
            assert ("where", "n1") in done[led:withdrawn], done

            # It is away for a while: what arrives at the old node takes the tunnel meanwhile.
            controller.refuses_to_lead, begun = True, len(controller.done)
            told.move("told", "n1")
            eventually("it was asked again", lambda: controller.refused >= 3)
            pings.wait_answers(100)
            assert ("lead", "n1") not in controller.done[begun:]
            controller.refuses_to_lead = False
            wait_led(told, guest.address, "n1")
            pings.wait_answers(100)
            eventually("n2 withdraws", lambda: ("withdraw", "n2") in controller.done[begun:])
            begun = len(controller.done)
        assert (pings.lost, pings.duplicates, pings.reordered) == (0, 0, 0)
        eventually(
            "it is withdrawn with the guest", lambda: ("withdraw", "n1") in controller.done[begun:]
        )
