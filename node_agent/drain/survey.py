"""From the cluster as it is to what the planner is told, and from its plan to a drain's moves."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from migrator.model import DomainState, MaintenancePolicy, NodeInfo, NodeState
from migrator.ports import Struct
from node_agent.drain.figures import DomainFigures, NodeFigures
from node_agent.drain.resources import (
    DrainPlan,
    DrainPolicy,
    Move,
    NodeLeftOut,
    PlanBlocker,
    PlanMove,
)
from node_agent.migrations.checks import WHOLE_PROCESSOR, one_way
from node_agent.nodes import NodeView
from node_agent.planner.model import (
    DEFAULT_LINK_BYTES_PER_S,
    ENGINE_BYTES_PER_S,
    DomainFacts,
    NodeFacts,
    Plan,
    PlannedMove,
    PlanOptions,
)
from node_agent.resources import Domain

_SETUP_SHARE: Final = 0.7
"""Of a migration's overhead: before its first page."""
_OVERHEAD_S_MIN: Final = 0.2
_OVERHEAD_S_MAX: Final = 1.5
"""Busy nodes take longer to set a move up. More moves at once would hide that in the plan, and make
each set-up and each blackout longer still (measured): what is beyond counts in the times alone."""
_LATE_S_MAX: Final = 30.0
_STOP_S_MIN: Final = 0.5
_DRAIN_ADDS_S: Final = 0.35
"""To what a migration takes alone, while no drain has told: the nodes are asked first (0.05 s), its
end is noticed later (0.1 s), two at once share the processors. Measured on two cores, three guests
of 256 MiB, an unshaped link: 0.75 s a move, of which a lone one's plan has 0.39."""
_MOVABLE: Final = frozenset({DomainState.RUNNING})
_CURES: Final = {
    DomainState.PAUSED: "resume it (`ferry domain resume {}`)",
    DomainState.CRASHED: "reset it (`ferry domain reset {}`)",
    DomainState.STARTING: "wait until {} runs",
}
_SWITCHING: Final = frozenset({DomainState.PRE_SWITCHOVER, DomainState.POSTMIGRATE})
"""For some milliseconds of a migration that has hold of it: its end is waited for."""


class Survey(Struct, frozen=True, kw_only=True):
    """The facts of one moment."""

    nodes: tuple[NodeFacts, ...]
    domains: tuple[DomainFacts, ...]
    links: Mapping[str, float]
    link: str
    """How fast the first source's link is, and how that is known."""
    overhead_s: float | None = None
    move_bytes_per_s: float | None = None
    stop_s: float | None = None
    """What a domain takes that is powered off and started elsewhere."""

    def experienced(self, overhead_s: float | None, stop_s: float | None = None) -> Survey:
        """With what earlier drains have shown; else what lone migrations have, and a bit more."""
        if overhead_s is None and self.overhead_s is not None:
            overhead_s = self.overhead_s + _DRAIN_ADDS_S
        return msgspec.structs.replace(self, overhead_s=overhead_s, stop_s=stop_s)

    def options(self, **changes: object) -> PlanOptions:
        options = PlanOptions()
        if self.overhead_s is not None:
            overhead_s = min(max(self.overhead_s, _OVERHEAD_S_MIN), _OVERHEAD_S_MAX)
            options = msgspec.structs.replace(
                options,
                setup_s=overhead_s * _SETUP_SHARE,
                finish_s=overhead_s * (1 - _SETUP_SHARE),
                late_s=min(max(self.overhead_s - overhead_s, 0.0), _LATE_S_MAX),
            )
        if self.stop_s is not None:
            stop_s = max(self.stop_s, _STOP_S_MIN)
            options = msgspec.structs.replace(options, stop_s=stop_s)
        if self.move_bytes_per_s is not None:
            fastest = min(self.move_bytes_per_s, ENGINE_BYTES_PER_S)
            options = msgspec.structs.replace(options, move_bytes_per_s=fastest)
        return msgspec.structs.replace(options, **changes)

    def to_be_started(self, domain: str) -> Survey:
        """With that one as what it is after a drain has powered it off, whatever its own policy."""
        changed = tuple(
            msgspec.structs.replace(each, policy=MaintenancePolicy.STOP, restart=True)
            if each.name == domain
            else each
            for each in self.domains
        )
        return msgspec.structs.replace(self, domains=changed)

    def with_policy_of(self, domain: str, policy: MaintenancePolicy) -> Survey:
        """With the policy that a drain has settled on for that one (never stays)."""
        changed = tuple(
            msgspec.structs.replace(each, policy=policy)
            if each.name == domain and each.policy is not MaintenancePolicy.NEVER
            else each
            for each in self.domains
        )
        return msgspec.structs.replace(self, domains=changed)

    def left_out(self, *besides: str) -> tuple[NodeLeftOut, ...]:
        """The nodes that take nothing, and why; `besides`: of whom that needn't be said."""
        return tuple(
            NodeLeftOut(node=each.name, reason=each.why_not)
            for each in self.nodes
            if not each.admits and each.name not in besides
        )

    def shares(self, options: PlanOptions) -> dict[str, float]:
        """What page streams may use of each link."""
        return {name: speed * options.link_share for name, speed in self.links.items()}


