"""Checks a plan against the facts that it was made from, and shares no code with the planner.

`problems` lists everything that is wrong: rules, memory, states, links, times. It computes what the
planner does in numpy and fractions of a schedule again in plain loops.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

from migrator.model import MaintenancePolicy
from node_agent.planner.model import DomainFacts, NodeFacts, Plan, PlannedMove, PlanOptions

_TOLERANCE = 1.001


def problems(
    nodes: Sequence[NodeFacts],
    domains: Sequence[DomainFacts],
    leaving: Collection[str],
    plan: Plan,
    options: PlanOptions,
) -> list[str]:
    """Empty: the plan is right."""
    facts = {each.name: each for each in domains}
    hosts = {each.name: each for each in nodes}
    return [
        *_accounted_for(leaving, plan),
        *_destinations(facts, hosts, plan, options),
        *_memory(domains, hosts, plan, options),
        *_rules(domains, plan),
        *_times(facts, plan, options),
        *_links(hosts, plan, options),
    ]


def _accounted_for(leaving: Collection[str], plan: Plan) -> Iterator[str]:
    named = sorted([move.domain for move in plan.moves] + [each.domain for each in plan.blockers])
    if named != sorted(leaving):
        yield f"moves and blockers are {named}, to leave are {sorted(leaving)}"
    for blocker in plan.blockers:
        if not blocker.reason or not blocker.remedy:
            yield f"{blocker.domain} is blocked without a reason or a remedy"


def _destinations(
    facts: dict[str, DomainFacts],
    hosts: dict[str, NodeFacts],
    plan: Plan,
    options: PlanOptions,
) -> Iterator[str]:
    for move in plan.moves:
        domain = facts[move.domain]
        if move.source != domain.node:
            yield f"{move.domain} is said to be on {move.source}"
        if domain.policy is MaintenancePolicy.NEVER:
            yield f"{move.domain} may never be touched"
        if move.destination is None:
            if domain.policy is not MaintenancePolicy.STOP or domain.restart:
                yield f"{move.domain} has no destination"
            continue
        host = hosts[move.destination]
        if move.destination == move.source:
            yield f"{move.domain} stays on {move.source}"
        if not host.admits:
            yield f"{move.domain} goes to {host.name}, which takes nothing"
        if domain.pinned and host.name not in domain.pinned:
            yield f"{move.domain} leaves the nodes that it is pinned to"
        boots = domain.policy is MaintenancePolicy.STOP
        if lacks := (domain.needs if boots else domain.needs | domain.features) - host.kinds:
            yield f"{host.name} lacks {sorted(lacks)} for {move.domain}"
        if (move.domain, host.name) in options.forbidden:
            yield f"{move.domain} goes to {host.name}, which was forbidden"
        if domain.obstacle and domain.policy is MaintenancePolicy.LIVE:
            yield f"{move.domain} can't be migrated: {domain.obstacle}"


def _memory(
    domains: Sequence[DomainFacts],
    hosts: dict[str, NodeFacts],
    plan: Plan,
    options: PlanOptions,
) -> Iterator[str]:
    """Every domain counts where it was all the time: what leaves late has not left yet."""
    used: dict[str, int] = defaultdict(int)
    for domain in domains:
        used[domain.node] += domain.memory_bytes
    came = {move.destination for move in plan.moves}
    for move in plan.moves:
        if move.destination is not None:
            used[move.destination] += move.memory_bytes
    for name in came - {None}:
        host = hosts[str(name)]
        if used[host.name] > host.memory_bytes * (1 - options.reserve_share) + 1:
            yield f"{host.name} would have {used[host.name]} of {host.memory_bytes} bytes in use"


def _rules(domains: Sequence[DomainFacts], plan: Plan) -> Iterator[str]:
    """After the moves, of each moved domain with each other domain."""
    where = {each.name: each.node for each in domains}
    where |= {move.domain: move.destination or "" for move in plan.moves}
    off = {move.domain for move in plan.moves if move.destination is None}
    moved = {move.domain for move in plan.moves} - off

    def named(domain: DomainFacts, selectors: Sequence[str]) -> bool:
        return any(each == domain.name or each in domain.labels for each in selectors)

    for one, other in itertools.permutations(domains, 2):
        if one.name not in moved or other.name in off:
            continue
        together = where[one.name] == where[other.name]
        apart = named(other, one.anti_affinity) or named(one, other.anti_affinity)
        if apart and together:
            yield f"{one.name} and {other.name} are both on {where[one.name]}"
        if (named(other, one.affinity) or named(one, other.affinity)) and not together:
            yield f"{one.name} is not where {other.name} is"


def _times(facts: dict[str, DomainFacts], plan: Plan, options: PlanOptions) -> Iterator[str]:
    for move in plan.moves:
        if move.start_s < 0 or move.seconds <= 0:
            yield f"{move.domain} starts at {move.start_s} and takes {move.seconds}"
        if facts[move.domain].policy is not MaintenancePolicy.LIVE:
            continue
        setup_s, finish_s = move.rates[0].at_s - move.start_s, move.end_s - (move.sent_s or 0.0)
        if setup_s < options.setup_s - 1e-6 or finish_s < options.finish_s - 1e-6:
            yield f"{move.domain} is set up in {setup_s} s and finished in {finish_s} s"
        if move.wire_bytes < facts[move.domain].content_bytes:
            yield f"{move.domain} sends less than it has"
        sent = sum(seconds * rate for _, seconds, rate in _segments(move))
        if not move.wire_bytes / 1.02 <= sent <= move.wire_bytes * 1.02:
            yield f"{move.domain} sends {sent:.0f} of {move.wire_bytes} bytes in its time"
    for source in {move.source for move in plan.moves}:
        live = [
            move
            for move in plan.moves
            if move.source == source and facts[move.domain].policy is MaintenancePolicy.LIVE
        ]
        for move in live:
            at_once = sum(
                other.start_s <= move.start_s + 1e-6 < other.end_s - 1e-6 for other in live
            )
            if at_once > plan.parallel:
                yield f"{at_once} moves from {source} at once, {plan.parallel} were told"
    for name in {move.destination for move in plan.moves if move.rates}:
        coming = [move for move in plan.moves if move.destination == name and move.rates]
        for move in coming:
            at_once = sum(
                other.start_s <= move.start_s + 1e-6 < other.end_s - 1e-6 for other in coming
            )
            if at_once > plan.lanes[str(name)]:
                yield f"{at_once} moves to {name} at once, it has {plan.lanes[str(name)]} lanes"
    last = max((move.end_s for move in plan.moves), default=0.0)
    if abs(last - plan.makespan_s) > 1e-6:
        yield f"the last move ends at {last}, the plan says {plan.makespan_s}"
    if plan.lower_bound_s > plan.makespan_s * _TOLERANCE:
        yield f"done in {plan.makespan_s} s, which is below the bound of {plan.lower_bound_s} s"


def _segments(move: PlannedMove) -> Iterator[tuple[float, float, float]]:
    """(from, seconds, rate) of a move's transfer."""
    ends = [rate.at_s for rate in move.rates[1:]] + [move.sent_s or 0.0]
    for rate, end in zip(move.rates, ends, strict=True):
        yield rate.at_s, end - rate.at_s, rate.bytes_per_s


def _links(hosts: dict[str, NodeFacts], plan: Plan, options: PlanOptions) -> Iterator[str]:
    """At no moment is a link asked for more than its share."""
    for way in ("out", "in"):
        changes: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for move in plan.moves:
            node = move.source if way == "out" else move.destination
            for at_s, seconds, rate in _segments(move) if move.rates else ():
                changes[str(node)].append((at_s, rate))
                changes[str(node)].append((at_s + seconds, -rate))
        for name, steps in changes.items():
            load, most = 0.0, 0.0
            for at_s, group in itertools.groupby(sorted(steps), key=lambda step: round(step[0], 6)):
                load += sum(change for _, change in group)
                most = max(most, load)
                assert at_s >= 0
            limit = hosts[name].link_bytes_per_s * options.link_share
            # A rate that changes by less than 1 % isn't told again.
            if most > limit * 1.02 + 1:
                yield f"{most:.0f} bytes/s go {way} of {name}, {limit:.0f} are its share"
