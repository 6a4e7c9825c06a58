"""A destination for each domain that has to leave its node.

Domains that belong together (affinity) are placed as one. The largest come first; each goes where
its memory arrives soonest, and among such nodes to the one with the most memory left. If that
leaves one without a place, it is tried again with the tightest fit, which wastes no memory; what
then has no place is a blocker, with every node's reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from migrator.model import MaintenancePolicy
from node_agent.planner.model import Blocker, DomainFacts, NodeFacts, PlanOptions
from node_agent.planner.rules import Rules, contradiction, groups_of

_MIB: Final = 2**20
_NODES_TOLD_MAX: Final = 6
_REASONS_TOLD_MAX: Final = 6
Mask = NDArray[np.bool_]


class Placement:
    """What `place` found. `candidates`: of each placed domain, the nodes that it might go to."""

    def __init__(self) -> None:
        self.destinations: dict[str, str] = {}
        self.blockers: list[Blocker] = []
        self.candidates: dict[str, Mask] = {}


def place(
    nodes: Sequence[NodeFacts],
    domains: Sequence[DomainFacts],
    leaving: Sequence[DomainFacts],
    options: PlanOptions,
) -> Placement:
    """Places for `leaving`, which are among `domains`, as are all that run anywhere."""
    loose = _Placer(nodes, domains, options)
    found = loose.run(leaving, tight=False)
    if not found.blockers:
        return found
    tight = _Placer(nodes, domains, options).run(leaving, tight=True)
    return tight if len(tight.blockers) < len(found.blockers) else found


class _Placer:
    def __init__(
        self, nodes: Sequence[NodeFacts], domains: Sequence[DomainFacts], options: PlanOptions
    ) -> None:
        self._nodes = nodes
        self._index = {node.name: index for index, node in enumerate(nodes)}
        self._options = options
        self._wanted = dict(options.wanted)
        self._admits = np.array([node.admits for node in nodes], dtype=np.bool_)
        self._usable = np.array([node.memory_bytes for node in nodes], dtype=np.float64)
        self._usable *= 1.0 - options.reserve_share
        self._free = self._usable.copy()
        self._speed = np.array([node.link_bytes_per_s for node in nodes]) * options.link_share
        self._load = np.zeros(len(nodes))
        """Bytes on their way to each node."""
        for domain in domains:
            if domain.node in self._index:
                self._free[self._index[domain.node]] -= domain.memory_bytes
        self._rules = Rules(self._index, domains)
        self._fits: dict[frozenset[str], Mask] = {}
        self._forbidden: dict[str, set[str]] = defaultdict(set)
        for domain_name, node in options.forbidden:
            self._forbidden[domain_name].add(node)

    def run(self, leaving: Sequence[DomainFacts], *, tight: bool) -> Placement:
        found = Placement()
        movable = [each for each in leaving if _needs_place(each)]
        for domain in movable:
            self._rules.remove(domain)
        groups = groups_of(movable)
        groups.sort(key=lambda group: (-_memory(group), -max(each.priority for each in group)))
        for group in groups:
            mask, memory = self._allowed(group), _memory(group)
            open_to = mask & (self._free >= memory)
            if not open_to.any():
                found.blockers += [self._blocker(each, group) for each in group]
                for each in group:  # It stays where it is.
                    self._rules.add(each, each.node)
                continue
            index = self._choose(open_to, group, tight=tight)
            self._free[index] -= memory
            self._load[index] += sum(each.content_bytes for each in group)
            for each in group:
                found.destinations[each.name] = self._nodes[index].name
                found.candidates[each.name] = mask
                self._rules.add(each, self._nodes[index].name)
        return found

    def _choose(self, open_to: Mask, group: Sequence[DomainFacts], *, tight: bool) -> int:
        memory = _memory(group)
        left_share = (self._free - memory) / np.maximum(self._usable, 1.0)
        if tight:
            cost = left_share
        else:
            content = sum(each.content_bytes for each in group)
            arrival_s = (self._load + content) / np.maximum(self._speed, 1.0)
            # Memory decides only between nodes where it would arrive at about the same time.
            cost = arrival_s - 0.01 * max(content / float(self._speed.max()), 1e-6) * left_share
        return int(np.argmin(np.where(open_to, cost, np.inf)))

    def _allowed(self, group: Sequence[DomainFacts]) -> Mask:
        """The nodes that could take all of them, if they had the memory."""
        mask: Mask = self._admits.copy()
        if contradiction(group):
            mask[:] = False
        for domain in group:
            mask &= self._compatible(domain)
            mask &= self._rules.allowed(domain)
            for name in self._excluded(domain):
                if name in self._index:
                    mask[self._index[name]] = False
        return mask

    def _excluded(self, domain: DomainFacts) -> set[str]:
        excluded = {domain.node, *self._forbidden.get(domain.name, ())}
        wanted = self._wanted.get(domain.name)
        if wanted is not None:
            excluded |= {node.name for node in self._nodes if node.name != wanted}
        if domain.pinned:
            excluded |= {node.name for node in self._nodes if node.name not in domain.pinned}
        return excluded

    def _compatible(self, domain: DomainFacts) -> Mask:
        required = domain.required
        mask = self._fits.get(required)
        if mask is None:
            mask = np.array([required <= node.kinds for node in self._nodes], dtype=np.bool_)
            self._fits[required] = mask
        return mask

    # --- why not -----------------------------------------------------------------------------

    def _blocker(self, domain: DomainFacts, group: Sequence[DomainFacts]) -> Blocker:
        reasons: dict[str, str] = {}
        ways = _Ways()
        for index, node in enumerate(self._nodes):
            if node.name == domain.node:
                continue
            closed = "" if node.admits else node.why_not or "it takes no domains"
            reason = self._reason(domain, node, group)
            missing = _memory(group) - float(self._free[index])
            if not reason and missing > 0.0:
                reason = (
                    f"{_memory(group) / _MIB:.0f} MiB needed, "
                    f"{max(float(self._free[index]), 0.0) / _MIB:.0f} MiB left"
                )
                if len(group) > 1:
                    reason += f" (with {_others(domain, group)}, which stay together)"
                if not closed and float(self._usable[index]) >= _memory(group):
                    ways.short.append((missing, node.name))
            elif not reason:
                (ways.silent if node.silent else ways.closed).append(node.name)
            elif not closed and (domain.name, node.name) in self._options.refusals:
                ways.refusing.append(node.name)
            if not closed and (lacks := sorted(domain.required - node.kinds)):
                ways.lacking.append((len(lacks), node.name, _words(lacks)))
            reasons[node.name] = closed or reason
        wanted = self._wanted.get(domain.name)
        return Blocker(
            domain=domain.name,
            reason=(
                f"{wanted} can't take it: {reasons[wanted]}"
                if wanted in reasons
                else f"no node can take it: {_told(reasons) or 'there is no other node'}"
            ),
            remedy=ways.told(domain, _memory(group), len(self._nodes)),
        )

    def _reason(self, domain: DomainFacts, node: NodeFacts, group: Sequence[DomainFacts]) -> str:
        """Other than memory, and whether the node is open; "": that is all."""
        if domain.pinned and node.name not in domain.pinned:
            return f"the domain is pinned to {', '.join(domain.pinned)}"
        wanted = self._wanted.get(domain.name)
        if wanted is not None and node.name != wanted:
            return f"it is to go to {wanted}"
        if node.name in self._forbidden.get(domain.name, ()):
            said = self._options.refusals.get((domain.name, node.name))
            return said or "it was refused there, or failed"
        if contradiction(group):
            return f"its rules contradict those of {_others(domain, group)}"
        missing = sorted(domain.required - node.kinds)
        if missing:
            return f"it has no {_words(missing)}"
        for each in group:
            broken = self._rules.broken(each, node.name)
            if broken:
                return broken
        return ""


class _Ways:
    """What would help: nodes that lack one thing, by what that is."""

    def __init__(self) -> None:
        self.short: list[tuple[float, str]] = []
        """Of memory: how much, and the node, which would be large enough."""
        self.closed: list[str] = []
        self.silent: list[str] = []
        self.refusing: list[str] = []
        """By a reason of their own, which they have said."""
        self.lacking: list[tuple[int, str, str]] = []
        """How many kinds they don't have, the node, and which."""

    def told(self, domain: DomainFacts, memory_bytes: int, nodes: int) -> str:
        """The nearest first. What doesn't help is no remedy: opening a node that a rule forbids."""
        ways: list[str] = []
        if self.short:
            missing, name = min(self.short)
            ways.append(f"free {missing / _MIB:.0f} MiB on {name}")
        for how, names in (
            ("open", self.closed),
            ("start the agent of", self.silent),
            ("mend that on", self.refusing),
        ):
            if names:
                ways.append(f"{how} {', '.join(names[:_NODES_TOLD_MAX])}")
        if domain.pinned or domain.affinity or domain.anti_affinity:
            ways.append("change its placement rules")
        if self.lacking and not ways:
            _, name, lacks = min(self.lacking)
            ways.append(f"give {name} {lacks}")
        if nodes < 2 or not ways:
            ways.append(f"add a node with {memory_bytes / _MIB:.0f} MiB")
        ways.append(f"leave it there (--exclude {domain.name})")
        return ", or ".join(ways)


