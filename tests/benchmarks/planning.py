"""How long a plan takes: 20 of 1,000 nodes with 20,000 domains are emptied."""

from __future__ import annotations

import random
import time
from typing import Final

from node_agent.planner.plan import plan_moves
from tests.benchmarks.results import Run
from tests.unit.test_planner import rack

CASE: Final = "plan"
REPEATS: Final = 3
ENGINES: Final = ("ferry",)
_NODES: Final = 1_000
_EMPTIED: Final = 20
_DOMAINS_PER_NODE: Final = 20


def measure() -> Run:
    """One plan, by the wall clock."""
    nodes, domains, leaving = rack(random.Random(5), _NODES, _EMPTIED, _DOMAINS_PER_NODE)
    began_s = time.perf_counter()
    plan = plan_moves(nodes, domains, leaving)
    total_s = time.perf_counter() - began_s
    missing = len(leaving) - len(plan.moves)
    return Run(
        completed=not missing,
        error=f"{missing} domains have no place" if missing else None,
        total_s=total_s,
        plan_over_bound=plan.over_bound,
    )
