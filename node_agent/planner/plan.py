"""The plan of a drain: `plan_moves`.

How many moves at once is no guess: the schedule is played with 1, 2, 3 ... at once from a node, and
the fewest that are within 2 % of the fastest are taken. More would only make each guest's
pre-copy longer, and with it what it dirties meanwhile. Two things bound the number: a guest that
writes fast needs a share of the link of twice its dirty rate, and each move takes a node, at either
end, about as much as a core gives: to set up and end processes, to copy.

The lower bound, `Plan.lower_bound_s`: no plan of these moves is over before
- each source has sent all of its bytes at the full speed of its link, and one setup and one finish;
- its lanes have had each move for a setup, a finish and the bytes, at most as fast as so many moves
  at once can send (`_lanes_bound`);
- nodes that alone can take some moves have received them;
- the longest single move is over.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec
import numpy as np

from migrator.model import MaintenancePolicy
from node_agent.planner import schedule
from node_agent.planner.model import (
    Blocker,
    DomainFacts,
    NodeFacts,
    Plan,
    PlannedMove,
    PlanOptions,
    wire_bytes,
)
from node_agent.planner.placement import Placement, place
from node_agent.planner.schedule import Job
from node_agent.planner.shares import least_shares

PARALLEL_MAX: Final = 8
"""Tried."""
LANES_MIN: Final = 2
"""On the smallest node: one move is set up while another one sends."""
_GOOD_ENOUGH: Final = 1.02
_STOPS_AT_ONCE: Final = 4


def plan_moves(
    nodes: Sequence[NodeFacts],
    domains: Sequence[DomainFacts],
    leaving: Collection[str],
    options: PlanOptions | None = None,
) -> Plan:
    """Move the domains named in `leaving` away from where they are.

    Those that can't be moved are blockers; the plan is of the others.
    """
    options = options or PlanOptions()
    wanted = frozenset(leaving)
    chosen = [each for each in domains if each.name in wanted]
    blockers = [blocker for each in chosen if (blocker := _own_obstacle(each))]
    blocked = {each.domain for each in blockers}
    movable = [each for each in chosen if each.name not in blocked]
    placement = place(nodes, domains, movable, options)
    blockers += placement.blockers
    blocked |= {each.domain for each in placement.blockers}
    movable = [each for each in movable if each.name not in blocked]
    live = [each for each in movable if each.policy is MaintenancePolicy.LIVE]
    lanes = {node.name: _lanes(node, options) for node in nodes}
    moves, parallel = _schedule(nodes, live, placement, lanes, options)
    stops = _stops([each for each in movable if each not in live], placement, options)
    moves = sorted([*moves, *stops], key=lambda move: (move.start_s, move.domain))
    makespan_s = max((move.end_s for move in moves), default=0.0)
    bound_s = _lower_bound(nodes, live, stops, placement, lanes, _as_late(options))
    if math.isclose(bound_s, makespan_s, rel_tol=1e-9):
        bound_s = makespan_s  # The same sum in another order: its last bit may say "below".
    return Plan(
        moves=tuple(moves),
        blockers=tuple(sorted(blockers, key=lambda each: each.domain)),
        parallel=parallel,
        lanes={name: lanes[name] for name in _taking_part(moves)},
        makespan_s=makespan_s,
        lower_bound_s=bound_s,
    )


def _lanes(node: NodeFacts, options: PlanOptions) -> int:
    by_cpus = min(max(node.cpus, LANES_MIN), PARALLEL_MAX)
    return max(by_cpus, options.parallel or 0)


def _taking_part(moves: Sequence[PlannedMove]) -> list[str]:
    return sorted({name for each in moves for name in (each.source, each.destination) if name})


def _own_obstacle(domain: DomainFacts) -> Blocker | None:
    """What is the domain's own, whatever the nodes are like."""
    leave = f"leave it there (--exclude {domain.name})"
    if domain.policy is MaintenancePolicy.NEVER:
        return Blocker(
            domain=domain.name,
            reason="its maintenance policy is never",
            remedy=f"stop it, or change the policy, or {leave}",
        )
    if domain.obstacle and domain.policy is MaintenancePolicy.LIVE:
        return Blocker(
            domain=domain.name,
            reason=domain.obstacle,
            remedy=f"{domain.cure or 'put that right'}, or power it off (`ferry domain stop "
            f"{domain.name}`), or {leave}",
        )
    return None


