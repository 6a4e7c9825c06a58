"""Affinity and anti-affinity, counted per node, so that a check costs the same in any cluster.

For each selector that some rule names: how many domains on each node it matches (`present`), and
how many there are that don't want to be with what it matches (`repels`). So anti-affinity holds
both ways, though only one of the two says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from node_agent.planner.model import DomainFacts

Mask = NDArray[np.bool_]
_Counts = NDArray[np.int32]


class Rules:
    """The rules of all `domains` where they are now; `remove` and `add` move one."""

    def __init__(self, index: Mapping[str, int], domains: Collection[DomainFacts]) -> None:
        self._index = index
        self._names = list(index)
        self._ones = np.ones(len(index), dtype=np.bool_)
        named = {
            selector for domain in domains for selector in (*domain.affinity, *domain.anti_affinity)
        }
        self._present = {each: np.zeros(len(index), dtype=np.int32) for each in named}
        self._repels = {each: np.zeros(len(index), dtype=np.int32) for each in named}
        self._wants = {each: np.zeros(len(index), dtype=np.int32) for each in named}
        """How many on each node want to be with what it matches."""
        self._any = bool(named)
        for domain in domains:
            self.add(domain, domain.node)

    def add(self, domain: DomainFacts, node: str) -> None:
        self._count(domain, node, 1)

    def remove(self, domain: DomainFacts) -> None:
        """From where it is by its own word."""
        self._count(domain, domain.node, -1)

    def _count(self, domain: DomainFacts, node: str, change: int) -> None:
        if not self._any or node not in self._index:
            return
        at = self._index[node]
        for selector in domain.selectors:
            if selector in self._present:
                self._present[selector][at] += change
        for selector in domain.anti_affinity:
            self._repels[selector][at] += change
        for selector in domain.affinity:
            self._wants[selector][at] += change

    def allowed(self, domain: DomainFacts) -> Mask:
        """The nodes where it breaks no rule. It must not be counted itself now."""
        if not self._any:
            return self._ones
        mask = self._ones.copy()
        for selector in domain.anti_affinity:
            mask &= self._present[selector] == 0
        for selector in domain.selectors:
            if selector in self._repels:
                mask &= self._repels[selector] == 0
                mask &= self._with_all(self._wants[selector])
        for selector in domain.affinity:
            mask &= self._with_all(self._present[selector])
        return mask

    def broken(self, domain: DomainFacts, node: str) -> str:
        """Which rule keeps it from that node; "": none."""
        at = self._index[node]
        for selector in domain.anti_affinity:
            if selector in self._present and self._present[selector][at]:
                return f"its anti-affinity to {selector}, which runs there"
        for selector in domain.selectors:
            if selector in self._repels and self._repels[selector][at]:
                return f"a domain there doesn't want to be with {selector}"
            if selector in self._wants and not self._with_all(self._wants[selector])[at]:
                return f"a domain on {self._where(self._wants[selector])} wants to be with it"
        for selector in domain.affinity:
            if selector in self._present and not self._with_all(self._present[selector])[at]:
                return f"its affinity to {selector}, on {self._where(self._present[selector])}"
        return ""

    def _with_all(self, counts: _Counts) -> Mask:
        """True where all that is counted is; everywhere, if nothing is."""
        total = int(counts.sum())
        return self._ones if total == 0 else np.asarray(counts == total)

    def _where(self, counts: _Counts) -> str:
        return ", ".join(self._names[at] for at in np.flatnonzero(counts)[:3])


def contradiction(group: Sequence[DomainFacts]) -> bool:
    """Whether domains that affinity holds together don't want to be together."""
    return any(
        selector in other.selectors
        for each in group
        for selector in each.anti_affinity
        for other in group
        if other is not each
    )


def groups_of(leaving: Sequence[DomainFacts]) -> list[list[DomainFacts]]:
    """Domains that affinity holds together, directly or through others, in the order given."""
    if not any(each.affinity for each in leaving):
        return [[each] for each in leaving]
    leader = {each.name: each.name for each in leaving}

    def root(name: str) -> str:
        while leader[name] != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    by_selector: dict[str, list[str]] = {}
    for each in leaving:
        for selector in each.selectors:
            by_selector.setdefault(selector, []).append(each.name)
    for each in leaving:
        for selector in each.affinity:
            for other in by_selector.get(selector, ()):
                leader[root(other)] = root(each.name)
    groups: dict[str, list[DomainFacts]] = {}
    for each in leaving:
        groups.setdefault(root(each.name), []).append(each)
    return list(groups.values())