def make_survey(
    views: Mapping[str, NodeView],
    domains: Sequence[Domain],
    figures: Mapping[str, NodeFigures],
    *,
    closed: Collection[str] = (),
    places: Mapping[str, str] | None = None,
) -> Survey:
    """`figures` by source. `closed`: nodes that are to take nothing, whatever their state.

    `places`: where domains are going; they count there, not where they still are, and also while
    they are powered off.
    """
    places = places or {}
    probed = [each.link_bytes_per_s for each in figures.values() if each.link_bytes_per_s]
    default = probed[0] if probed else DEFAULT_LINK_BYTES_PER_S
    nodes = tuple(
        _node(view, default, figures.get(name), name in closed)
        for name, view in sorted(views.items())
    )
    known = {each.domain: each for one in figures.values() for each in one.domains}
    facts = tuple(
        _domain(each, known.get(each.name), views, places)
        for each in domains
        if each.name in places or (each.node and each.state is not DomainState.STOPPED)
    )
    told = next((each.link_known_by for each in figures.values() if each.link_known_by), "")
    rates = [each.move_bytes_per_s for each in figures.values() if each.move_bytes_per_s]
    overheads = [each.overhead_s for each in figures.values() if each.overhead_s is not None]
    return Survey(
        nodes=nodes,
        domains=facts,
        links={node.name: node.link_bytes_per_s for node in nodes},
        link=f"{default * 8 / 1e6:.0f} Mbit/s ({told or 'assumed'})",
        overhead_s=max(overheads) if overheads else None,
        move_bytes_per_s=max(rates) if rates else None,
    )


def _node(view: NodeView, default: float, figures: NodeFigures | None, closed: bool) -> NodeFacts:
    info = view.info
    own = figures.link_bytes_per_s if figures is not None else None
    why_not = ""
    if view.state is NodeState.UNREACHABLE:
        why_not = f"it is unreachable: {view.silence}"
    elif not view.state.admits or closed:
        why_not = f"it is {NodeState.DRAINING if closed else view.kept_free or view.state}"
    elif view.barred:
        why_not = view.barred
    return NodeFacts(
        name=info.name,
        memory_bytes=info.memory_bytes,
        admits=not why_not,
        why_not=why_not,
        cpus=info.cpus,
        silent=view.state is NodeState.UNREACHABLE,
        link_bytes_per_s=info.link_bytes_per_s or own or default,
        kinds=_kinds(info),
    )


def _kinds(info: NodeInfo) -> frozenset[str]:
    has = info.capabilities
    return frozenset(
        {
            f"hypervisor:{has.driver}/{has.accelerator}",
            *(f"machine:{each}" for each in has.machine_types),
            *(f"cpu:{each}" for each in has.cpu_models),
            *(f"feature:{each}" for each in has.cpu_features),
            *(f"pool:{each}" for each in info.pools),
        }
    )