# --- the schedule --------------------------------------------------------------------------------


def _schedule(
    nodes: Sequence[NodeFacts],
    live: Sequence[DomainFacts],
    placement: Placement,
    lanes: Mapping[str, int],
    options: PlanOptions,
) -> tuple[list[PlannedMove], int]:
    """The best of what is tried, and its number of moves at once."""
    if not live:
        return [], options.parallel or 1
    index = {node.name: at for at, node in enumerate(nodes)}
    speeds = np.array([node.link_bytes_per_s for node in nodes]) * options.link_share
    arrivals = [lanes[node.name] for node in nodes]
    bounds = _parallel_bounds(index, speeds, live, arrivals, options)
    most = max(bounds)
    tried: list[tuple[float, int, list[Job]]] = []
    for number in range(1, most + 1) if options.parallel is None else (most,):
        limits = [min(number, bound) for bound in bounds]
        jobs = _jobs(index, speeds, live, placement, limits, options)
        links = schedule.Limits(speeds, speeds, limits, arrivals)
        tried.append((schedule.run(jobs, links, options), number, jobs))
    fastest = min(seconds for seconds, _, _ in tried)
    _, number, jobs = next(one for one in tried if one[0] <= fastest * _GOOD_ENOUGH)
    if options.late_s > 0.0:
        limits = [min(number, bound) for bound in bounds]
        jobs = _jobs(index, speeds, live, placement, limits, options)
        links = schedule.Limits(speeds, speeds, limits, arrivals)
        schedule.run(jobs, links, _as_late(options))
    facts = {each.name: each for each in live}
    return [_planned(job, facts[job.key], nodes) for job in jobs], number


def _as_late(options: PlanOptions) -> PlanOptions:
    """With what moves take on busy nodes in their set-ups."""
    return msgspec.structs.replace(options, setup_s=options.setup_s + options.late_s, late_s=0.0)


def _parallel_bounds(
    index: dict[str, int],
    speeds: np.ndarray[tuple[int], np.dtype[np.float64]],
    live: Sequence[DomainFacts],
    lanes: Sequence[int],
    options: PlanOptions,
) -> list[int]:
    """For each node how many may leave it at once."""
    fastest_writer: dict[int, float] = defaultdict(float)
    for domain in live:
        at = index[domain.node]
        fastest_writer[at] = max(fastest_writer[at], domain.dirty_bytes_per_s)
    bounds = [1] * len(index)
    for at, dirty in fastest_writer.items():
        bounds[at] = options.parallel or lanes[at]
        while options.parallel is None and bounds[at] > 1:
            first, other = least_shares(bounds[at])
            speed = float(speeds[at])
            if first * speed >= 2.0 * dirty and other * speed >= dirty:
                break
            bounds[at] -= 1
    return bounds


def _jobs(
    index: dict[str, int],
    speeds: np.ndarray[tuple[int], np.dtype[np.float64]],
    live: Sequence[DomainFacts],
    placement: Placement,
    limits: Sequence[int],
    options: PlanOptions,
) -> list[Job]:
    """The largest first: what is left at the end is small, so that all sources end alike."""
    jobs = []
    for domain in live:
        source = index[domain.node]
        rate = min(float(speeds[source]) / limits[source], options.move_bytes_per_s)
        jobs.append(
            Job(
                domain.name,
                source,
                index[placement.destinations[domain.name]],
                max(wire_bytes(domain, rate), 1),
                domain.priority,
            )
        )
    return sorted(jobs, key=lambda job: -job.wire)


def _planned(job: Job, domain: DomainFacts, nodes: Sequence[NodeFacts]) -> PlannedMove:
    return PlannedMove(
        domain=job.key,
        source=domain.node,
        destination=nodes[job.destination].name,
        policy=domain.policy,
        memory_bytes=domain.memory_bytes,
        wire_bytes=job.wire,
        start_s=job.start_s,
        seconds=job.end_s - job.start_s,
        sent_s=job.sent_s,
        rates=tuple(job.rates),
    )


