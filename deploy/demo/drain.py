"""The demo's second part: a node with several guests is emptied, and they come home.

Clients ask every guest for a page ten times a second all the while, from the lab's client
namespace; each answer that doesn't come is an error.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from deploy.demo.report import DrainResult
from deploy.demo.screen import Screen, milliseconds
from deploy.guest.build import GuestImage
from deploy.guest.cmdline import guest_cmdline
from deploy.guest.protocol import READY
from deploy.lab.enter import enter
from deploy.lab.plan import GUEST_BRIDGE, LabPlan
from migrator.errors import FerryError
from migrator.model import DomainSpec, KernelBoot, NicSpec
from node_agent.cli.client import ApiClient
from node_agent.cli.drain_text import plan_text
from node_agent.cli.errors import ApiProblem
from node_agent.drain.resources import Drain, DrainPlan, DrainState
from node_agent.resources import Domain, StartRequest, StopRequest

GUESTS: Final = 3
MEMORY_BYTES: Final = 96 * 1024**2
READY_TIMEOUT_S: Final = 120.0
DRAIN_TIMEOUT_S: Final = 300.0
_FIRST_NUMBER: Final = 20
_ASK_S: Final = 0.1
_ANSWER_S: Final = 30.0
_POLL_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class DrainStory:
    """How it went. `faults`: what should not have happened."""

    result: DrainResult
    faults: tuple[str, ...]


def tell(api: ApiClient, plan: LabPlan, image: GuestImage, screen: Screen) -> DrainStory:
    """Start the guests, drain their node, undrain it. The guests are gone at the end.

    Errors: FerryError, CliError.
    """
    screen.heading(f"Maintenance: a node with {GUESTS} guests is emptied, and they come home")
    node = plan.nodes[0].name
    with ExitStack() as stack:
        names = [stack.enter_context(_guest(api, plan, image, n)) for n in range(GUESTS)]
        with screen.busy(f"{', '.join(names)} boot on {node}"):
            for name in names:
                _wait_ready(api, name)
        addresses = [plan.guest_address(_FIRST_NUMBER + n) for n in range(GUESTS)]
        clients = stack.enter_context(_clients(plan.namespace("client"), addresses))
        planned = api.post(f"/v1/nodes/{node}/drain?dry_run=true", DrainPlan)
        screen.say(f"ferry drain {node} --dry-run says:")
        screen.say(plan_text(planned))
        with screen.busy(f"ferry drain {node}"):
            drained = _ended(api, api.post(f"/v1/nodes/{node}/drain", Drain))
        screen.say(_sentence(f"{node} is empty", drained))
        with screen.busy(f"ferry undrain {node}"):
            home = _ended(api, api.post(f"/v1/nodes/{node}/undrain", Drain))
        screen.say(_sentence("They are back", home))
        time.sleep(2 * _ASK_S)  # What the last move broke shows in the next answers.
    errors = [error for each in clients for error in each.errors]
    asked = sum(each.asked for each in clients)
    screen.say(f"The clients asked {asked} times, {len(errors)} answers didn't come.")
    faults = [
        f"the {each.operation} of {node} is {each.state}: {each.error}"
        for each in (drained, home)
        if each.state is not DrainState.DONE
    ]
    if errors:
        faults.append(f"{len(errors)} requests failed in the drain, the first: {errors[0]}")
    return DrainStory(_result(drained, home, len(errors)), tuple(faults))


def _result(drained: Drain, home: Drain, errors: int) -> DrainResult:
    dark = [
        move.blackout_ms
        for each in (drained, home)
        for move in each.moves
        if move.blackout_ms is not None
    ]
    return DrainResult(
        domains=len(drained.moves),
        planned_s=round(drained.planned_s, 3),
        actual_s=round(_seconds(drained), 3),
        client_errors=errors,
        worst_blackout_ms=round(max(dark), 2) if dark else None,
    )


def _seconds(drain: Drain) -> float:
    return (drain.ended_at_s or drain.started_at_s) - drain.started_at_s


def _sentence(what: str, drain: Drain) -> str:
    dark = [move.blackout_ms for move in drain.moves if move.blackout_ms is not None]
    return (
        f"{what}: {len(drain.moves)} guests in {_seconds(drain):.1f} s, planned "
        f"{drain.planned_s:.1f} s; longest blackout {milliseconds(max(dark, default=None))}."
    )


def _ended(api: ApiClient, drain: Drain) -> Drain:
    deadline_s = time.monotonic() + DRAIN_TIMEOUT_S
    while not drain.ended:
        if time.monotonic() > deadline_s:
            raise FerryError(f"{drain.operation} {drain.id} isn't over after {DRAIN_TIMEOUT_S:g} s")
        time.sleep(_POLL_S)
        drain = api.get(f"/v1/drains/{drain.id}", Drain)
    return drain


# --- guests --------------------------------------------------------------------------------------


@contextmanager
def _guest(api: ApiClient, plan: LabPlan, image: GuestImage, number: int) -> Iterator[str]:
    name = f"app{number + 1}"
    address = plan.guest_address(_FIRST_NUMBER + number)
    cmdline = guest_cmdline(
        name=name, address=f"{address}/24", memory_mib=16, dirty_pages_per_s=200
    )
    spec = DomainSpec(
        name=name,
        memory_bytes=MEMORY_BYTES,
        nics=(
            NicSpec(mac=f"52:54:00:fe:02:{number:02x}", bridge=GUEST_BRIDGE, addresses=(address,)),
        ),
        boot=KernelBoot(kernel=str(image.kernel), initrd=str(image.initrd), cmdline=cmdline),
    )
    api.post("/v1/domains", Domain, spec)
    try:
        start = StartRequest(node=plan.nodes[0].name)
        api.post(f"/v1/domains/{name}/start", Domain, start)
        yield name
    finally:
        try:
            api.post(f"/v1/domains/{name}/stop", Domain, StopRequest(timeout_s=0.0))
        finally:
            api.delete(f"/v1/domains/{name}")


def _wait_ready(api: ApiClient, name: str) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            text = b"".join(api.chunks(f"/v1/domains/{name}/console")).decode(errors="replace")
        except ApiProblem as error:
            raise FerryError(f"the console of {name} can't be read: {error}") from error
        if READY in text:
            return
        if time.monotonic() > deadline_s:
            raise FerryError(f"{name} doesn't become ready; its console:\n{text[-1500:]}")
        time.sleep(_POLL_S)


# --- clients -------------------------------------------------------------------------------------


class _Client(threading.Thread):
    """Asks one guest for a page, again and again, until stopped."""

    def __init__(self, namespace: str, address: str) -> None:
        super().__init__(daemon=True, name=f"client-of-{address}")
        self._namespace = namespace
        self._address = address
        self.stopped = threading.Event()
        self.asked = 0
        self.errors: list[str] = []

    def run(self) -> None:
        enter(self._namespace)
        while not self.stopped.wait(_ASK_S):
            self.asked += 1
            connection = http.client.HTTPConnection(self._address, timeout=_ANSWER_S)
            try:
                connection.request("GET", "/")
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    self.errors.append(f"{self._address} answered {answer.status}")
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(f"{self._address}: {error!r}")
            finally:
                connection.close()


@contextmanager
def _clients(namespace: str, addresses: list[str]) -> Iterator[list[_Client]]:
    clients = [_Client(namespace, address) for address in addresses]
    for client in clients:
        client.start()
    try:
        yield clients
    finally:
        for client in clients:
            client.stopped.set()
        for client in clients:
            client.join(2 * _ANSWER_S)
