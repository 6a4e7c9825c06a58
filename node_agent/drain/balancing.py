"""`ferry balance`: facts and measured use of all nodes, and the moves that even them out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from migrator.errors import FerryError
from migrator.model import MaintenancePolicy, MigrationState, NodeName, NodeState
from node_agent.drain.resources import BalancePlan, Move, PlanMove
from node_agent.drain.survey import Survey
from node_agent.drain.usage import USAGE, NodeUsage, UsageParams
from node_agent.drain.world import DrainWorld
from node_agent.peers.hub import PeerHub
from node_agent.planner.balance import Balance, Usage, balance

REST_S: Final = 600.0
"""A domain that has moved within the last ten minutes stays: no move is undone by the next."""
CALL_S: Final = 5.0


async def plan_balance(
    world: DrainWorld, hub: PeerHub, clock: Callable[[], float] = time.time
) -> tuple[Survey, Balance]:
    """What would even the nodes out now. Nodes that don't answer count with no use."""
    views = await world.views()
    asked = [n for n, view in views.items() if view.state is not NodeState.UNREACHABLE]

    async def ask(node: str) -> NodeUsage:
        try:
            return await hub.call(NodeName(node), USAGE, UsageParams(), NodeUsage, timeout_s=CALL_S)
        except FerryError:
            return NodeUsage(domains={})

    answers = await asyncio.gather(*(ask(node) for node in asked))
    usage: dict[str, Usage] = {}
    for answer in answers:
        usage |= dict(answer.domains)
    owned = {node: await world.owned_by(node) for node in asked}
    survey = await world.survey({n: d for n, d in owned.items() if d}, sample_s=0.0)
    now = clock()
    resting = frozenset(
        each.domain
        for each in await world.cluster.list_outlines()
        if not each.ended
        or (each.state is MigrationState.COMPLETED and abs(now - (each.ended_at_s or now)) < REST_S)
    )
    found = await asyncio.to_thread(
        balance,
        survey.nodes,
        survey.domains,
        usage,
        resting=resting,
        options=survey.options(),
    )
    return survey, found


def shown_balance(found: Balance) -> BalancePlan:
    """As the API tells it: one move after the other."""
    moves, start_s = [], 0.0
    for each in found.moves:
        moves.append(
            PlanMove(
                domain=each.domain,
                source=each.source,
                destination=each.destination,
                policy=MaintenancePolicy.LIVE,
                wire_bytes=each.wire_bytes,
                bandwidth_bytes_per_s=each.wire_bytes / max(each.cost_s, 1e-9),
                start_s=start_s,
                seconds=each.cost_s,
                gain=each.gain,
            )
        )
        start_s += each.cost_s
    return BalancePlan(
        moves=tuple(moves),
        before=dict(found.before),
        after=dict(found.after),
        reason=found.reason,
        planned_s=start_s,
    )


def moves_of_balance(found: Balance) -> tuple[Move, ...]:
    plan = shown_balance(found)
    return tuple(
        Move(
            domain=each.domain,
            source=each.source,
            destination=each.destination,
            wire_bytes=each.wire_bytes,
            planned_start_s=round(each.start_s, 3),
            planned_s=round(each.seconds, 3),
        )
        for each in plan.moves
    )