def _told(reasons: Mapping[str, str]) -> str:
    """Nodes with the same reason together: in a large cluster one rule keeps most of them away, and
    would hide why the few others can't take it either."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name, why in reasons.items():
        alike[why].append(name)
    told = [f"{_names(names)}: {why}" for why, names in list(alike.items())[:_REASONS_TOLD_MAX]]
    if rest := sum(map(len, list(alike.values())[_REASONS_TOLD_MAX:])):
        told.append(f"and {rest} more nodes")
    return "; ".join(told)


def _names(nodes: Sequence[str]) -> str:
    """Two of them at least are left out, where any are."""
    if len(nodes) <= _NODES_TOLD_MAX:
        return ", ".join(nodes)
    shown = nodes[: _NODES_TOLD_MAX - 2]
    return f"{', '.join(shown)} and {len(nodes) - len(shown)} more"


def _words(kinds: Sequence[str]) -> str:
    return ", ".join(each.replace(":", " ") for each in kinds)


def _others(domain: DomainFacts, group: Sequence[DomainFacts]) -> str:
    return ", ".join(each.name for each in group if each.name != domain.name)


def _needs_place(domain: DomainFacts) -> bool:
    return domain.policy is MaintenancePolicy.LIVE or (
        domain.policy is MaintenancePolicy.STOP and domain.restart
    )


def _memory(group: Sequence[DomainFacts]) -> int:
    return sum(each.memory_bytes for each in group)
