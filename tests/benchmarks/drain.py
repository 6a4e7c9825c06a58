"""A node with ten guests is drained, behind HAProxy, and undrained; and again.

Each guest first moves alone, there and back, which tells its blackout when nothing else moves, and
teaches the nodes what a migration takes. The second drain and its way home are planned with what
the first have shown. Visitors ask HAProxy for pages all the while. Over 1 Gbit/s, where the link
bounds the time, and unshaped, where set-ups and processors do.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from deploy import lab
from deploy.demo.visitors import visitors
from deploy.guest.build import GuestImage
from deploy.guest.cmdline import guest_cmdline
from deploy.guest.protocol import READY
from deploy.lab.balancer import load_balancer
from deploy.lab.plan import GUEST_BRIDGE, LabPlan
from migrator.errors import FerryError
from migrator.model import DomainSpec, KernelBoot, Migration, MigrationState, NicSpec, PassKind
from node_agent.cli.client import ApiClient
from node_agent.cli.errors import CliError
from node_agent.drain.resources import Drain, DrainState, Move
from node_agent.hooks.model import HookSpec
from node_agent.resources import Domain, MigrationCreate, StartRequest, StopRequest
from tests.benchmarks.cases import MBIT, MIB, PAGE_BYTES
from tests.benchmarks.results import DrainFigures, MoveFigures, Run, TripFigures, worst

T = TypeVar("T")

CASE: Final = "drain"
UNSHAPED: Final = "drain-unshaped"
LINKS_MBIT: Final = {CASE: 1_000, UNSHAPED: None}
REPEATS: Final = 2
ENGINES: Final = ("ferry",)
GUESTS: Final = 10
_MEMORY_MIB: Final = 256
_KEPT_MIB: Final = 64
_NODE_MEMORY_BYTES: Final = 8 * 1024 * MIB
_VISITORS: Final = 2
_FIRST_NUMBER: Final = 20
_READY_S: Final = 180.0
_MOVE_S: Final = 60.0
_DRAIN_S: Final = 180.0
_SETTLE_S: Final = 1.0
_POLL_S: Final = 0.05


def measure(image: GuestImage, case: str) -> Run:
    """Two drains and undrains; what goes wrong is in the result."""
    link_mbit = LINKS_MBIT[case]
    name = f"drain{os.getpid()}"
    try:
        plan = lab.up(name, nodes=3, link_mbit=link_mbit, node_memory_bytes=_NODE_MEMORY_BYTES).plan
        with _guests(plan, image) as guests:
            return _measure(plan, guests, link_mbit)
    except (FerryError, CliError, OSError) as error:
        return Run(completed=False, error=f"{type(error).__name__}: {error}")
    finally:
        lab.down(name)


def _measure(plan: LabPlan, guests: dict[str, str], link_mbit: int | None) -> Run:
    """`guests`: addresses by domain. All on n1."""
    api = _api(plan)
    with load_balancer(plan, guests) as balancer:
        api.post("/v1/hooks", HookSpec, balancer.hook())
        with visitors(plan.namespace("client"), balancer.frontend, _VISITORS) as visits:
            time.sleep(_SETTLE_S)
            alone = {name: [_move(api, name, "n2"), _move(api, name, "n1")] for name in guests}
            before = len(visits.errors)
            trips: list[Drain] = []
            for operation in ("drain", "undrain") * 2:
                trips.append(_ended(api, api.post(f"/v1/nodes/n1/{operation}", Drain)))
                time.sleep(_SETTLE_S)
    drained = trips[0]
    moved = [api.get(f"/v1/migrations/{each.migration}", Migration) for each in drained.moves]
    first_bytes = sum(_first_pass_bytes(each) for each in moved)
    moves = tuple(
        _figures(drained, move, migration, alone[move.domain])
        for move, migration in zip(drained.moves, moved, strict=True)
    )
    figures = DrainFigures(
        domains=len(drained.moves),
        planned_s=drained.planned_s,
        actual_s=_took_s(drained),
        parallel=drained.parallel,
        link_s=first_bytes / (link_mbit * MBIT) if link_mbit else 0.0,
        moves=moves,
        client_errors=len(visits.errors) - before,
        requests=visits.asked,
        trips=tuple(
            TripFigures(
                operation=each.operation.value,
                parallel=each.parallel,
                planned_s=each.planned_s,
                actual_s=_took_s(each),
            )
            for each in trips
        ),
    )
    return Run(
        completed=all(each.state is DrainState.DONE for each in trips),
        error=next((each.error for each in trips if each.error), None),
        blackout_ms=worst(each.blackout_ms for each in moves),
        total_s=_took_s(drained),
        bytes_sent=sum(each.bytes_sent for each in drained.moves),
        drain=figures,
        load_average=os.getloadavg()[0],
    )


def _took_s(drain: Drain) -> float:
    return (drain.ended_at_s or drain.started_at_s) - drain.started_at_s


def _figures(
    drain: Drain, move: Move, migration: Migration, alone: Sequence[Migration]
) -> MoveFigures:
    began_s = move.started_at_s or drain.started_at_s
    parts = {phase.name: phase.seconds for phase in migration.timeline}
    return MoveFigures(
        domain=move.domain,
        planned_start_s=move.planned_start_s,
        planned_s=move.planned_s,
        started_s=began_s - drain.started_at_s,
        took_s=(move.ended_at_s or began_s) - began_s,
        begin_s=migration.created_at_s - began_s,
        seen_s=(move.ended_at_s or 0.0) - (migration.ended_at_s or 0.0),
        setup_s=parts.get("setup", 0.0),
        leave_s=parts.get("leave", 0.0),
        passes_s=tuple(each.seconds for each in migration.iterations),
        total_s=migration.total_s or 0.0,
        blackout_ms=move.blackout_ms or 0.0,
        alone_ms=tuple(each.blackout_ms or 0.0 for each in alone),
        alone_total_s=tuple(each.total_s or 0.0 for each in alone),
        parts=tuple(parts.items()),
    )


def _first_pass_bytes(migration: Migration) -> int:
    """What had to be moved, uncompressed: what was in use when it began, but for zeroes."""
    first = next((each for each in migration.iterations if each.kind is PassKind.FIRST), None)
    return 0 if first is None else first.pages * PAGE_BYTES


def _api(plan: LabPlan) -> ApiClient:
    return ApiClient(f"unix:{plan.node('n1').api_socket}")


def _move(api: ApiClient, domain: str, to: str) -> Migration:
    body = MigrationCreate(destination=to)
    begun = api.post(f"/v1/domains/{domain}/migrations", Migration, body)

    def ended() -> Migration | None:
        found = api.get(f"/v1/migrations/{begun.id}", Migration)
        return found if found.ended else None

    migration = _wait(ended, f"{domain} arrives at {to}", _MOVE_S)
    if migration.state is not MigrationState.COMPLETED:
        raise FerryError(f"{domain} alone: {migration.state}: {migration.error}")
    return migration


def _ended(api: ApiClient, drain: Drain) -> Drain:
    def ended() -> Drain | None:
        found = api.get(f"/v1/drains/{drain.id}", Drain)
        return found if found.ended else None

    return _wait(ended, f"{drain.operation} ends", _DRAIN_S)


def _wait(find: Callable[[], T | None], what: str, timeout_s: float) -> T:
    deadline_s = time.monotonic() + timeout_s
    while (found := find()) is None:
        if time.monotonic() > deadline_s:
            raise FerryError(f"not within {timeout_s:g} s: {what}")
        time.sleep(_POLL_S)
    return found


@contextlib.contextmanager
def _guests(plan: LabPlan, image: GuestImage) -> Iterator[dict[str, str]]:
    """Ready, on n1: addresses by name."""
    api = _api(plan)
    guests = {f"g{number}": plan.guest_address(_FIRST_NUMBER + number) for number in range(GUESTS)}
    try:
        for number, (name, address) in enumerate(guests.items()):
            api.post("/v1/domains", Domain, _spec(name, address, number, image))
            api.post(f"/v1/domains/{name}/start", Domain, StartRequest(node="n1"))
        for name in guests:
            _wait(lambda: _is_ready(api, name) or None, f"{name} boots", _READY_S)  # noqa: B023
        yield guests
    finally:
        for name in guests:
            with contextlib.suppress(CliError):
                api.post(f"/v1/domains/{name}/stop", Domain, StopRequest(timeout_s=0.0))


def _is_ready(api: ApiClient, name: str) -> bool:
    return READY.encode() in b"".join(api.chunks(f"/v1/domains/{name}/console"))


def _spec(name: str, address: str, number: int, image: GuestImage) -> DomainSpec:
    nic = NicSpec(mac=f"52:54:00:fe:03:{number:02x}", bridge=GUEST_BRIDGE, addresses=(address,))
    cmdline = guest_cmdline(
        name=name,
        address=f"{address}/24",
        memory_mib=_KEPT_MIB,
        dirty_pages_per_s=100,
        verify_pages_per_s=100,
    )
    boot = KernelBoot(kernel=str(image.kernel), initrd=str(image.initrd), cmdline=cmdline)
    return DomainSpec(name=name, memory_bytes=_MEMORY_MIB * MIB, nics=(nic,), boot=boot)
