"""What the planner is told, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from migrator.model import MaintenancePolicy
from migrator.ports import Struct

ENGINE_BYTES_PER_S: Final = 2.1e9
"""No migration is faster than memory can be received (ARCHITECTURE: "The page engine")."""
DEFAULT_LINK_BYTES_PER_S: Final = 118e6
"""A link that nobody knows anything of: 1 Gbit/s, less what Ethernet, IP and TCP take."""


class NodeFacts(Struct, frozen=True, kw_only=True):
    """A node, whether domains leave it, go there or stay."""

    name: str
    memory_bytes: int
    admits: bool = True
    """Whether domains may come."""
    why_not: str = ""
    """Where they may not: the node's state, in words."""
    silent: bool = False
    """Nobody can open it from outside: its agent doesn't answer."""
    cpus: int = 1
    link_bytes_per_s: float = DEFAULT_LINK_BYTES_PER_S
    """Of its migration interface, each way."""
    kinds: frozenset[str] = frozenset()
    """What it has: `machine:q35`, `cpu:qemu64`, `feature:avx2`, `pool:default`,
    `hypervisor:qemu/tcg`."""


class DomainFacts(Struct, frozen=True, kw_only=True):
    """A domain that runs. What isn't known is 0."""

    name: str
    node: str
    memory_bytes: int
    content_bytes: int
    """What a first iteration sends."""
    dirty_bytes_per_s: float = 0.0
    working_set_bytes: int = 0
    """What it keeps dirtying, at most."""
    priority: int = 500
    vcpus: int = 1
    policy: MaintenancePolicy = MaintenancePolicy.LIVE
    restart: bool = True
    """With policy `stop`: it needs a place, too."""
    labels: frozenset[str] = frozenset()
    """KEY=VALUE."""
    affinity: tuple[str, ...] = ()
    anti_affinity: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()
    """Of `NodeFacts.kinds`, wherever it runs."""
    features: frozenset[str] = frozenset()
    """Likewise, of the processor that it runs on: it has seen them, until it boots elsewhere."""
    obstacle: str = ""
    """Why it can't be migrated now: paused, crashed, migrating already."""
    cure: str = ""
    """What would end that."""

    @property
    def required(self) -> frozenset[str]:
        """Of `NodeFacts.kinds`, by what is done to it."""
        migrates = self.policy is MaintenancePolicy.LIVE
        return self.needs | self.features if migrates and self.features else self.needs

    @property
    def selectors(self) -> frozenset[str]:
        """Everything that a rule may call it by."""
        return self.labels | {self.name}


class PlanOptions(Struct, frozen=True, kw_only=True):
    """What the plan may assume. Times in seconds."""

    parallel: int | None = None
    """At most so many moves from one node at once; None: as many as it takes, and its processors
    feed."""
    move_bytes_per_s: float = ENGINE_BYTES_PER_S
    """No single move is faster, whatever the link: the nodes' processors are the bottleneck then.
    """
    reserve_share: float = 0.0
    """Of each destination's memory, kept free."""
    link_share: float = 0.92
    """Of each link, for page streams. The rest keeps the link's queue empty, which the messages
    within a blackout wait in."""
    setup_s: float = 0.6
    """Of each move, before its first page: nodes are asked, the destination is made ready."""
    finish_s: float = 0.25
    """Of each move, after its last page of pre-copy: switchover, and the source's end."""
    late_s: float = 0.0
    """What a move takes beyond that where nodes are busy. It counts in the times of a plan, and
    not in the choice how many move at once: more of them would make the nodes busier still."""
    stop_s: float = 20.0
    """Assumed for a domain that is powered off, and started elsewhere."""
    forbidden: frozenset[tuple[str, str]] = frozenset()
    """(domain, node) pairs that were refused or have failed."""
    refusals: Mapping[tuple[str, str], str] = msgspec.field(
        default_factory=dict[tuple[str, str], str]
    )
    """Of `forbidden`, in the node's own words where they are known."""
    wanted: tuple[tuple[str, str], ...] = ()
    """(domain, node): where a domain has to go; it goes nowhere else."""


class Rate(Struct, frozen=True, kw_only=True):
    """From `at_s` on a move has this share of the links."""

    at_s: float
    bytes_per_s: float


class PlannedMove(Struct, frozen=True, kw_only=True):
    """One domain's move. Times are seconds after the plan's beginning."""

    domain: str
    source: str
    destination: str | None
    """None: it is powered off and stays off."""
    policy: MaintenancePolicy
    memory_bytes: int
    wire_bytes: int
    start_s: float
    seconds: float
    sent_s: float | None = None
    """When its last page of pre-copy has left; None: it isn't migrated."""
    rates: tuple[Rate, ...] = ()

    @property
    def end_s(self) -> float:
        return self.start_s + self.seconds


class Blocker(Struct, frozen=True, kw_only=True):
    """A domain that can't leave, why, and what would help."""

    domain: str
    reason: str
    remedy: str


class Plan(Struct, frozen=True, kw_only=True):
    """`moves` in the order in which they begin."""

    moves: tuple[PlannedMove, ...]
    blockers: tuple[Blocker, ...] = ()
    parallel: int = 1
    """How many at once from one node."""
    lanes: Mapping[str, int] = msgspec.field(default_factory=dict)
    """How many moves each of its nodes takes part in at once, by its processors."""
    makespan_s: float = 0.0
    lower_bound_s: float = 0.0
    """No plan of these moves is shorter."""

    @property
    def over_bound(self) -> float:
        """How much longer than the bound, as a factor: 1.0 is the best there is."""
        return self.makespan_s / self.lower_bound_s if self.lower_bound_s > 0.0 else 1.0


def wire_bytes(domain: DomainFacts, bytes_per_s: float) -> int:
    """What a pre-copy at this rate sends: each pass sends what was dirtied in the one before."""
    total, pending = 0.0, float(domain.content_bytes)
    for _ in range(_PASSES_MAX):
        total += pending
        dirtied = min(
            domain.dirty_bytes_per_s * pending / max(bytes_per_s, 1.0),
            float(domain.working_set_bytes or domain.memory_bytes),
        )
        if dirtied < _SMALL_PASS_BYTES or dirtied > _SHRINKS * pending:
            break
        pending = dirtied
    return int(total)


_PASSES_MAX: Final = 30
_SMALL_PASS_BYTES: Final = 1 << 20
_SHRINKS: Final = 0.85
"""As `migrator.policy.SHRINK_FACTOR`: a pass that leaves more doesn't pay."""
