"""The demo's second part: a node with several guests is emptied, and they come home.

Visitors ask HAProxy for pages all the while; it shares them out among the guests. A hook takes each
guest out of it for its switchover. Each answer that doesn't come is an error.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from deploy.demo.report import DrainResult
from deploy.demo.screen import Screen, milliseconds
from deploy.demo.visitors import Visits, visitors
from deploy.guest.build import GuestImage
from deploy.guest.cmdline import guest_cmdline
from deploy.guest.protocol import READY
from deploy.lab.balancer import BACKEND, load_balancer
from deploy.lab.plan import GUEST_BRIDGE, LabPlan
from migrator.errors import FerryError
from migrator.model import DomainSpec, KernelBoot, NicSpec
from node_agent.cli.client import ApiClient
from node_agent.cli.drain_text import plan_text
from node_agent.cli.errors import ApiProblem
from node_agent.cli.output import table
from node_agent.drain.resources import Drain, DrainPlan, DrainState, Move
from node_agent.hooks.model import HookSpec
from node_agent.resources import Domain, StartRequest, StopRequest

GUESTS: Final = 3
MEMORY_BYTES: Final = 96 * 1024**2
READY_TIMEOUT_S: Final = 120.0
DRAIN_TIMEOUT_S: Final = 300.0
_FIRST_NUMBER: Final = 20
_VISITORS: Final = 4
_SEEN_S: Final = 0.5
"""What the visitors see before the first move, and after the last."""
_POLL_S: Final = 0.2
_HEADINGS: Final = ("guest", "move", "planned at", "for", "began at", "took", "blackout")


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
        addresses = {name: plan.guest_address(_FIRST_NUMBER + n) for n, name in enumerate(names)}
        balancer = stack.enter_context(load_balancer(plan, addresses))
        stack.enter_context(_hook(api, balancer.hook()))
        screen.say(
            f"HAProxy shares the requests of {_VISITORS} visitors out among them. A hook takes a "
            "guest out of it for its switchover, and puts it back:"
        )
        domains = " ".join(f"--domain {name}" for name in names)
        screen.say(
            f"  ferry hook add haproxy --haproxy {balancer.runtime} --backend {BACKEND} {domains} "
            "--point before-switchover --point after-resume --point on-failure --sessions-below 1"
        )
        with visitors(plan.namespace("client"), balancer.frontend, _VISITORS) as visits:
            time.sleep(_SEEN_S)
            drained, home = _there_and_back(api, node, screen)
            time.sleep(_SEEN_S)
    screen.say(_of_visits(visits))
    faults = [
        f"the {each.operation} of {node} is {each.state}: {each.error}"
        for each in (drained, home)
        if each.state is not DrainState.DONE
    ]
    if visits.errors:
        faults.append(f"{len(visits.errors)} requests failed in the drain: {visits.errors[0]}")
    return DrainStory(_result(drained, home, len(visits.errors)), tuple(faults))


def _there_and_back(api: ApiClient, node: str, screen: Screen) -> tuple[Drain, Drain]:
    planned = api.post(f"/v1/nodes/{node}/drain?dry_run=true", DrainPlan)
    screen.say(f"ferry drain {node} --dry-run says:")
    screen.say(plan_text(planned))
    with screen.busy(f"ferry drain {node}"):
        drained = _ended(api, api.post(f"/v1/nodes/{node}/drain", Drain))
    screen.say(_outcome(drained))
    screen.say(_sentence(f"{node} is empty", drained))
    with screen.busy(f"ferry undrain {node}"):
        home = _ended(api, api.post(f"/v1/nodes/{node}/undrain", Drain))
    screen.say(_sentence("They are back", home))
    return drained, home


def _outcome(drain: Drain) -> str:
    """Plan beside outcome, a line a guest."""
    rows = [
        (
            move.domain,
            f"{move.source} -> {move.destination or '-'}",
            f"{move.planned_start_s:.1f} s",
            f"{move.planned_s:.1f} s",
            _since(drain, move.started_at_s),
            _lasted(move),
            milliseconds(move.blackout_ms),
        )
        for move in sorted(drain.moves, key=lambda move: move.planned_start_s)
    ]
    return table(_HEADINGS, rows)


def _since(drain: Drain, at_s: float | None) -> str:
    return "-" if at_s is None else f"{at_s - drain.started_at_s:.1f} s"


def _lasted(move: Move) -> str:
    if move.started_at_s is None or move.ended_at_s is None:
        return "-"
    return f"{move.ended_at_s - move.started_at_s:.1f} s"


def _of_visits(visits: Visits) -> str:
    shares = ", ".join(f"{name} {count}" for name, count in sorted(visits.served.items()))
    return (
        f"The visitors asked {visits.asked} times ({shares}); {len(visits.errors)} answers didn't "
        f"come, the slowest took {visits.slowest_s:.2f} s."
    )


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


@contextmanager
def _hook(api: ApiClient, spec: HookSpec) -> Iterator[None]:
    api.post("/v1/hooks", HookSpec, spec)
    try:
        yield
    finally:
        api.delete(f"/v1/hooks/{spec.name}")


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
