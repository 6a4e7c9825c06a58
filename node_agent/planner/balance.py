"""The smallest set of moves that evens the nodes out. Pure.

A node's load is three shares: of its CPUs (used, over time), of its memory (promised to domains),
of its link (guests' traffic). The spread of a resource is the highest share less the lowest.

    nothing happens below `TRIGGER` (hysteresis: a cluster that is even enough is left alone);
    then the move with the best gain for its cost is taken, again and again, until the spread is
    below `TARGET`, or no move gains enough; at last each move is taken back that isn't needed

The gain of a move is by how much the squared loads of its two nodes sink; its cost the seconds that
it takes on the link. A domain goes where no rule is broken, and moves once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from migrator.model import MaintenancePolicy
from migrator.ports import Struct
from node_agent.planner.model import DomainFacts, NodeFacts, PlanOptions, wire_bytes
from node_agent.planner.rules import Rules

RESOURCES: Final = ("cpu", "memory", "network")
TRIGGER: Final = 0.20
TARGET: Final = 0.10
GAIN_MIN: Final = 0.002
"""Of a single move: a guest of 2 % of a node gains it between nodes that are 7 % apart."""
SECOND_COST: Final = 0.0002
"""Of gain, for each second on the link: ten minutes of copying must even out more than 0.1."""
MOVES_MAX: Final = 50


class Usage(Struct, frozen=True, kw_only=True):
    """What a domain uses, measured over `seconds`."""

    cpus: float = 0.0
    network_bytes_per_s: float = 0.0
    seconds: float = 0.0


class BalanceMove(Struct, frozen=True, kw_only=True):
    domain: str
    source: str
    destination: str
    gain: float
    """How much it lessens the sum of squared loads."""
    cost_s: float
    wire_bytes: int


class Balance(Struct, frozen=True, kw_only=True):
    """`before` and `after`: the spread of each resource, 0 to 1."""

    moves: tuple[BalanceMove, ...]
    before: Mapping[str, float]
    after: Mapping[str, float]
    reason: str
    """Why there are no more moves than these."""


def balance(
    nodes: Sequence[NodeFacts],
    domains: Sequence[DomainFacts],
    usage: Mapping[str, Usage],
    *,
    resting: frozenset[str] = frozenset(),
    options: PlanOptions | None = None,
) -> Balance:
    """`resting`: domains that have moved lately, and stay for now."""
    even = _Evener(nodes, domains, usage, options or PlanOptions())
    before = even.spread()
    if max(before.values(), default=0.0) <= TRIGGER:
        return Balance(moves=(), before=before, after=before, reason="the nodes are even enough")
    chosen = even.choose(resting)
    reason = f"the nodes differ by less than {TARGET:.0%} then"
    if max(even.spread().values()) > TARGET:
        reason = "no further move would gain more than it costs"
    return Balance(moves=chosen, before=before, after=even.spread(), reason=reason)


class _Evener:
    def __init__(
        self,
        nodes: Sequence[NodeFacts],
        domains: Sequence[DomainFacts],
        usage: Mapping[str, Usage],
        options: PlanOptions,
    ) -> None:
        self._nodes = nodes
        self._index = {node.name: at for at, node in enumerate(nodes)}
        self._domains = [each for each in domains if each.node in self._index]
        self._options = options
        self._capacity = np.array(
            [[node.cpus, node.memory_bytes, node.link_bytes_per_s] for node in nodes], dtype=float
        )
        self._open = np.array([node.admits for node in nodes], dtype=np.bool_)
        self._used = np.zeros((len(nodes), len(RESOURCES)))
        self._needs: dict[str, NDArray[np.float64]] = {}
        for each in self._domains:
            found = usage.get(each.name, Usage())
            need = np.array([found.cpus, each.memory_bytes, found.network_bytes_per_s])
            self._needs[each.name] = need
            self._used[self._index[each.node]] += need
        self._rules = Rules(self._index, self._domains)

    def spread(self) -> dict[str, float]:
        """Over the nodes that take domains: the others are no place to even out with."""
        if not self._open.any():
            return dict.fromkeys(RESOURCES, 0.0)
        shares = (self._used / self._capacity)[self._open]
        found = shares.max(axis=0) - shares.min(axis=0)
        return {name: float(each) for name, each in zip(RESOURCES, found, strict=True)}

    def choose(self, resting: frozenset[str]) -> tuple[BalanceMove, ...]:
        chosen: list[BalanceMove] = []
        moved: set[str] = set(resting)
        while len(chosen) < MOVES_MAX and max(self.spread().values()) > TARGET:
            best = self._best(moved)
            if best is None:
                break
            self._apply(best)
            moved.add(best.domain)
            chosen.append(best)
        for move in list(chosen):  # Is it still needed, now that the others are there?
            self._apply(_reversed(move))
            if max(self.spread().values()) <= TARGET:
                chosen.remove(move)
            else:
                self._apply(move)
        return tuple(chosen)

    def _best(self, moved: set[str]) -> BalanceMove | None:
        best: tuple[float, BalanceMove] | None = None
        for domain in self._domains:
            movable = domain.policy is MaintenancePolicy.LIVE and not domain.obstacle
            if domain.name in moved or not movable or domain.affinity:
                continue
            move = self._best_of(domain)
            if move is None:
                continue
            worth = move.gain - SECOND_COST * move.cost_s
            if move.gain >= GAIN_MIN and worth > 0 and (best is None or worth > best[0]):
                best = (worth, move)
        return None if best is None else best[1]

    def _best_of(self, domain: DomainFacts) -> BalanceMove | None:
        source, need = self._index[domain.node], self._needs[domain.name]
        self._rules.remove(domain)
        allowed = self._rules.allowed(domain) & self._open
        self._rules.add(domain, domain.node)
        allowed[source] = False
        for name, at in self._index.items():
            pinned = domain.pinned and name not in domain.pinned
            if pinned or not domain.required <= self._nodes[at].kinds:
                allowed[at] = False
        usable = self._capacity[:, 1] * (1 - self._options.reserve_share)
        allowed &= self._used[:, 1] + need[1] <= usable
        if not allowed.any():
            return None
        share = need / self._capacity
        load = self._used / self._capacity
        freed = float((load[source] ** 2 - (load[source] - share[source]) ** 2).sum())
        added = ((load + share) ** 2 - load**2).sum(axis=1)
        gains = np.where(allowed, freed - added, -np.inf)
        at = int(np.argmax(gains))
        speed = min(self._nodes[source].link_bytes_per_s, self._nodes[at].link_bytes_per_s)
        sent = wire_bytes(domain, speed * self._options.link_share)
        seconds = sent / (speed * self._options.link_share)
        return BalanceMove(
            domain=domain.name,
            source=domain.node,
            destination=self._nodes[at].name,
            gain=float(gains[at]),
            cost_s=seconds + self._options.setup_s + self._options.finish_s,
            wire_bytes=sent,
        )

    def _apply(self, move: BalanceMove) -> None:
        need = self._needs[move.domain]
        self._used[self._index[move.source]] -= need
        self._used[self._index[move.destination]] += need


def _reversed(move: BalanceMove) -> BalanceMove:
    return BalanceMove(
        domain=move.domain,
        source=move.destination,
        destination=move.source,
        gain=-move.gain,
        cost_s=0.0,
        wire_bytes=0,
    )
