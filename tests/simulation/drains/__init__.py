"""Drains under faults, seeded: the real machine and planner, everything else made up.

world.py      nodes, domains, migrations, and one drain's coordinators, on one clock
test_drains   thousands of seeds; mutants that the invariants must catch
"""