def _stops(
    stopping: Sequence[DomainFacts], placement: Placement, options: PlanOptions
) -> list[PlannedMove]:
    """Powering off and starting elsewhere costs no bandwidth: a few at once, from the start."""
    moves = []
    lanes: dict[str, list[float]] = {}
    for domain in sorted(stopping, key=lambda each: -each.priority):
        ends = lanes.setdefault(domain.node, [0.0] * _STOPS_AT_ONCE)
        lane = ends.index(min(ends))
        moves.append(
            PlannedMove(
                domain=domain.name,
                source=domain.node,
                destination=placement.destinations.get(domain.name),
                policy=domain.policy,
                memory_bytes=domain.memory_bytes,
                wire_bytes=0,
                start_s=ends[lane],
                seconds=options.stop_s,
            )
        )
        ends[lane] += options.stop_s
    return moves


# --- the bound -----------------------------------------------------------------------------------


def _lower_bound(
    nodes: Sequence[NodeFacts],
    live: Sequence[DomainFacts],
    stops: Sequence[PlannedMove],
    placement: Placement,
    lanes: Mapping[str, int],
    options: PlanOptions,
) -> float:
    bound = max((move.seconds for move in stops), default=0.0)
    if not live:
        return bound
    speed = {node.name: node.link_bytes_per_s * options.link_share for node in nodes}
    speeds = np.array([speed[node.name] for node in nodes])
    overhead_s = options.setup_s + options.finish_s
    leaving: dict[str, float] = defaultdict(float)
    sizes: dict[str, list[float]] = defaultdict(list)
    arriving: dict[bytes, float] = defaultdict(float)
    capacity: dict[bytes, float] = {}
    for domain in live:
        rate = min(speed[domain.node], options.move_bytes_per_s)
        sent = float(_least_bytes(domain, rate))
        leaving[domain.node] += sent
        mask = placement.candidates[domain.name]
        key = mask.tobytes()
        arriving[key] += sent
        if key not in capacity:
            capacity[key] = float(speeds[mask].sum())
        best = min(rate, float(speeds[mask].max()))
        bound = max(bound, overhead_s + sent / best)
        sizes[domain.node].append(sent)
    bound = max(
        bound, *(_lanes_bound(sent, lanes[at], speed[at], options) for at, sent in sizes.items())
    )
    bound = max(bound, *(overhead_s + sent / speed[name] for name, sent in leaving.items()))
    return max(bound, *(overhead_s + sent / capacity[key] for key, sent in arriving.items()))


def _lanes_bound(sizes: Sequence[float], lanes: int, link: float, options: PlanOptions) -> float:
    """For one source. `n` moves keep lanes busy for `n` overheads, and k of them send at most
    F(k) = min(link, k x a move's rate), which is concave. So over a time T the mean number that
    sends is at most lanes - n x overhead / T, and the bytes at most T x F of that: a bound for each
    of F's pieces. And some lane has its share of the moves, at least as long as the smallest take.
    """
    overhead_s = options.setup_s + options.finish_s
    total, count = sum(sizes), len(sizes)
    rate = min(options.move_bytes_per_s, link)
    several = sorted(sizes)[: -(-count // lanes)]
    bound = sum(overhead_s + size / rate for size in several)
    for at in range(lanes):
        below = min(link, at * rate)
        slope = min(link, (at + 1) * rate) - below
        if slope > 0.0:
            enough = total + slope * count * overhead_s
            bound = max(bound, enough / (below + slope * (lanes - at)))
    return bound


def _least_bytes(domain: DomainFacts, bytes_per_s: float) -> int:
    """With the share of the link that costs the fewest: a slow pre-copy gives up sooner."""
    shares = range(1, PARALLEL_MAX + 1) if domain.dirty_bytes_per_s else range(1, 2)
    return min(wire_bytes(domain, bytes_per_s / number) for number in shares)