def _domain(
    domain: Domain,
    figures: DomainFigures | None,
    views: Mapping[str, NodeView],
    places: Mapping[str, str],
) -> DomainFacts:
    spec, rules = domain.spec, domain.spec.placement
    node = domain.node or ""
    model = spec.cpu_model.partition(",")[0]
    needs = {f"machine:{spec.machine}", f"cpu:{model}", *(f"pool:{d.pool}" for d in spec.disks)}
    features: set[str] = set()
    if (view := views.get(node)) is not None:
        has = view.info.capabilities
        needs.add(f"hypervisor:{has.driver}/{has.accelerator}")
        if model in WHOLE_PROCESSOR:
            features = {f"feature:{each}" for each in has.cpu_features}
    obstacle = ""
    switching = domain.migration is not None and domain.state in _SWITCHING
    if domain.state not in _MOVABLE and not switching:
        obstacle = f"it is {domain.state}, and only a running domain migrates"
        obstacle += f" ({domain.reason})" if domain.reason else ""
    in_use = domain.memory_in_use_bytes or spec.memory_bytes
    return DomainFacts(
        name=domain.name,
        node=places.get(domain.name, node),
        memory_bytes=spec.memory_bytes,
        content_bytes=figures.content_bytes if figures is not None else in_use,
        dirty_bytes_per_s=figures.dirty_bytes_per_s if figures is not None else 0.0,
        working_set_bytes=figures.working_set_bytes if figures is not None else 0,
        priority=spec.priority,
        vcpus=spec.vcpus,
        policy=spec.maintenance,
        restart=spec.maintenance_restart,
        labels=frozenset(f"{key}={value}" for key, value in spec.labels.items()),
        affinity=rules.affinity,
        anti_affinity=rules.anti_affinity,
        pinned=rules.pinned,
        needs=frozenset(needs),
        features=frozenset(features),
        obstacle=obstacle,
        cure=_CURES.get(domain.state, "").format(domain.name),
    )


def facts_when_off(domain: Domain) -> DomainFacts:
    """Of one that is powered off, to be started again: it is nowhere, and has nothing to send."""
    return msgspec.structs.replace(
        _domain(domain, None, {}, {}),
        node="",
        content_bytes=0,
        policy=MaintenancePolicy.STOP,
        restart=True,
        obstacle="",
        cure="",
    )


def with_policy(
    domains: Iterable[DomainFacts], node: str, policy: DrainPolicy
) -> tuple[DomainFacts, ...]:
    """The policy that a drain's user asks for, in the place of the domains' own (never stays)."""
    return tuple(
        msgspec.structs.replace(each, policy=asked_policy(each, policy))
        if each.node == node
        else each
        for each in domains
    )


def asked_policy(domain: DomainFacts, policy: DrainPolicy) -> MaintenancePolicy:
    """For one of them."""
    if policy is DrainPolicy.AUTO or domain.policy is MaintenancePolicy.NEVER:
        return domain.policy
    return MaintenancePolicy(policy.value)


def moves_of(plan: Plan, priorities: Mapping[str, int]) -> tuple[Move, ...]:
    """What a drain keeps of its plan."""
    return tuple(
        Move(
            domain=each.domain,
            source=each.source,
            destination=each.destination,
            policy=each.policy,
            priority=priorities.get(each.domain, 500),
            wire_bytes=each.wire_bytes,
            planned_start_s=round(each.start_s, 3),
            planned_s=round(each.seconds, 3),
        )
        for each in plan.moves
    )


def shown(move: PlannedMove) -> PlanMove:
    """A planned move, as a dry run tells of it."""
    sending_s = max(move.end_s - move.rates[0].at_s, 1e-9) if move.rates else 0.0
    return PlanMove(
        domain=move.domain,
        source=move.source,
        destination=move.destination,
        policy=move.policy,
        wire_bytes=move.wire_bytes,
        bandwidth_bytes_per_s=move.wire_bytes / sending_s if sending_s else 0.0,
        start_s=move.start_s,
        seconds=move.seconds,
    )


def shown_plan(
    node: str, survey: Survey, plan: Plan, left: Sequence[PlanBlocker] = ()
) -> DrainPlan:
    """A plan, as a dry run tells of it. `left`: what it leaves on purpose."""
    return DrainPlan(
        node=node,
        moves=tuple(shown(move) for move in plan.moves),
        blockers=tuple(
            PlanBlocker(domain=each.domain, reason=each.reason, remedy=each.remedy)
            for each in plan.blockers
        ),
        left=tuple(left),
        parallel=plan.parallel,
        planned_s=plan.makespan_s,
        lower_bound_s=plan.lower_bound_s,
        link=survey.link,
    )


def one_way_moves(survey: Survey, plan: Plan, views: Mapping[str, NodeView]) -> Iterator[str]:
    """Those that no undrain can undo, in words."""
    needs = {each.name: each.needs for each in survey.domains}
    for move in plan.moves:
        model = next((each for each in WHOLE_PROCESSOR if f"cpu:{each}" in needs[move.domain]), "")
        told = one_way(model, views.get(move.source), views.get(move.destination or ""))
        if told and move.policy is MaintenancePolicy.LIVE:
            yield f"{move.domain}: {told}"
